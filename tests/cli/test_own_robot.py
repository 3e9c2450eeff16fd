"""``train`` and what follows it for robots without an environment here, and for environments of one's own."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sacflow_robot.cli import common, main
from sacflow_robot.cli.train import Train
from sacflow_robot.data.log.episode_writer import write_log
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.envs.registry import UserEnv, environment_of, get_robot
from sacflow_robot.envs.vector import NoRobots, make_vector_env
from sacflow_robot.episode import Episode, EpisodeBuilder
from sacflow_robot.errors import InvalidValueError, UsageError
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.learn.presets import preset
from sacflow_robot.learn.run_folder import RunFolder
from sacflow_robot.learn.training_data import load_training_episodes
from sacflow_robot.spec import ArraySpec, RobotSpec
from sacflow_robot.utils.action_history import with_action_history

Capture = pytest.CaptureFixture[str]

ENVIRONMENT = '''
"""A cart on a rail, to be brought to its mark."""
import numpy as np
from sacflow_robot.episode import StepResult
from sacflow_robot.spec import ArraySpec, RobotSpec

class Cart:
    robot = RobotSpec("Cart", "to the mark", "velocity", 10.0, (ArraySpec("away", (1,), "m"),), ("v",), ("0.5 m/s",), (-1.0,), (1.0,))

    def begin(self, seed):
        self.away, self.steps = np.random.default_rng(seed).uniform(-1, 1), 0
        return StepResult({"away": np.array([self.away], np.float32)})

    def command(self, action):
        self.away, self.steps = self.away + 0.05 * float(action[0]), self.steps + 1
        there = abs(self.away) < 0.05
        return StepResult({"away": np.array([self.away], np.float32)}, float(there), there, self.steps == 30 and not there)

class Forgetful(Cart):
    def begin(self, seed):
        return StepResult({"distance": np.zeros(1, np.float32)})

class Mute:
    pass

class Broken:
    def __init__(self):
        raise RuntimeError("no license")

NOT_A_CLASS = 3
'''
TINY = [
    "--flow.width",
    "16",
    "--flow.depth",
    "1",
    "--flow.gate-width",
    "8",
    "--learner.critic-width",
    "16",
    "--learner.batch-size",
    "16",
]
SHORT = [*TINY, "--offline-steps", "4", "--compile", "off"]


@pytest.fixture(scope="module")
def cart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with environments, and ``cart.zarr``, a log of the first."""
    folder = tmp_path_factory.mktemp("cart")
    (folder / "cart.py").write_text(ENVIRONMENT)
    env = UserEnv(f"{folder}/cart.py:Cart")
    write_log(folder / "cart.zarr", env.robot, [driven(env, seed) for seed in range(1_000_000, 1_000_006)])
    return folder


def driven(env: UserEnv, seed: int) -> Episode:
    """An episode of going straight to the mark."""
    result = env.begin(seed)
    builder = EpisodeBuilder(result, period_ns=env.robot.period_ns)
    while not result.ended:
        action = np.clip(-20 * result.observation["away"], -1, 1)
        result = env.command(action)
        builder.add(result, action)
    return builder.build(seed=seed)


def refused(capsys: Capture, status: int, *words: object) -> str:
    assert main([str(word) for word in words]) == status
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("sacflow-robot: error: ")]
    assert len(lines) == 1 and not captured.out, captured
    return lines[0]


def did(capsys: Capture, *words: object) -> tuple[dict[str, Any], str]:
    """JSON and remarks of a command that has to work."""
    status = main([str(word) for word in (*words, "--json")])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out.splitlines()[-1]), captured.err


def test_options_that_need_an_environment_are_refused_by_name(cart: Path, tmp_path: Path, capsys: Capture) -> None:
    train = "train", "--replay", cart / "cart.zarr", "--out", tmp_path / "run"
    for option, value in (("online-steps", 100), ("eval-episodes", 5), ("final-eval-episodes", 5)):
        said = refused(capsys, 2, *train, f"--{option}", value)
        assert f"--{option} is {value}; it must be 0 without an environment, which --env would name" in said
    for option, value in (
        *(("num-envs", 2), ("env-engine", "stock"), ("eval-every", 5), ("demo-quality", "poor"), ("demo-episodes", 3)),
        *(("randomize", "wide"), ("safety", "x.yaml"), ("profile", "x.yaml")),
    ):
        assert f"--{option} does nothing without an environment" in refused(capsys, 2, *train, f"--{option}", value)
        spelled = option.replace("-", "_")
        assert f"--{option} does nothing" in refused(capsys, 2, *train, f"--{spelled}={value}"), "as others spell it"
    assert "--from-scratch is True" in refused(capsys, 2, *train, "--from-scratch")
    assert "--algo is rlpd; it must be one that learns offline" in refused(capsys, 2, *train, "--algo", "rlpd")
    assert "--offline-steps is 0" in refused(capsys, 2, *train, "--offline-steps", 0)
    assert "nothing says which robot" in refused(capsys, 2, "train", "--env", "none", "--out", tmp_path / "run")
    assert "does not fit" in refused(capsys, 1, *train, "--env", "lift", *SHORT), "an explicit --env is meant"
    assert not (tmp_path / "run").exists()


def test_a_run_without_an_environment_goes_on_everywhere(
    cart: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log = cart / "cart.zarr"
    explicit = "--online-steps", 0, "--eval-episodes", 0, "--final-eval-episodes", 0
    made, _ = did(capsys, "train", "--demos", log, *SHORT, *explicit)
    assert made["success_rate"] is None and made["bc_success_rate"] is None and made["mean_return"] is None
    run = Path(made["run_dir"])
    assert run == Path("runs/to-the-mark-flow-g-s0") and Path(made["policy"]) == run / "to-the-mark.onnx"
    robot = EpisodeLog.open(log).robot
    assert OnnxPolicy(run / "to-the-mark.onnx").spec.robot == robot == RunFolder.open(run)[0].robot

    exported, _ = did(capsys, "export", run, "--out", tmp_path / "again.onnx", "--weights", "float16")
    assert exported["weights"] == "float16"
    assert "is a run without an environment" in refused(capsys, 2, "export", run, "--eval-episodes", 3)
    assert "no environment of it is known here" in refused(capsys, 2, "eval", "--policy", made["policy"])
    did(capsys, "train", "--resume", run)
    assert "--online-steps is 50; it must be 0" in refused(capsys, 2, "train", "--resume", run, "--online-steps", 50)
    assert "--replay LOG fine-tunes it" in refused(capsys, 2, "train", "--resume", run, "--profile", "x.yaml")
    followed, _ = did(capsys, "follow", run, "--log", log, "--stop-after", 1, "--warmup-steps", 0)
    assert followed["env_steps"] > 0
    assert "--gate-episodes is 3" in refused(capsys, 2, "follow", run, "--log", log, "--gate-episodes", 3)

    (run / "robot.json").write_text("{")
    assert "robot.json cannot be read" in refused(capsys, 1, "export", run)


def test_an_environment_of_ones_own_trains_evaluates_and_runs(cart: Path, tmp_path: Path, capsys: Capture) -> None:
    env, run = f"{cart}/cart.py:Cart", tmp_path / "run"
    options = "--online-steps", 80, "--eval-episodes", 2, "--final-eval-episodes", 2, "--learner.warmup-steps", 0
    train = "train", "--env", env, "--replay", cart / "cart.zarr", "--action-history", 2
    made, _ = did(capsys, *train, "--out", run, *SHORT, *options)
    assert made["env_steps"] >= 80 and 0 <= made["success_rate"] <= 1
    episode = EpisodeLog.open(run / "episodes.zarr").read(0)
    assert np.array_equal(episode.observations["action_history"][2], episode.action[:2]), "online too"
    assert did(capsys, "train", "--resume", run, "--online-steps", 100)[0]["env_steps"] >= 100
    said = refused(capsys, 2, "train", "--resume", run, "--online-steps", 99)
    assert f"--online-steps 99 with --resume {run}, a run of 100: it is the new total, and cannot be less" in said
    assert did(capsys, "eval", "--policy", made["policy"], "--env", env, "--episodes", 2)[0]["episodes"] == 2
    assert did(capsys, "export", run, "--eval-episodes", 2)[0]["episodes"] == 2
    said = refused(capsys, 1, "eval", "--policy", made["policy"], "--env", "lift")
    assert "does not fit lift" in said and "action_names" in said
    replay = "replay", run / "episodes.zarr", "--robot", f"sim:{env}"
    assert "no simulator states to start from" in refused(capsys, 1, *replay)


def test_environments_that_do_not_keep_the_protocol_are_refused(cart: Path, tmp_path: Path, capsys: Capture) -> None:
    for name, why in (
        ("cart.py:Mute", "lacks begin and command and robot"),
        ("cart.py:Broken", "cannot be made: RuntimeError: no license"),
        ("cart.py:Absent", "has no 'Absent'; it has"),
        ("absent.py:Cart", "there is no file"),
        ("cart.py:NOT_A_CLASS", "cannot be made: TypeError"),
    ):
        train = "train", "--env", cart / name, "--replay", cart / "cart.zarr", "--out", tmp_path / "run"
        assert why in refused(capsys, 2, *train)
    assert "cannot be loaded" in refused(capsys, 2, "train", "--env", "no_such_module:Cart")
    with pytest.raises(InvalidValueError, match="lacks 'away'"):
        UserEnv(f"{cart}/cart.py:Forgetful").begin(0)


def test_a_log_names_its_environment_and_nothing_is_imported_because_a_file_says_so(
    tmp_path: Path, robot: RobotSpec
) -> None:
    assert environment_of(get_robot("can")) == "can"
    assert environment_of(common.robot_with_history(robot, 3)) == "lift"
    assert environment_of(replace(robot, control_rate_hz=10.0)) == "none", "another robot than the simulated one"
    gymnasium = replace(robot, robot="gymnasium", task="Hopper-v5")
    assert environment_of(gymnasium) == "Hopper-v5"
    assert environment_of(replace(gymnasium, task="anti.gravity:Hopper-v5")) == "none"
    with pytest.raises(UsageError, match="no environment of Panda, lift"):
        NoRobots(robot).begin({0: 1})


def test_eval_takes_the_policys_own_task_and_names_another(capsys: Capture) -> None:
    policies = Path(__file__).parents[2] / "policies"
    assert did(capsys, "eval", "--policy", policies / "can.onnx", "--episodes", 1)[0]["episodes"] == 1
    said = refused(capsys, 1, "eval", "--policy", policies / "can.onnx", "--env", "lift")
    assert "does not fit lift" in said and "it is of can, leave out --env lift" in said
    own = refused(capsys, 2, "eval", "--policy", policies / "can.onnx", "--env", "none")
    assert "unknown task 'none'" in own


def test_train_takes_the_task_and_the_action_history_of_its_log(
    tmp_path: Path, robot: RobotSpec, make_episode: Callable[..., Episode]
) -> None:
    log = tmp_path / "seen.zarr"
    write_log(log, common.robot_with_history(robot, 6), [with_action_history(make_episode(9, seed=2_000_000), 6)])
    config = Train.default(["--replay", str(log)]).config
    assert (config.env, config.action_history) == ("lift", 6)
    assert Train.default([]).config == preset("lift"), "without any it is lift, as ever"
    assert Train.default(["--demos=robomimic:can/ph"]).config.env == "can", "and nothing is downloaded to know it"
    for length in (0, 2, 6):
        config = replace(preset("lift"), demos="none", replay=(str(log),), action_history=length)
        episode = load_training_episodes(config)[1][0]
        assert common.history_of(common.robot_with_history(robot, length)) == length
        if not length:
            assert "action_history" not in episode.observations
            continue
        rows = episode.observations["action_history"]
        assert rows.shape == (10, length, 7) and np.array_equal(rows[-1], episode.action[-length:])


def test_hints_fit_the_robot(robot: RobotSpec) -> None:
    own = RobotSpec("R", "my task", "c", 5.0, (ArraySpec("x", (1,), "m"),), ("a",), ("1",), (-1.0,), (1.0,))
    assert common.train_hint(robot, "l.zarr") == "sacflow-robot train --env lift --demos none --replay l.zarr"
    assert common.train_hint(own, "l.zarr") == "sacflow-robot train --replay l.zarr"
    seeing = common.robot_with_history(robot, 6)
    assert common.train_hint(seeing, "l").endswith("--env lift --demos none --action-history 6 --replay l")
    assert common.robot_hint(own) == "DRIVER:..." and common.robot_hint(robot) == "sim:lift"
    assert common.robot_hint(seeing) == "'sim:lift?history=6'", "as a shell takes it"
    assert common.replay_hint(own, "l", "d.py:make?a=1") == "sacflow-robot replay l --episode 0 --robot 'd.py:make?a=1'"


@pytest.mark.parametrize("engine", ["stock", "compiled"])
def test_arms_with_action_history_observe_their_last_actions(engine: Any) -> None:
    envs = make_vector_env("lift", 1, engine, history=3)
    try:
        assert envs.spec == common.robot_with_history(get_robot("lift"), 3)
        assert not envs.begin({0: 5})[0].observation["action_history"].any()
        chunk = np.linspace(-1, 1, 28, dtype=np.float32).reshape(4, 7)
        envs.send({0: chunk})
        assert np.array_equal(envs.receive()[0][-1].observation["action_history"], chunk[1:])
    finally:
        envs.close()
