"""What ``observe`` returns or raises, for those who wait for it."""

from sacflow_robot.errors import RobotError
from sacflow_robot.robot.drivers.deoxys.driver import DeoxysRobot
from tests.robot.drivers.waiting import eventually


def raised(robot: DeoxysRobot, within_s: float = 5.0) -> str:
    """What ``observe`` raises, within that time."""
    said: list[str] = []

    def failed() -> bool:
        try:
            robot.observe()
        except RobotError as error:
            said.append(str(error))
        return bool(said)

    assert eventually(failed, within_s), "observe raised nothing"
    return said[0]


def observed_ns(robot: DeoxysRobot) -> int | None:
    try:
        return robot.observe().time_ns
    except RobotError:
        return None
