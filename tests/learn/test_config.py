from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest

from sacflow_robot.errors import DataError, UnknownNameError, UsageError
from sacflow_robot.learn.config import (
    AlgorithmName,
    FlowConfig,
    LearnerConfig,
    TrainConfig,
    VelocityName,
)
from sacflow_robot.learn.config_file import from_yaml, to_yaml
from sacflow_robot.learn.presets import preset


def test_configuration_survives_its_file() -> None:
    config = replace(preset("lift", "flow-t"), replay=("a.zarr", "s3://lab/b.zarr"), seed=3)
    assert from_yaml(to_yaml(config)) == config


@pytest.mark.parametrize("text", ["", "[", "env: lift", "- 1", "\x00"])
def test_unreadable_configuration(text: str) -> None:
    with pytest.raises(DataError, match=r"config.yaml of the run cannot be read: [^\n]+$"):
        from_yaml(text)


def test_presets_by_name() -> None:
    assert preset("lift", "flow-t").flow.width == 128
    for full in (False, True):
        for algo, scratch in (("sac", True), ("rlpd", False)):
            gaussian = preset("lift", algo=algo, from_scratch=scratch, full=full)
            assert gaussian.flow.width == gaussian.learner.critic_width, "a baseline is not handicapped"
    with pytest.raises(
        UnknownNameError,
        match=r"unknown task 'lit'; valid names: can, door, lift, .*any Gymnasium id .*; did you mean 'lift'\?",
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
        (lambda: LearnerConfig(policy_lr=float("nan")), "--learner.policy-lr is nan"),
        (lambda: LearnerConfig(best_of=0), "--learner.best-of is 0; it must be at least 1"),
        (lambda: LearnerConfig(max_grad_norm=0.0), "--learner.max-grad-norm is 0.0; it must be positive, or none"),
        (lambda: LearnerConfig(adam_beta1=1.0), "--learner.adam-beta1 is 1.0; it must be at least 0 and below 1"),
        (lambda: LearnerConfig(bc_coef_final=1.0), "must be from 0 to learner.bc_coef"),
        (lambda: FlowConfig(noise="learned", noise_scale=9), "between 0.0067 and 7.4 where sigma is learned"),
        (lambda: LearnerConfig(temperature_bounds=(1, 0)), "the lower one first"),
        (lambda: LearnerConfig(initial_temperature=1), "within learner.temperature-bounds"),
    ],
)
def test_settings_of_flow_and_learner_are_checked(change: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        change()


def test_numbers_are_checked() -> None:
    with pytest.raises(UsageError, match="--num-envs is 0; it must be at least 1"):
        TrainConfig(num_envs=0)
    with pytest.raises(UsageError, match="--online-steps is -1; it must be at least 0"):
        TrainConfig(online_steps=-1)
    with pytest.raises(UsageError, match=r"--demo-ratio is 1.5; it must be from 0 to 1"):
        TrainConfig(demo_ratio=1.5)
    with pytest.raises(UsageError, match="--replay-memory-gb is -1; it must be at least 0"):
        TrainConfig(replay_memory_gb=-1)


def test_options_that_do_not_go_together_are_refused() -> None:
    best = LearnerConfig(best_of=4)
    for algo, why in (("bc", "learns no critic"), ("sac", "plays its mean"), ("rlpd", "plays its mean")):
        with pytest.raises(UsageError, match=f"--learner.best-of is 4; it must be 1 with {algo}, which {why}"):
            TrainConfig(algo=algo, learner=best)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="must be action with sac, which has no flow"):
        TrainConfig(algo="sac", learner=LearnerConfig(bc_loss="same-noise"))
    with pytest.raises(UsageError, match="--demos is auto; it must be none, without --replay, from scratch"):
        TrainConfig(from_scratch=True)
    with pytest.raises(UsageError, match="--offline-steps is 2500; it must be 0 from scratch"):
        TrainConfig(from_scratch=True, demos="none")


@pytest.mark.parametrize("algo", get_args(AlgorithmName))
@pytest.mark.parametrize("velocity", get_args(VelocityName))
@pytest.mark.parametrize("full", [False, True])
def test_every_preset_is_valid_and_survives_its_file(algo: str, velocity: str, full: bool) -> None:
    for env, from_scratch in (("lift", False), ("can", False), ("HalfCheetah-v5", True)):
        if from_scratch and algo not in ("sac-flow", "sac"):
            with pytest.raises(UsageError, match=f"--algo is {algo}; it must be sac-flow or sac from scratch"):
                preset(env, velocity, algo, from_scratch=True, full=full)
            continue
        config = preset(env, velocity, algo, from_scratch=from_scratch, full=full)
        assert (config.env, config.algo, config.velocity) == (env, algo, velocity)
        assert config.from_scratch == from_scratch and from_yaml(to_yaml(config)) == config
        assert (config.online_steps == 1_000_000) == (full and algo != "bc")
        assert config.chunk_length == (1 if from_scratch else 5)


def test_unknown_algorithm() -> None:
    with pytest.raises(
        UnknownNameError, match="unknown algorithm 'ppo'; valid names: bc, qc, qc-fql, rlpd, sac, sac-flow"
    ):
        preset("lift", algo="ppo")
