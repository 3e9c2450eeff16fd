"""Fine-tuning a run on real logs, and what randomised training is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.cli import common, main
from sacflow_robot.cli.train import Train, training_draws, with_action_history
from sacflow_robot.envs.tasks import get_arm
from sacflow_robot.episode import Episode
from sacflow_robot.errors import UsageError
from sacflow_robot.learn.config import TrainConfig, from_yaml, to_yaml
from sacflow_robot.learn.run_folder import RunFolder

SHIPPED = Path(__file__).parents[1] / "calibration" / "franka_twin.yaml"


def test_resume_takes_a_log_and_nothing_else_that_the_run_has_already(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", TrainConfig()).path
    assert Train.default(["--resume", str(run), "--replay", "real.zarr", "--out", "new"]).config.env == "lift"
    with pytest.raises(UsageError, match="leave out --out"):
        Train.default(["--resume", str(run), "--out", "new"])
    with pytest.raises(UsageError, match=r"leave out --learner\.batch-size 3"):
        Train.default(["--resume", str(run), "--replay", "real.zarr", "--learner.batch-size", "3"])
    assert main(["train", "--resume", str(run), "--replay", "real.zarr", "--out", str(run)]) == 2, "never over a run"
    assert main(["train", "--resume", str(run), "--replay", "real.zarr", "--tune-updates", "0"]) == 2


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
