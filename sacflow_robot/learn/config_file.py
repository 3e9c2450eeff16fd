"""A run's configuration as YAML, and fields by their earlier names."""

from dataclasses import asdict

import yaml

from sacflow_robot.errors import DataError, one_line
from sacflow_robot.learn.config import FlowConfig, LearnerConfig, TrainConfig

RENAMED = {
    "arms": "num_envs",
    "demo_share": "demo_ratio",
    "randomise": "randomize",
    "replay_share": "replay_ratio",
    "learner.critic_rate": "learner.critic_lr",
    "learner.critics": "learner.num_critics",
    "learner.gradient_clip": "learner.max_grad_norm",
    "learner.policy_average_rate": "learner.ema_rate",
    "learner.policy_rate": "learner.policy_lr",
    "learner.regularisation": "learner.bc_coef",
    "learner.regularisation_final": "learner.bc_coef_final",
    "learner.regularisation_schedule": "learner.bc_schedule",
    "learner.regulariser": "learner.bc_loss",
    "learner.saturation_target": "learner.target_entropy_per_dim",
    "learner.target_rate": "learner.tau",
    "learner.temperature_rate": "learner.alpha_lr",
    "learner.updates_per_step": "learner.utd_ratio",
    "learner.value_scale": "learner.normalize_q",
}
"""Fields by the names that they had in version 0.1, which its run folders and command lines use."""


def to_yaml(config: TrainConfig) -> str:
    """The configuration as YAML, readable by people and by :func:`from_yaml`."""
    data = asdict(config)
    data["replay"] = list(config.replay)
    data["learner"]["temperature_bounds"] = list(config.learner.temperature_bounds)
    return yaml.safe_dump(data, sort_keys=False)


def from_yaml(text: str) -> TrainConfig:
    """Inverse of :func:`to_yaml`.

    Raises:
        DataError: The text is not such a configuration.
    """
    try:
        data = yaml.safe_load(text)
        data = {RENAMED.get(name, name): value for name, value in data.items()}
        renamed = {
            RENAMED.get(f"learner.{name}", f"learner.{name}"): value for name, value in data.pop("learner").items()
        }
        learner = {name.removeprefix("learner."): value for name, value in renamed.items()}
        learner["temperature_bounds"] = tuple(learner["temperature_bounds"])
        data["replay"] = tuple(map(str, data["replay"]))
        data.setdefault("env_engine", "stock")  # a run begun before there was another
        return TrainConfig(flow=FlowConfig(**data.pop("flow")), learner=LearnerConfig(**learner), **data)
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError, RecursionError, OverflowError) as error:
        raise DataError(f"config.yaml of the run cannot be read: {one_line(error)}") from None
