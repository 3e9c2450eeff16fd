"""The task table, one row per simulated task, and the choice of the code that steps one."""

import importlib.util
import logging
import re
from dataclasses import dataclass, replace

from sacflow_robot.errors import UnknownNameError
from sacflow_robot.spec import ArraySpec, Engine, RobotSpec

CONTROL_RATE_HZ = 20.0

# What an action of 1 commands per control period: robosuite's OSC_POSE output_max.
METERS_PER_ACTION, RADIANS_PER_ACTION = 0.05, 0.5

_OSC_POSE_NAMES = ("x", "y", "z", "rx", "ry", "rz", "gripper")
_OSC_POSE_UNITS = (f"{METERS_PER_ACTION} m",) * 3 + (f"{RADIANS_PER_ACTION} rad",) * 3 + ("closing",)
_OBJECT = ArraySpec("object", (), "m, unit quaternion xyzw", "world")


@dataclass(frozen=True)
class Task:
    """One simulated task."""

    name: str  # its name on the command line
    robosuite_name: str  # robosuite's name of it
    horizon: int  # steps after which an episode is truncated
    object_size: int  # length of the observation ``object``: robosuite's (and robomimic's) ``object-state`` of the task
    object_quaternions: tuple[int, ...]  # indices in ``object`` at which a quaternion starts
    # bodies without a joint, which an episode's start places in the model itself; their poses are part of the simulator
    # state
    placed_bodies: tuple[str, ...] = ()
    object_positions: tuple[int, ...] = ()  # indices in ``object`` at which a position in the world starts
    # indices, in the same order, at which the position of the same object from the gripper starts
    object_from_grip: tuple[int, ...] = ()

    @property
    def robot(self) -> RobotSpec:
        """Panda under OSC_POSE delta control: translation in meters and rotation vector in radians, base axes."""
        return RobotSpec(
            robot="Panda",
            task=self.name,
            controller="OSC_POSE delta",
            control_rate_hz=CONTROL_RATE_HZ,
            observations=(
                ArraySpec("robot0_eef_pos", (3,), "m", "world"),
                ArraySpec("robot0_eef_quat", (4,), "unit quaternion xyzw", "world", quaternions=(0,)),
                ArraySpec("robot0_gripper_qpos", (2,), "m"),
                replace(_OBJECT, shape=(self.object_size,), quaternions=self.object_quaternions),
            ),
            action_names=_OSC_POSE_NAMES,
            action_units=_OSC_POSE_UNITS,
            action_low=(-1.0,) * 7,
            action_high=(1.0,) * 7,
        )


_TASKS = (
    Task("lift", "Lift", 300, 10, (3,), object_positions=(0,), object_from_grip=(7,)),
    Task("stack", "Stack", 300, 23, (3, 10), object_positions=(0, 7), object_from_grip=(17, 20)),
    Task("can", "PickPlaceCan", 300, 14, (3, 10), object_positions=(7,)),
    Task("square", "NutAssemblySquare", 400, 14, (3, 10), object_positions=(7,)),
    Task("door", "Door", 300, 14, (), ("Door_main",), object_positions=(0, 3), object_from_grip=(7, 10)),
)
TASKS = {task.name: task for task in _TASKS}


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UnknownNameError: There is no such task.
    """
    if name not in TASKS:
        raise UnknownNameError("task", name, TASKS)
    return TASKS[name]


def is_gymnasium_id(name: str) -> bool:
    """True for a name that is not a task's and looks like Gymnasium's: ``HalfCheetah-v5``, ``my_module:MyArm-v0``."""
    return name not in TASKS and re.fullmatch(r"([\w.]+:)?([\w-]+/)?[\w.-]+-v\d+", name) is not None


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
