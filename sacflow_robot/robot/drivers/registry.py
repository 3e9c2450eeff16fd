"""Robot drivers by name: ``DRIVER:SUBJECT?OPTION=VALUE&OPTION=VALUE``, e.g. ``sim:lift`` or ``rtsim:lift?obs_delay_ms=40``.

A driver is a function that takes the subject (a task, a file, an address: whatever it needs most) and the options, and
returns a ``Robot`` that is not connected yet. One's own needs no package: ``my_module:make_my_arm``, or a file,
``path/to/driver.py:make_my_arm``, with ``:SUBJECT?OPTION=VALUE`` behind it where it takes them. Other packages add theirs by
an entry point in the group ``sacflow_robot.robots``:

    [project.entry-points."sacflow_robot.robots"]
    myarm = "my_package.my_module:make_my_arm"
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import cast

from sacflow_robot.errors import SacflowError, UnknownNameError, UsageError, one_line
from sacflow_robot.interfaces import Robot
from sacflow_robot.robot.drivers.options import Options, check_options, engine_option, split_name
from sacflow_robot.robot.drivers.wrappers import HistoryRobot
from sacflow_robot.spec import Engine
from sacflow_robot.utils.plugins import has_module, load_object

GROUP = "sacflow_robot.robots"

Driver = Callable[[str, Options], Robot]

# As in pyproject.toml; here as well, so that a tree that is not installed works.
DRIVERS: dict[str, str | Driver] = {
    "sim": "sacflow_robot.robot.drivers.registry:make_sim",
    "rtsim": "sacflow_robot.robot.drivers.registry:make_rtsim",
    "deoxys": "sacflow_robot.robot.drivers.deoxys.driver:make_deoxys",
    "lerobot": "sacflow_robot.robot.drivers.lerobot:make_lerobot",
}
_WITH_ENGINE = "sim", "rtsim"
_OF_A_ROBOT = "spec", "lockstep", "clock", "connect", "begin", "observe", "command", "hold", "stop", "close"


def make_robot(name: str, engine: Engine = "compiled") -> Robot:
    """The robot that a name such as ``sim:lift`` stands for, not connected yet.

    ``engine`` is what steps it if it is simulated, and its name does not say.
    """
    return find_driver(name, engine)()


def find_driver(name: str, engine: Engine = "compiled") -> Callable[[], Robot]:
    """Find the function that makes the robot of that name.

    Raises:
        UnknownNameError: There is no such driver.
        UsageError: The driver cannot be loaded, or the options cannot be read.
    """
    driver, subject, options = split_name(name)
    found = _known(driver)
    if found is None:
        found, driver, subject = _own(name, driver, subject)
    if driver in _WITH_ENGINE:
        options.setdefault("engine", engine)
    history = options.pop("history", "0")
    if not history.isdigit() or int(history) > 100:
        raise UsageError(f"robot {name!r}: history is {history!r}, expected a number of actions from 0 to 100")
    return partial(_make, found, subject, options, int(history))


def _make(driver: Driver, subject: str, options: Options, history: int) -> Robot:
    robot = driver(subject, options)
    return cast(Robot, HistoryRobot(robot, history)) if history else robot


def check_is_robot(robot: object) -> None:
    """Refuse what a driver made if it is not a ``Robot``, before anything moves.

    Raises:
        UsageError: It lacks parts of the protocol; the message names them all.
    """
    lacking = [name for name in _OF_A_ROBOT if not hasattr(robot, name)]
    if lacking:
        raise UsageError(
            f"the driver made {type(robot).__name__}, which is not a robot: it lacks {', '.join(lacking)}; see "
            f"sacflow_robot.interfaces.Robot"
        )


def _known(driver: str) -> Driver | None:
    """The driver of that name, of this package's or of another that is installed."""
    found: str | Driver | None = DRIVERS.get(driver)
    if found is None:
        found = next((point.value for point in entry_points(group=GROUP) if point.name == driver), None)
    if not isinstance(found, str):
        return found
    module, _, function = found.partition(":")
    try:
        made: Driver = getattr(import_module(module), function)
    except SacflowError:
        raise
    except (ImportError, AttributeError) as error:
        raise UsageError(f"robot driver {driver!r} cannot be loaded from {found}: {one_line(error)}") from None
    return made


def _own(name: str, module: str, rest: str) -> tuple[Driver, str, str]:
    """A driver of the user's own, ``MODULE:FUNCTION[:SUBJECT]``; returns it, its name and the subject."""
    if not has_module(module):
        known = {*DRIVERS, *(point.name for point in entry_points(group=GROUP))}
        raise UnknownNameError(
            "robot driver",
            module,
            [*(f"{driver}:..." for driver in known), "your own as MODULE:FUNCTION or FILE.py:FUNCTION"],
        )
    function, _, subject = rest.partition(":")
    made = load_object(f"{module}:{function}", "robot driver")
    if not callable(made):
        raise UsageError(f"robot {name!r}: {module}:{function} is not a function that makes a robot")

    def make(subject: str, options: Options) -> Robot:
        try:
            robot: Robot = made(subject, options)
        except SacflowError:
            raise
        except Exception as error:  # whatever the user's code raises
            raise UsageError(f"robot {name!r} cannot be made: {type(error).__name__}: {one_line(error)}") from None
        check_is_robot(robot)
        return robot

    return make, f"{module}:{function}", subject


def make_sim(task: str, options: Options) -> Robot:
    """``sim:TASK``, in lockstep; also a Gymnasium id, or an environment ``MODULE:CLASS``. Options: ``engine`` (compiled, stock); ``speed``, at most so many times real time."""
    check_options("sim", options, ["engine", "speed"])
    try:
        speed = float(options.get("speed", 0))
    except ValueError:
        raise UsageError(f"sim: speed is {options['speed']!r}, expected a number") from None
    try:
        from sacflow_robot.robot.drivers.sim import SimRobot

        return SimRobot(task, engine_option(options), speed)
    except ImportError as error:
        raise no_simulator(error) from None


def make_rtsim(task: str, options: Options) -> Robot:
    """``rtsim:TASK``, on a clock of its own. Options: see ``sacflow_robot.robot.drivers.rtsim_options.RtsimOptions``, and ``clock``, ``engine``."""
    from sacflow_robot.robot.drivers.rtsim_options import read_options

    for module in ("gymnasium", "mujoco", "robosuite"):  # which a process imports that could only say so by itself
        if find_spec(module) is None:
            raise no_simulator(ModuleNotFoundError(f"No module named {module!r}"))
    from sacflow_robot.robot.drivers.rtsim import ProcessRobot, VirtualRobot

    clock, engine, link = read_options(options)
    return VirtualRobot(task, link, engine) if clock == "virtual" else ProcessRobot(task, link, engine)


def no_simulator(error: ImportError) -> UsageError:
    return UsageError(f"the simulator is not installed ({error}); install it with pip install 'sacflow-robot[sim]'")
