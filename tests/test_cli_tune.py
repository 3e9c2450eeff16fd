"""Fine-tuning a run on real logs, and what randomised training is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from sacflow_robot.cli import common, main
from sacflow_robot.cli.train import Train, training_arms, training_draws, with_action_history
from sacflow_robot.data.log import EpisodeLog, write_log
from sacflow_robot.envs.tasks import get_arm
from sacflow_robot.envs.workers import collect
from sacflow_robot.episode import Episode
from sacflow_robot.errors import UsageError
from sacflow_robot.learn.config import FlowConfig, LearnerConfig, TrainConfig, from_yaml, to_yaml
from sacflow_robot.learn.progress import TrainingProgress
from sacflow_robot.learn.run_folder import RunFolder
from sacflow_robot.learn.train import Trainer
from sacflow_robot.serve.policy import OnnxPolicy

SHIPPED = Path(__file__).parents[1] / "calibration" / "franka_twin.yaml"


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
    assert main(["train", "--resume", str(run), "--replay", "real.zarr", "--tune-updates", "0"]) == 2
    assert main(["train", "--resume", str(run), "--profile", "absent.yaml", "--out", str(tmp_path / "new")]) == 1
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on arms drawn wide, and a log of an arm that is none of them."""
    folder = tmp_path_factory.mktemp("trained")
    tiny = TrainConfig(
        randomise="wide", action_history=2, offline_steps=4, online_steps=60, eval_episodes=0, final_eval_episodes=0,
        arms=1, flow=FlowConfig(width=32, depth=2, gate_width=16),
        learner=LearnerConfig(batch_size=32, critic_width=32, critic_depth=2, warmup_steps=0),
    )  # fmt: skip
    demos = collect("lift", "proficient", range(1_000_000, 1_000_003), 2, lambda _: None)
    demos = [with_action_history(episode, 2) for episode in demos]
    run = RunFolder.create(folder / "run", tiny)
    draws = training_draws(tiny)
    with training_arms(tiny, 1, draws) as arms, training_arms(tiny, 1, draws) as eval_arms:
        trainer = Trainer(tiny, run, arms, eval_arms, TrainingProgress(Console(quiet=True)))
        trainer.load(demos[:2])
        trainer.run()
        write_log(folder / "real.zarr", arms.spec, demos[2:])
    return folder


def test_a_copy_of_a_run_goes_on_around_a_profile(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, fitted = trained / "run", tmp_path / "fitted"
    before = RunFolder.open(run)[0].load_checkpoint(RunFolder.open(run)[1])
    words = ["train", "--resume", str(run), "--profile", str(SHIPPED), "--online-steps", "50", "--out", str(fitted)]
    assert main(words) == 0
    folder, config = RunFolder.open(fitted)
    assert (config.randomise, config.profile, config.online_steps) == ("profile", str(fitted / "profile.yaml"), 110)
    assert Path(config.profile).read_text() == SHIPPED.read_text()
    after = folder.load_checkpoint(config)
    assert json.loads(after["progress"])["env_steps"] >= 110 > json.loads(before["progress"])["env_steps"]
    assert after["agent"]["updates"] > before["agent"]["updates"]
    assert RunFolder.open(run)[1].randomise == "wide", "what it is a copy of stays what it was"
    policy = OnnxPolicy(folder.policy)
    assert policy.spec.arm == common.arm_with_history(get_arm("lift"), 2)
    moved = fitted.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", moved.name]) == 0, "the copy is a run like any other, wherever it lies"


def test_a_copy_of_a_run_is_tuned_on_a_log(trained: Path, tmp_path: Path) -> None:
    run, tuned = trained / "run", tmp_path / "tuned"
    log = EpisodeLog.open(trained / "real.zarr", heal=False)
    words = ["train", "--resume", str(run), "--replay", str(trained / "real.zarr"), "--out", str(tuned)]
    assert main([*words, "--tune-updates", "8"]) == 0
    folder, config = RunFolder.open(tuned)
    before = RunFolder.open(run)[0].load_checkpoint(config)["agent"]
    after = folder.load_checkpoint(config)["agent"]
    owed = after["updates"] - before["updates"] - 8 * len(log.read(0))
    assert 0 <= owed <= 2, "the run's last round had not been learned from yet"
    weights = [name for name, value in after["policy"].items() if value.is_floating_point()]
    assert any(not torch.equal(after["policy"][name], before["policy"][name]) for name in weights)
    OnnxPolicy(folder.policy)
    plain = {key: value for key, value in log.read(0).observations.items() if key != "action_history"}
    write_log(tmp_path / "other.zarr", get_arm("lift"), [replace(log.read(0), observations=plain)])
    words[4], words[6] = str(tmp_path / "other.zarr"), str(tmp_path / "another")
    assert main(words) == 1, "of an arm that observes something else"
    assert not (tmp_path / "another").exists()


def test_action_history_is_what_was_commanded_before(make_episode: Callable[..., Episode]) -> None:
    episode = with_action_history(make_episode(6), 3)
    seen = episode.observations["action_history"]
    assert seen.shape == (7, 3, 7) and not seen[0].any()
    assert np.array_equal(seen[1][-1], episode.commanded[0]) and not seen[1][:-1].any()
    assert np.array_equal(seen[6], episode.commanded[3:6])
    assert with_action_history(episode, 3) is episode and with_action_history(make_episode(2), 0).observations.keys()
    spec = common.arm_with_history(get_arm("lift"), 3)
    episode.check_fits(spec, "log")
    assert common.history_of(spec) == 3 and common.history_of(get_arm("lift")) == 0


def test_randomisation_is_part_of_a_run_and_checked() -> None:
    config = TrainConfig(randomise="profile", profile=str(SHIPPED), action_history=4)
    assert from_yaml(to_yaml(config)) == config
    draws = training_draws(config)
    assert draws is not None and draws.history == 4 and "joints.friction_loss_nm" in draws.measured
    assert training_draws(TrainConfig()) is None
    with pytest.raises(UsageError, match="--profile is empty; it must be a file, with --randomise profile"):
        replace(config, profile="")
