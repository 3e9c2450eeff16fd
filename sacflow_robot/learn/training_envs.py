"""Robots that a run trains and evaluates on: drawn and limited as its configuration says."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from sacflow_robot.calibrate.profile import load_profile
from sacflow_robot.envs.environment import ActionFilter
from sacflow_robot.envs.randomization import Draws
from sacflow_robot.envs.registry import get_robot
from sacflow_robot.envs.vector import NoRobots, ThreadVectorEnv, make_vector_env
from sacflow_robot.errors import UsageError
from sacflow_robot.interfaces import VectorEnv
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.robot.safety.filter import SafetyFilter
from sacflow_robot.spec import RobotSpec
from sacflow_robot.utils.action_history import robot_with_history
from sacflow_robot.utils.processes import core_count


@contextmanager
def training_envs(config: TrainConfig, robot: RobotSpec | None = None) -> Iterator[tuple[VectorEnv, VectorEnv]]:
    """Environments to train in, ``num_envs`` of them, and to evaluate in, one for each core that has an episode.

    Args:
        config: The run's configuration.
        robot: The robot of a run without an environment: it is the spec of both, and none can be moved.

    Raises:
        UsageError, DataError: A profile cannot be used, or the environment cannot be made.
    """
    if robot is not None:
        yield NoRobots(robot), NoRobots(robot)
        return
    draws = training_draws(config)
    evaluated = max(1, min(core_count(), config.eval_episodes))
    with _envs(config, config.num_envs, draws) as envs, _envs(config, evaluated, draws) as eval_envs:
        yield envs, eval_envs


def _envs(config: TrainConfig, count: int, draws: Draws | None) -> ThreadVectorEnv:
    return make_vector_env(
        config.env,
        count,
        config.env_engine,
        history=config.action_history,
        draws=draws,
        limiter=training_limiter(config),
    )


def training_draws(config: TrainConfig) -> Draws | None:
    """Randomization of the training robots; None for the nominal robot.

    Raises:
        UsageError, DataError: The profile cannot be used.
    """
    if config.randomize == "none":
        return None
    measured = load_profile(Path(config.profile)).measured if config.randomize == "profile" else {}
    return Draws(config.randomize, measured)


def training_limiter(config: TrainConfig) -> Callable[[], ActionFilter] | None:
    """Maker of safety filters with the limits of the profile that the configuration names; None if it names none.

    Raises:
        UsageError: The profile has none, or the robot is not one that a safety filter knows.
        DataError: It cannot be read.
    """
    if config.safety is None:
        return None
    profile = load_profile(Path(config.safety))
    if profile.safety is None:
        raise UsageError(f"--safety {config.safety}: the profile has no section 'safety'")
    robot = robot_with_history(get_robot(config.env), config.action_history)
    return partial(SafetyFilter, robot, profile.safety_limits(robot))
