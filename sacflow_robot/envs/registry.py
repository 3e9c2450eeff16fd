"""Environments by name: a robosuite task, a Gymnasium id, or one's own as ``MODULE:CLASS``."""

from typing import Any

from sacflow_robot.envs.environment import SimulatedEnv
from sacflow_robot.envs.tasks import TASKS, get_task, is_gymnasium_id
from sacflow_robot.episode import StepResult
from sacflow_robot.errors import SacflowError, SpecMismatchError, UsageError, one_line
from sacflow_robot.spec import NO_ENVIRONMENT, Engine, FloatArray, RobotSpec
from sacflow_robot.utils.action_history import without_history


class UserEnv(SimulatedEnv):
    """An environment of the user's own, ``MODULE:CLASS`` or ``FILE.py:CLASS``, its answers checked.

    The class, or a function, is called without arguments; what it returns has ``robot``, ``begin`` and ``command`` as
    ``SimulatedEnv``. One object runs one episode at a time; training and evaluation make several, in processes of their own.
    An episode must depend on its seed and the actions alone.

    Raises:
        UsageError: It cannot be loaded or made, or is not an environment.
    """

    def __init__(self, name: str) -> None:
        from sacflow_robot.utils.plugins import load_object

        make = load_object(name, "environment")
        try:
            self._env: Any = make()
        except SacflowError:
            raise
        except Exception as error:  # whatever the user's code raises
            raise UsageError(
                f"environment {name!r} cannot be made: {type(error).__name__}: {one_line(error)}"
            ) from None
        lacking = [method for method in ("begin", "command") if not callable(getattr(self._env, method, None))]
        if not isinstance(getattr(self._env, "robot", None), RobotSpec):
            lacking.append("robot")
        if lacking:
            raise UsageError(
                f"environment {name!r} lacks {' and '.join(lacking)}; "
                "it needs robot (a RobotSpec), begin(seed) and command(action)"
            )
        self._name = name
        self.robot = self._env.robot

    def begin(self, seed: int) -> StepResult:
        return self._checked(self._env.begin(seed))

    def command(self, action: FloatArray) -> StepResult:
        return self._checked(self._env.command(self.robot.check_action(action)))

    def close(self) -> None:
        close = getattr(self._env, "close", None)
        if close is not None:
            close()

    def _checked(self, result: Any) -> StepResult:
        if not isinstance(result, StepResult):
            raise UsageError(f"environment {self._name!r} returned {type(result).__name__}, expected a StepResult")
        self.robot.check_observation(result.observation)
        return result


def make_environment(name: str, engine: Engine = "compiled") -> SimulatedEnv:
    """One simulated robot, in this process.

    Args:
        name: Task, Gymnasium id, or ``MODULE:CLASS``.
        engine: Code that steps a robosuite task.

    Raises:
        UnknownNameError: No such task.
        UsageError: The environment cannot be made, or does not fit.
    """
    if is_gymnasium_id(name):
        from sacflow_robot.envs.gymnasium_env import GymnasiumEnv

        return GymnasiumEnv(name)
    if is_user_environment(name):
        return UserEnv(name)
    from sacflow_robot.envs.robosuite_env import RobosuiteEnv

    return RobosuiteEnv(name, engine=engine)


def get_robot(name: str) -> RobotSpec:
    """The simulated robot of a task, of any Gymnasium id, or of an environment ``MODULE:CLASS``.

    Raises:
        UnknownNameError: None of these.
        UsageError: The environment cannot be made, or does not fit.
    """
    if name in TASKS or (":" not in name and not is_gymnasium_id(name)):
        return get_task(name).robot
    env = make_environment(name)
    env.close()
    return env.robot


def is_user_environment(name: str) -> bool:
    """True for ``MODULE:CLASS`` or ``FILE.py:CLASS``."""
    return ":" in name and name not in TASKS and not is_gymnasium_id(name)


def environment_of(robot: RobotSpec) -> str:
    """The environment here that is of this robot and task, as far as its specification says; else ``NO_ENVIRONMENT``.

    A specification that names a module to import is not followed: files run no code.
    """
    robot = without_history(robot)
    if robot.task in TASKS and not TASKS[robot.task].robot.differences(robot):
        return robot.task
    if robot.robot == "gymnasium" and is_gymnasium_id(robot.task) and ":" not in robot.task:
        return robot.task
    return NO_ENVIRONMENT


def why_no_environment(robot: RobotSpec) -> str:
    """Reason that there is no environment of this robot, and what to do."""
    robot = without_history(robot)
    if robot.task in TASKS:
        different = "; ".join(TASKS[robot.task].robot.differences(robot))
        return f"it is not the simulated robot of task {robot.task} (simulated, found): {different}"
    if is_gymnasium_id(robot.task):
        return f"if its module is to be imported, give --env {robot.task}"
    return "if there is one, name it with --env MODULE:CLASS"


def check_environment(name: str, robot: RobotSpec, origin: str) -> None:
    """Refuse a policy or log that is of another robot or task than an environment.

    Raises:
        UnknownNameError, UsageError: There is no such environment.
        SpecMismatchError: It is of another; names every difference.
    """
    different = get_robot(name).differences(without_history(robot))
    if different:
        own = environment_of(robot)
        remedy = "" if own == NO_ENVIRONMENT else f"; it is of {own}, leave out --env {name}"
        raise SpecMismatchError(f"{origin} does not fit {name} (environment, {origin}): {'; '.join(different)}{remedy}")
