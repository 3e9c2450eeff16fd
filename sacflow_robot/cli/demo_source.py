"""Demonstrations as commands name them: a path, or one of robomimic's public data sets."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sacflow_robot.cli import common
from sacflow_robot.data.agreement import AgreementOptions
from sacflow_robot.data.demos import DemoOptions, DemoSet
from sacflow_robot.errors import DataError, UsageError

if TYPE_CHECKING:
    from sacflow_robot.spec import ArmSpec


def locate(source: str) -> Path | str:
    """The file or folder that a source names, or its address on an object store; ``robomimic:task/kind`` is downloaded once, with a progress bar.

    Raises:
        UnknownNameError: There is no such data set.
        DataError: It cannot be downloaded.
    """
    from sacflow_robot.data.hub import fetch, parse_name
    from sacflow_robot.data.remote import is_url

    named = parse_name(source)
    if named is None:
        return source if is_url(source) else Path(source)
    with common.transfer_bar() as bar:
        row = bar.add_task(source, total=None, visible=False)
        return fetch(
            *named,
            common.cache_root() / "demos" / "robomimic",
            lambda present, total: bar.update(row, completed=present, total=total, visible=True),
        )


def options_for(task_name: str, trim_idle: bool, agreement: AgreementOptions) -> DemoOptions:
    """How to read demonstrations of a task or Gymnasium id; the simulator starts when a state has to be looked at.

    Raises:
        UnknownNameError: No such task.
    """
    from sacflow_robot.envs.tasks import get_arm, get_task, is_gymnasium_id

    if is_gymnasium_id(task_name):
        return DemoOptions(get_arm(task_name), task_name, None, trim_idle, sparse_rewards=False, agreement=agreement)
    task = get_task(task_name)
    if find_spec("robosuite") is None:
        return DemoOptions(task.arm, task.robosuite_name, None, trim_idle, agreement=agreement)
    env: Any = None

    def observe(state: Any) -> Any:
        nonlocal env
        from sacflow_robot.envs.robosuite_env import RobosuiteEnv

        env = env or RobosuiteEnv(task.name)
        return env.observe_state(state)

    return DemoOptions(task.arm, task.robosuite_name, observe, trim_idle, agreement=agreement)


def read(path: Path | str, task: str | None, trim_idle: bool, agreement: AgreementOptions) -> DemoSet:
    """Everything at a path, of the task that it names itself or, where it names none, the one given.

    Raises:
        UsageError: Neither names a task.
        DataError: It cannot be read, or is of a task that is not known here.
    """
    from sacflow_robot.data.sources import read_demos, recorded_arm
    from sacflow_robot.envs.tasks import TASKS, get_arm

    arm, env_name = recorded_arm(path)
    if task is not None:
        get_arm(task)
    elif arm is not None:
        return read_demos(path, DemoOptions(arm, arm.task, agreement=agreement))
    elif env_name is None:
        raise UsageError(f"{path} does not say which task it is of; give --env")
    else:
        task = next((each.name for each in TASKS.values() if each.robosuite_name == env_name), None)
        if task is None:
            known = ", ".join(sorted(each.robosuite_name for each in TASKS.values()))
            raise DataError(f"{path} holds demonstrations of {env_name!r}; tasks known here: {known}")
    return read_demos(path, options_for(task, trim_idle, agreement))


def describe_environment(demos: DemoSet) -> DemoSet:
    """The same with ``env_args`` and the simulator's model, where they are missing and the simulator can tell."""
    from dataclasses import replace

    if demos.env_args is not None and demos.model_files:
        return demos
    if not _is_simulated(demos.arm):
        demos.losses.leave_out("env_args", "model_file")
        demos.losses.remark(f"the simulator does not know task {demos.arm.task!r} of this arm")
        return demos
    try:
        from sacflow_robot.envs.robomimic import env_args, model_xml
        from sacflow_robot.envs.robosuite_env import RobosuiteEnv
    except ModuleNotFoundError:
        demos.losses.leave_out("env_args", "model_file")
        demos.losses.remark("they need the simulator: pip install 'sacflow-robot[sim]'")
        return demos
    models = demos.model_files
    if not models:
        env = RobosuiteEnv(demos.arm.task)
        models = [model_xml(env)] * len(demos.episodes)
        env.close()
    return replace(demos, env_args=demos.env_args or env_args(demos.arm.task), model_files=models)


def _is_simulated(arm: ArmSpec) -> bool:
    from sacflow_robot.envs.tasks import TASKS

    return arm.task in TASKS and not TASKS[arm.task].arm.differences(arm)
