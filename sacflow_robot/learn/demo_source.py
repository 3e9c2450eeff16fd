"""Demonstrations by name: a path, an address, or one of robomimic's public data sets; and the robot that they are of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sacflow_robot.data.formats.agreement import AgreementOptions
from sacflow_robot.data.formats.demonstrations import DemoOptions, DemoSet
from sacflow_robot.errors import DataError, UsageError
from sacflow_robot.utils.caches import cache_root
from sacflow_robot.utils.console import transfer_bar

if TYPE_CHECKING:
    from sacflow_robot.spec import RobotSpec


def locate(source: str) -> Path | str:
    """The path or address that a source names; ``robomimic:task/kind`` is downloaded once, with a progress bar.

    Raises:
        UnknownNameError: There is no such data set.
        DataError: It cannot be downloaded.
    """
    from sacflow_robot.data.log.remote import is_url
    from sacflow_robot.data.robomimic_download import fetch, parse_name

    named = parse_name(source)
    if named is None:
        return source if is_url(source) else Path(source)
    with transfer_bar() as bar:
        row = bar.add_task(source, total=None, visible=False)
        return fetch(
            *named,
            cache_root() / "demos" / "robomimic",
            lambda present, total: bar.update(row, completed=present, total=total, visible=True),
        )


class Recorded(NamedTuple):
    """Environment and history that demonstrations and logs name; None and 0 where they name none.

    Attributes:
        env: Environment that they are of, ``"none"`` for a robot that has none here.
        history: How many of its last actions the robot observed.
    """

    env: str | None = None
    history: int = 0


def what_recorded(sources: Sequence[str]) -> Recorded:
    """Environment and history of the first source that names one; ``auto`` and ``none`` do not.

    Raises:
        DataError: One cannot be read.
    """
    from sacflow_robot.data.formats.sources import describe, kind_of, recorded_robot
    from sacflow_robot.data.robomimic_download import parse_name
    from sacflow_robot.envs.registry import environment_of
    from sacflow_robot.envs.tasks import TASKS
    from sacflow_robot.spec import NO_ENVIRONMENT
    from sacflow_robot.utils.action_history import history_of

    for source in sources:
        if source in ("auto", "none"):
            continue
        named = parse_name(source)
        if named is not None:
            return Recorded(named[0])
        robot, env_name = recorded_robot(locate(source))
        if robot is not None:
            return Recorded(environment_of(robot), history_of(robot))
        known = next((task.name for task in TASKS.values() if task.robosuite_name == env_name), None)
        if known is not None:
            return Recorded(known)
        path = locate(source)
        if describe(path).has_observations and (env_name is not None or kind_of(path) != "hdf5"):
            return Recorded(NO_ENVIRONMENT)
    return Recorded()


def recorded_robot(sources: Sequence[str], rate_hz: float | None = None) -> RobotSpec:
    """The robot that sources are of; see :func:`sacflow_robot.data.formats.sources.common_robot`."""
    from sacflow_robot.data.formats.sources import common_robot

    return common_robot([locate(source) for source in sources], rate_hz)


def options_for(
    task_name: str, trim_idle: bool, agreement: AgreementOptions, robot: RobotSpec | None = None
) -> DemoOptions:
    """Options to read demonstrations of an environment; the simulator starts when observations must be regenerated.

    Args:
        task_name: Task, Gymnasium id, or environment of one's own.
        trim_idle: Drop the idle steps of raw robosuite demonstrations.
        agreement: What the user vouches for.
        robot: The robot of a run without an environment.

    Raises:
        UnknownNameError: No such task.
        UsageError: The environment cannot be made.
    """
    from sacflow_robot.envs.registry import get_robot
    from sacflow_robot.envs.tasks import TASKS, get_task
    from sacflow_robot.utils.action_history import without_history

    if robot is not None:
        fits = without_history(robot)
        return DemoOptions(fits, robot.task, None, trim_idle, sparse_rewards=False, agreement=agreement)
    if task_name not in TASKS:
        return DemoOptions(get_robot(task_name), task_name, None, trim_idle, sparse_rewards=False, agreement=agreement)
    task = get_task(task_name)
    if find_spec("robosuite") is None:
        return DemoOptions(task.robot, task.robosuite_name, None, trim_idle, agreement=agreement)
    env: Any = None

    def observe(state: Any) -> Any:
        nonlocal env
        from sacflow_robot.envs.robosuite_env import RobosuiteEnv

        env = env or RobosuiteEnv(task.name)
        return env.observe_state(state)

    return DemoOptions(task.robot, task.robosuite_name, observe, trim_idle, agreement=agreement)


def read(path: Path | str, task: str | None, trim_idle: bool, agreement: AgreementOptions) -> DemoSet:
    """Everything at a path, of the task given, else of the one that it names itself, else of whatever robot it is of.

    Raises:
        UsageError: It does not say enough.
        DataError: It cannot be read.
    """
    from sacflow_robot.data.formats.sources import demo_spec, describe, read_demos, recorded_robot
    from sacflow_robot.envs.registry import get_robot
    from sacflow_robot.envs.tasks import TASKS

    agreement.check_options()
    robot, env_name = recorded_robot(path)
    if task is not None:
        get_robot(task)
    elif robot is None:
        task = next((each.name for each in TASKS.values() if each.robosuite_name == env_name), None)
    if task is not None:
        return read_demos(path, options_for(task, trim_idle, agreement))
    if robot is None and not describe(path).has_observations:
        if env_name is None:
            raise UsageError(f"{path} does not say which task it is of; give --env")
        known = ", ".join(sorted(each.robosuite_name for each in TASKS.values()))
        raise DataError(
            f"{path} holds states, not observations, of demonstrations of {env_name!r}; tasks known here: {known}"
        )
    robot = robot or demo_spec(path, agreement.rate)
    return read_demos(path, DemoOptions(robot, env_name or robot.task, sparse_rewards=False, agreement=agreement))


def describe_environment(demos: DemoSet) -> DemoSet:
    """The same with ``env_args`` and the simulator's model, where they are missing and the simulator can tell."""
    if demos.env_args is not None and demos.model_files:
        return demos
    if not _is_simulated(demos.robot):
        demos.losses.leave_out("env_args", "model_file")
        demos.losses.remark(f"the simulator does not know task {demos.robot.task!r} of this robot")
        return demos
    try:
        from sacflow_robot.envs.robomimic_metadata import env_args, model_xml
        from sacflow_robot.envs.robosuite_env import RobosuiteEnv
    except ModuleNotFoundError:
        demos.losses.leave_out("env_args", "model_file")
        demos.losses.remark("they need the simulator: pip install 'sacflow-robot[sim]'")
        return demos
    models = demos.model_files
    if not models:
        env = RobosuiteEnv(demos.robot.task)
        models = [model_xml(env)] * len(demos.episodes)
        env.close()
    return replace(demos, env_args=demos.env_args or env_args(demos.robot.task), model_files=models)


def _is_simulated(robot: RobotSpec) -> bool:
    from sacflow_robot.envs.tasks import TASKS

    return robot.task in TASKS and not TASKS[robot.task].robot.differences(robot)
