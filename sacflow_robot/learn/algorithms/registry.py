"""The table of algorithms: one name, one class."""

import torch

from sacflow_robot.errors import UnknownNameError
from sacflow_robot.learn.algorithms.agent import Agent
from sacflow_robot.learn.algorithms.baselines import QCFQL, BehaviorCloning, BestOfN
from sacflow_robot.learn.algorithms.sac_flow import GaussianSac, Rlpd, SacFlow
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.spec import RobotSpec

ALGORITHMS: dict[str, type[Agent]] = {
    "sac-flow": SacFlow,
    "bc": BehaviorCloning,
    "qc": BestOfN,
    "qc-fql": QCFQL,
    "rlpd": Rlpd,
    "sac": GaussianSac,
}


def make_agent(robot: RobotSpec, config: TrainConfig, device: torch.device) -> Agent:
    """The agent of the configuration's algorithm, whose actions go from -1 to 1 between the robot's own bounds.

    Raises:
        UnknownNameError: No such algorithm.
        UsageError: An action of the robot has no bounds, or an option does not fit the algorithm.
    """
    if config.algo not in ALGORITHMS:
        raise UnknownNameError("algorithm", config.algo, ALGORITHMS)
    agent = ALGORITHMS[config.algo](robot.with_unit_actions(), config, device)
    agent.commanded_robot = robot
    return agent
