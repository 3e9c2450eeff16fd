"""Arm drivers by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sacflow_robot.errors import UnknownNameError, UsageError
from sacflow_robot.spec import Engine, Robot


def _sim(task: str, engine: Engine = "compiled") -> Robot:
    try:
        from sacflow_robot.robot.sim import SimRobot
    except ImportError as error:
        raise UsageError(
            f"the simulator is not installed ({error}); install it with pip install 'sacflow-robot[sim]'"
        ) from None
    return SimRobot(task, engine)


DRIVERS: dict[str, Callable[[str], Robot]] = {"sim": _sim}


def make_robot(name: str, engine: Engine = "compiled") -> Robot:
    """The arm that a name such as ``sim:lift`` stands for: a driver, a colon, and what the driver takes.

    ``engine`` is what steps it if it is simulated.

    Raises:
        UnknownNameError: No such driver.
    """
    return find_driver(name, engine)()


def find_driver(name: str, engine: Engine = "compiled") -> Callable[[], Robot]:
    """What makes the arm of that name, found without making it.

    Raises:
        UnknownNameError: No such driver.
    """
    driver, _, argument = name.partition(":")
    if driver not in DRIVERS:
        raise UnknownNameError("robot driver", driver, [f"{d}:..." for d in DRIVERS])
    if DRIVERS[driver] is _sim:
        return partial(_sim, argument, engine)
    return partial(DRIVERS[driver], argument)
