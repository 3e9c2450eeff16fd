"""Fine-tuning a run on real logs, and what randomized training is given."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from sacflow_robot.cli import common, main
from sacflow_robot.cli.train import Train
from sacflow_robot.data.log.episode_writer import write_log
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.envs.demonstrations import collect
from sacflow_robot.envs.registry import get_robot
from sacflow_robot.episode import Episode
from sacflow_robot.errors import UsageError
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.learn.config import FlowConfig, LearnerConfig, TrainConfig
from sacflow_robot.learn.config_file import from_yaml, to_yaml
from sacflow_robot.learn.progress import TrainingProgress
from sacflow_robot.learn.run_folder import RunFolder
from sacflow_robot.learn.trainer import Trainer
from sacflow_robot.learn.training_envs import training_draws, training_envs
from sacflow_robot.utils.action_history import with_action_history

SHIPPED = Path(__file__).parents[2] / "calibration" / "franka_twin.yaml"


def test_resume_takes_a_log_and_nothing_else_that_the_run_has_already(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", TrainConfig()).path
    assert Train.default(["--resume", str(run), "--replay", "real.zarr", "--out", "new"]).config.env == "lift"
    with pytest.raises(UsageError, match="leave out --out"):
        Train.default(["--resume", str(run), "--out", "new"])
    with pytest.raises(UsageError, match=r"leave out --learner\.batch-size 3"):
        Train.default(["--resume", str(run), "--replay", "real.zarr", "--learner.batch-size", "3"])
    with pytest.raises(UsageError, match="leave out --online-steps"):
        Train.default(["--resume", str(run), "--replay", "real.zarr", "--online-steps", "3"])
    with pytest.raises(UsageError, match="leave out --tune-updates"):
        Train.default(["--resume", str(run), "--profile", str(SHIPPED), "--tune-updates", "3"])
    with pytest.raises(UsageError, match="fit the run to the profile first, then fine-tune"):
        Train.default(["--resume", str(run), "--profile", str(SHIPPED), "--replay", "real.zarr"])
    for how in (["--replay", "real.zarr"], ["--profile", str(SHIPPED)]):
        assert main(["train", "--resume", str(run), *how, "--out", str(run)]) == 2, "never over a run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on robots drawn wide, and a log of a robot that is none of them."""
    folder = tmp_path_factory.mktemp("trained")
    tiny = TrainConfig(
        randomize="wide", action_history=2, offline_steps=4, online_steps=60, eval_episodes=0, final_eval_episodes=0,
        num_envs=1, flow=FlowConfig(width=32, depth=2, gate_width=16),
        learner=LearnerConfig(batch_size=32, critic_width=32, critic_depth=2, warmup_steps=0),
    )  # fmt: skip
    demos = collect("lift", "proficient", range(1_000_000, 1_000_010), 2, lambda _: None)
    demos = [with_action_history(episode, 2) for episode in demos]
    run = RunFolder.create(folder / "run", tiny)
    with training_envs(tiny) as (envs, eval_envs):
        trainer = Trainer(tiny, run, envs, eval_envs, TrainingProgress(Console(quiet=True)))
        trainer.load(demos[:2])
        trainer.run()
        write_log(folder / "real.zarr", envs.spec, demos[2:])
    return folder


def test_a_copy_of_a_run_goes_on_around_a_profile(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, fitted = trained / "run", tmp_path / "fitted"
    before = RunFolder.open(run)[0].load_checkpoint(RunFolder.open(run)[1])
    words = ["train", "--resume", str(run), "--profile", str(SHIPPED), "--online-steps", "50", "--out", str(fitted)]
    assert main(words) == 0
    folder, config = RunFolder.open(fitted)
    assert (config.randomize, config.profile, config.online_steps) == ("profile", str(fitted / "profile.yaml"), 110)
    assert Path(config.profile).read_text() == SHIPPED.read_text()
    after = folder.load_checkpoint(config)
    assert json.loads(after["progress"])["env_steps"] >= 110 > json.loads(before["progress"])["env_steps"]
    assert after["agent"]["updates"] > before["agent"]["updates"]
    assert RunFolder.open(run)[1].randomize == "wide", "what it is a copy of stays what it was"
    policy = OnnxPolicy(folder.policy)
    assert policy.spec.robot == common.robot_with_history(get_robot("lift"), 2)
    moved = fitted.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", moved.name]) == 0, "the copy is a run like any other, wherever it lies"


def test_a_run_goes_on_with_smaller_steps_where_it_ended_with_an_error(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    words = [
        "--learner.batch-size",
        "16",
        "--learner.policy-lr=1e-5",
        "--learner.max-grad-norm",
        "1",
        "--precision",
        "float32",
    ]
    assert main(["train", "--resume", str(run), *words]) == 0
    folder, config = RunFolder.open(run)
    learner = config.learner
    assert (learner.batch_size, learner.policy_lr, learner.max_grad_norm, config.precision) == (
        16,
        1e-5,
        1.0,
        "float32",
    )
    optimizer = folder.load_checkpoint(config)["agent"]["policy_optimizer"]
    assert optimizer["param_groups"][0]["lr"] == 1e-5, "what was saved does not bring the old ones back"
    assert Train.default(["--resume", str(run)]).config == config, "it keeps them"
    capsys.readouterr()
    for option in (["--flow.width", "64"], ["--learner.critic-width", "64"], ["--seed", "3"]):
        assert main(["train", "--resume", str(run), *option]) == 2
        assert f"leave out {' '.join(option)}" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--learner.batch-size", "many"]) == 2


def test_a_run_that_learned_from_a_log_is_resumed_and_not_tuned(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    folder, config = RunFolder.open(run)
    folder.write_config(replace(config, replay=(str(trained / "real.zarr"),)))
    before = folder.load_checkpoint(config)["agent"]["updates"]
    assert main(["train", "--resume", str(run)]) == 0
    assert folder.load_checkpoint(config)["agent"]["updates"] == before and sorted(tmp_path.iterdir()) == [run]


def test_a_run_is_only_made_to_fit_a_profile_that_can_be_used(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(status: int, *words: str) -> str:
        out = tmp_path / "new"
        assert main(["train", "--resume", str(trained / "run"), *words, "--out", str(out)]) == status
        assert list(tmp_path.glob("*new*")) == [], "nothing is left behind"
        return capsys.readouterr().err

    assert "no calibration profile absent.yaml" in refused(1, "--profile", "absent.yaml")
    assert "--online-steps is 0" in refused(2, "--profile", str(SHIPPED), "--online-steps", "0")
    other = tmp_path / "other.yaml"
    other.write_text(SHIPPED.read_text().replace("robot: Panda", "robot: UR5e"))
    assert "the profile is for 'UR5e', the robot is 'Panda'" in refused(1, "--profile", str(other))
    assert refused(2, "--profile", str(SHIPPED.with_name("panda.yaml"))), "nothing measured to draw from"
    assert "there is no such log" in refused(1, "--replay", "absent.zarr")
    assert "copy it here first" in refused(1, "--replay", "s3://lab/real.zarr")
    for updates in ("0", "nan", "inf"):
        assert "--tune-updates is" in refused(2, "--replay", str(trained / "real.zarr"), "--tune-updates", updates)
    log = EpisodeLog.open(trained / "real.zarr", heal=False)
    write_log(tmp_path / "short.zarr", common.robot_with_history(get_robot("lift"), 2), [log.read(0)])
    assert "are too few to tune a policy with" in refused(2, "--replay", str(tmp_path / "short.zarr"))
    plain = [replace(e, observations={k: v for k, v in e.observations.items() if k != "action_history"})
             for e in log.episodes()]  # fmt: skip
    write_log(tmp_path / "other.zarr", get_robot("lift"), plain)
    assert refused(1, "--replay", str(trained / "real.zarr"), str(tmp_path / "other.zarr")), "observes something else"


def test_a_copy_of_a_run_is_tuned_on_a_log(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, log = trained / "run", EpisodeLog.open(trained / "real.zarr", heal=False)
    monkeypatch.chdir(run)
    capsys.readouterr()
    words = ["train", "--resume", ".", "--replay", str(trained / "real.zarr"), "--tune-updates", "1", "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    folder, config = RunFolder.open(trained / "run-tuned")
    assert Path(told["run_dir"]) == folder.path and Path(told["policy"]) == folder.policy
    before = RunFolder.open(run)[0].load_checkpoint(config)
    after = folder.load_checkpoint(config)
    owed = after["agent"]["updates"] - before["agent"]["updates"] - log.steps
    assert 0 <= owed <= 2, "the run's last round had not been learned from yet"
    assert len(after["buffer"]["solved"]) == len(before["buffer"]["solved"]) + log.steps
    old, new = (state["agent"]["average_policy"] for state in (before, after))
    assert any(not torch.equal(new[name], old[name]) for name in old), "the policy itself has learned"
    OnnxPolicy(folder.policy)


def test_action_history_is_what_was_commanded_before(make_episode: Callable[..., Episode]) -> None:
    episode = with_action_history(make_episode(6), 3)
    seen = episode.observations["action_history"]
    assert seen.shape == (7, 3, 7) and not seen[0].any()
    assert np.array_equal(seen[1][-1], episode.action[0]) and not seen[1][:-1].any()
    assert np.array_equal(seen[6], episode.action[3:6])
    assert with_action_history(episode, 3) is episode and with_action_history(make_episode(2), 0).observations.keys()
    spec = common.robot_with_history(get_robot("lift"), 3)
    episode.check_fits(spec, "log")
    assert common.history_of(spec) == 3 and common.history_of(get_robot("lift")) == 0


def test_randomization_is_part_of_a_run_and_checked() -> None:
    config = TrainConfig(randomize="profile", profile=str(SHIPPED), action_history=4)
    assert from_yaml(to_yaml(config)) == config
    draws = training_draws(config)
    assert draws is not None and "joints.friction_loss_nm" in draws.measured
    assert training_draws(TrainConfig()) is None
    with pytest.raises(UsageError, match="--profile is empty; it must be a file, with --randomize profile"):
        replace(config, profile="")
