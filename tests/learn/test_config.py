from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sacflow_robot.errors import DataError, UnknownNameError, UsageError
from sacflow_robot.learn.config import FlowConfig, LearnerConfig, TrainConfig, from_yaml, to_yaml
from sacflow_robot.learn.presets import preset


def test_configuration_survives_its_file() -> None:
    config = replace(preset("lift", "flow-t"), replay=(Path("a.zarr"), Path("b.zarr")), seed=3)
    assert from_yaml(to_yaml(config)) == config


@pytest.mark.parametrize("text", ["", "[", "env: lift", "- 1", "\x00"])
def test_unreadable_configuration(text: str) -> None:
    with pytest.raises(DataError, match=r"config.yaml of the run cannot be read: [^\n]+$"):
        from_yaml(text)


def test_presets_by_name() -> None:
    assert preset("lift", "flow-t").flow.width == 128
    with pytest.raises(
        UnknownNameError, match=r"unknown task 'lit'; valid names: any Gymnasium id, e\.g\. HalfCheetah-v5, can"
    ):
        preset("lit")
    with pytest.raises(UnknownNameError, match="valid names: flow-g, flow-l, flow-t, mlp"):
        preset("lift", "flow")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: FlowConfig(euler_steps=0), "--flow.euler-steps is 0; it must be at least 1"),
        (lambda: FlowConfig(noise_scale=0), "--flow.noise-scale is 0; it must be positive"),
        (lambda: LearnerConfig(batch_size=0), "--learner.batch-size is 0"),
        (lambda: LearnerConfig(discount=2), "--learner.discount is 2; it must be above 0 and at most 1"),
        (lambda: LearnerConfig(policy_rate=float("nan")), "--learner.policy-rate is nan"),
        (lambda: LearnerConfig(temperature_bounds=(1, 0)), "the lower one first"),
        (lambda: LearnerConfig(initial_temperature=1), "within learner.temperature-bounds"),
    ],
)
def test_settings_of_flow_and_learner_are_checked(change: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        change()


def test_numbers_are_checked() -> None:
    with pytest.raises(UsageError, match="--arms is 0; it must be at least 1"):
        TrainConfig(arms=0)
    with pytest.raises(UsageError, match="--online-steps is -1; it must be at least 0"):
        TrainConfig(online_steps=-1)
    with pytest.raises(UsageError, match=r"--demo-share is 1.5; it must be from 0 to 1"):
        TrainConfig(demo_share=1.5)
    with pytest.raises(UsageError, match="--replay-memory-gb is -1; it must be at least 0"):
        TrainConfig(replay_memory_gb=-1)
