"""Environments by name: a robosuite task, a Gymnasium id, or one's own as ``MODULE:CLASS``; and robots that have none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from sacflow_robot.envs.tasks import TASKS, is_gymnasium_id
from sacflow_robot.episode import StepResult
from sacflow_robot.errors import SacflowError, SpecMismatchError, UsageError, one_line
from sacflow_robot.spec import NO_ENVIRONMENT, Engine, FloatArray, RobotSpec
from sacflow_robot.utils.action_history import KEY, push, robot_with_history, start_history, without_history

if TYPE_CHECKING:
    from sacflow_robot.envs.gymnasium_env import GymnasiumEnv
    from sacflow_robot.envs.robosuite_env import RobosuiteEnv


class Environment(Protocol):
    """What a simulated robot of one's own has to offer, to be named as ``--env MODULE:CLASS``.

    The class, or a function, is called without arguments. One object runs one episode at a time; training and evaluation
    make several, in processes of their own. An episode must depend on its seed and the actions alone.
    """

    @property
    def robot(self) -> RobotSpec:
        """What it observes and accepts."""
        ...

    def begin(self, seed: int) -> StepResult:
        """Start the episode that this seed decides; returns its first observation."""
        ...

    def command(self, action: FloatArray) -> StepResult:
        """Execute one action (A,) for one control period; returns what came of it."""
        ...


class UserEnv:
    """An environment of the user's own, its answers checked.

    Args:
        name: ``MODULE:CLASS`` or ``FILE.py:CLASS``.

    Raises:
        UsageError: It cannot be loaded or made, or is no environment.
    """

    engine: Engine = "stock"

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

    @property
    def robot(self) -> RobotSpec:
        robot: RobotSpec = self._env.robot
        return robot

    def begin(self, seed: int) -> StepResult:
        """Start the episode that this seed decides."""
        return self._checked(self._env.begin(seed))

    def command(self, action: FloatArray) -> StepResult:
        """Execute one action (A,)."""
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


class HistoryEnv:
    """An environment that observes its last actions too.

    Args:
        env: The environment.
        length: How many.
    """

    def __init__(self, env: GymnasiumEnv | UserEnv | RobosuiteEnv, length: int) -> None:
        self._env, self._length = env, length
        self.robot, self.engine = robot_with_history(env.robot, length), env.engine

    def begin(self, seed: int) -> StepResult:
        """Start the episode that this seed decides; its history is zeros."""
        self._history = start_history(self.robot, self._length)
        return self._with(self._env.begin(seed))

    def command(self, action: FloatArray) -> StepResult:
        """Execute one action (A,)."""
        result = self._env.command(action)
        self._history = push(self._history, self.robot.check_action(action))
        return self._with(result)

    def close(self) -> None:
        self._env.close()

    def _with(self, result: StepResult) -> StepResult:
        from dataclasses import replace

        return replace(result, observation={**result.observation, KEY: self._history})


class NoRobots:
    """``VectorEnv`` of a robot that has no environment here: they say what it is, and none can be moved."""

    def __init__(self, spec: RobotSpec) -> None:
        self._spec = spec

    @property
    def spec(self) -> RobotSpec:
        return self._spec

    @property
    def engine(self) -> Engine:
        return "stock"

    def __len__(self) -> int:
        return 0

    def begin(self, starts: Mapping[int, int]) -> dict[int, StepResult]:
        """Start nothing; any start is refused."""
        return {} if not starts else self._refuse()

    def send(self, chunks: Mapping[int, FloatArray]) -> None:
        """Send nothing; any chunk is refused."""
        if chunks:
            self._refuse()

    def receive(self) -> dict[int, list[StepResult]]:
        """Nothing was sent."""
        return {}

    def close(self) -> None:
        """Nothing to give back."""

    def _refuse(self) -> NoReturn:
        raise UsageError(f"there is no environment of {self._spec.robot}, {self._spec.task}, to move a robot in")


def make_environment(name: str, engine: Engine = "compiled") -> RobosuiteEnv | GymnasiumEnv | UserEnv:
    """One simulated robot, in this process.

    Args:
        name: Task, Gymnasium id, or ``MODULE:CLASS``.
        engine: What steps a robosuite task.

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


def is_user_environment(name: str) -> bool:
    """Whether a name is ``MODULE:CLASS`` or ``FILE.py:CLASS``."""
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
    """Why there is none of this robot, in words that say what to do."""
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
    from sacflow_robot.envs.tasks import get_robot

    different = get_robot(name).differences(without_history(robot))
    if different:
        own = environment_of(robot)
        remedy = "" if own == NO_ENVIRONMENT else f"; it is of {own}, leave out --env {name}"
        raise SpecMismatchError(f"{origin} does not fit {name} (environment, {origin}): {'; '.join(different)}{remedy}")
