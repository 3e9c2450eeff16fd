"""What fails, ends or does not return: that it is said, and that the arm goes no further."""

import time
from typing import Any

import numpy as np
import pytest

from sacflow_robot.errors import RobotError, StaleStateError, StoppedError
from sacflow_robot.robot.drivers.lerobot import LeRobotDriver
from sacflow_robot.robot.drivers.registry import make_robot
from tests.robot.drivers.lerobot.stand_in import NAMES, StandIn, soon
from tests.robot.drivers.waiting import eventually

pytestmark = pytest.mark.realtime


def test_a_lost_or_stuck_bus_is_said(robot: LeRobotDriver) -> None:
    robot.begin(0)
    StandIn.made[-1].stuck = True
    time.sleep(0.6)
    with pytest.raises(StaleStateError, match="s ago; is its bus stuck"):
        robot.observe()
    StandIn.made[-1].broken, StandIn.made[-1].stuck = True, False
    assert eventually(lambda: bool(robot._error))
    with pytest.raises(RobotError, match="robot is lost: There is no status packet"):
        robot.observe()


@pytest.mark.parametrize("error", [ConnectionError("camera unplugged"), SystemExit("camera unplugged")])
def test_when_a_reading_fails_the_arm_goes_no_further(
    robot: LeRobotDriver, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """A motor goes to its last goal, whatever becomes of the camera: nothing but another goal stops it."""

    def unplugged(self: StandIn) -> dict[str, Any]:
        raise error

    robot.begin(0)
    robot.command(np.ones(3, np.float32), soon())
    stand_in = StandIn.made[-1]
    assert eventually(lambda: stand_in.positions["shoulder.pos"] > 20)
    monkeypatch.setattr(StandIn, "get_observation", unplugged)
    assert eventually(lambda: stand_in.sent[-1]["shoulder.pos"] < 100)
    sent, at = len(stand_in.sent), stand_in.sent[-1]
    assert eventually(lambda: len(stand_in.sent) > sent + 5) and stand_in.sent[-1] == at, "it is kept there"
    for call in (robot.observe, lambda: robot.command(np.ones(3, np.float32), soon())):
        with pytest.raises(RobotError, match="the robot is lost: camera unplugged; connect it again"):
            call()
    monkeypatch.undo()
    robot.hold()
    robot.stop()
    robot.connect()
    robot.begin(0)


def test_a_hold_that_cannot_be_sent_is_sent_again(robot: LeRobotDriver) -> None:
    robot.begin(0)
    robot.command(np.ones(3, np.float32), soon())
    stand_in = StandIn.made[-1]
    assert eventually(lambda: len(stand_in.sent) > 2)
    stand_in.deaf = True
    assert eventually(lambda: bool(robot._error))
    stand_in.deaf = False
    assert eventually(lambda: stand_in.sent[-1]["shoulder.pos"] < 100)


def test_hold_and_stop_work_in_any_state(name: str) -> None:
    robot = make_robot(name)

    def still_works() -> None:
        for _ in range(2):
            robot.hold()
            robot.stop()
        with pytest.raises(StoppedError):
            robot.command(np.ones(3, np.float32), soon())

    for call in (robot.observe, lambda: robot.command(np.ones(3, np.float32), soon())):
        with pytest.raises(RobotError, match="not connected"):
            call()
    still_works()
    robot.connect()
    still_works()
    robot.close()
    robot.close()
    still_works()
    robot.connect()
    robot.begin(0)
    robot.close()
    for call in (robot.observe, lambda: robot.command(np.ones(3, np.float32), soon())):
        with pytest.raises(RobotError, match="not connected"):
            call()
    assert StandIn.made[-1].sent == [], "nothing has moved"


def test_a_stop_while_connecting_is_not_undone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    robot = make_robot(name)
    plain = StandIn.connect

    def stopped_meanwhile(self: StandIn, calibrate: bool = True) -> None:
        plain(self, calibrate)
        robot.stop()

    with monkeypatch.context() as patch:
        patch.setattr(StandIn, "connect", stopped_meanwhile)
        with pytest.raises(StoppedError):
            robot.connect()
    with pytest.raises(StoppedError):
        robot.command(np.ones(3, np.float32), soon())
    robot.connect()
    robot.begin(0)
    robot.close()


def test_a_target_of_before_the_stop_is_not_gone_to(robot: LeRobotDriver) -> None:
    robot.begin(0)
    robot.command(np.ones(3, np.float32), soon())
    robot.stop()
    robot.close()
    robot.connect()
    stand_in = StandIn.made[-1]
    stand_in.positions = dict.fromkeys(NAMES, 40.0)  # moved by hand
    sent = len(stand_in.sent)
    time.sleep(0.05)
    robot.hold()
    time.sleep(0.05)
    assert len(stand_in.sent) == sent
    robot.command(np.array([0.5, 0.5, 0.5], np.float32), soon())
    assert eventually(lambda: stand_in.positions["shoulder.pos"] > 40)
    robot.hold()
    assert eventually(lambda: abs(stand_in.sent[-1]["shoulder.pos"] - stand_in.positions["shoulder.pos"]) < 2.1)


def test_a_thread_that_has_ended_is_found(robot: LeRobotDriver) -> None:
    robot.begin(0)
    robot._closing.set()
    assert robot._thread is not None
    robot._thread.join()
    for call in (robot.observe, lambda: robot.command(np.ones(3, np.float32), soon())):
        with pytest.raises(RobotError, match="the thread that keeps the robot standing has ended"):
            call()
    robot.hold()
    robot.stop()
    robot.connect()
    robot.begin(0)


def test_a_call_that_never_returns_keeps_nobody_waiting(robot: LeRobotDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sacflow_robot.robot.drivers.lerobot._END_WITHIN_S", 0.1)
    robot.begin(0)
    StandIn.made[-1].stuck = True
    time.sleep(0.05)
    robot.hold()
    robot.stop()
    robot.close()
    assert StandIn.made[-1].is_connected, "two calls at once could hurt more"
    with pytest.raises(RobotError, match="a call of lerobot has not returned"):
        robot.connect()
    StandIn.made[-1].stuck = False
    robot.connect()
    robot.begin(0)
