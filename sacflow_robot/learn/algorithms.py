"""The table of algorithms: one name, one class."""

from __future__ import annotations

import torch

from sacflow_robot.errors import UnknownNameError
from sacflow_robot.learn.agent import Agent
from sacflow_robot.learn.baselines import BehaviourCloning, BestOfN, OneStepDistillation
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.sac_flow import GaussianSac, Rlpd, SacFlow
from sacflow_robot.spec import ArmSpec

ALGORITHMS: dict[str, type[Agent]] = {
    "sac-flow": SacFlow,
    "bc": BehaviourCloning,
    "qc": BestOfN,
    "qc-fql": OneStepDistillation,
    "rlpd": Rlpd,
    "sac": GaussianSac,
}


def make_agent(arm: ArmSpec, config: TrainConfig, device: torch.device) -> Agent:
    """The agent of the configuration's algorithm.

    Raises:
        UnknownNameError: No such algorithm.
        UsageError: The arm or an option does not fit it.
    """
    if config.algo not in ALGORITHMS:
        raise UnknownNameError("algorithm", config.algo, ALGORITHMS)
    return ALGORITHMS[config.algo](arm, config, device)
