"""Choice of the code that steps a simulated robot: robosuite's own, or the compiled step."""

from __future__ import annotations

import importlib.util
import logging

from sacflow_robot.envs.tasks import TASKS, is_gymnasium_id
from sacflow_robot.spec import Engine

_log = logging.getLogger(__name__)


def usable_engine(task: str, wanted: Engine) -> Engine:
    """The wanted engine, or ``stock`` with one line in the log saying why where the compiled one does not cover a task.

    Raises:
        ModuleNotFoundError: The simulator is not installed.
    """
    if ":" in task and task not in TASKS:
        return "stock"  # an environment of one's own has no compiled step, and needs no warning
    for module in ("gymnasium",) if is_gymnasium_id(task) else ("gymnasium", "mujoco", "robosuite"):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    if wanted == "compiled" and task not in TASKS:
        return fall_back(task, "it is of robosuite's tasks only")
    return wanted


def fall_back(task: str, why: str) -> Engine:
    """Log that a task is stepped by the stock engine, and why; returns it."""
    _log.warning("%s is stepped by the stock engine: the compiled one does not cover it (%s)", task, why)
    return "stock"
