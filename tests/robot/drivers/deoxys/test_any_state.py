"""Hold, stop and connect in any state of the driver, more than once."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from sacflow_robot.errors import RobotError, RobotFaultError, StoppedError
from sacflow_robot.robot.conformance import check_robot
from sacflow_robot.robot.drivers.deoxys.config import DeoxysConfig
from sacflow_robot.robot.drivers.deoxys.driver import DeoxysRobot
from tests.robot.drivers.waiting import in_s

from .bare_arm import BareArm, Source  # isort: skip

pytestmark = pytest.mark.realtime

UP = np.array([0, 0, 1, 0, 0, 0, 0], np.float32)


def test_the_conformance_kit_with_an_arm_that_falls_silent(
    config: DeoxysConfig, bare_arm: BareArm, source: Source
) -> None:
    check_robot(
        lambda: DeoxysRobot(replace(config, objects="", reset=""), source),
        lose=lambda robot: setattr(bare_arm, "publishing", False),
    )


def test_hold_and_stop_work_in_any_state(config: DeoxysConfig, bare_arm: BareArm, source: Source) -> None:
    def still_works() -> None:
        for _ in range(2):
            robot.hold()
            robot.stop()
        with pytest.raises(StoppedError):
            robot.command(UP, in_s(1))

    robot = DeoxysRobot(replace(config, objects="", reset=""), source)
    still_works()
    bare_arm.mode = 5  # the user stop is pressed
    with pytest.raises(RobotFaultError, match="not ready"):
        robot.connect()
    still_works()
    bare_arm.mode = 1
    robot.connect()
    still_works()
    robot.close()
    still_works()
    robot.connect()
    robot.begin(0)
    robot.close()
    for call in (robot.observe, lambda: robot.command(UP, in_s(1)), lambda: robot.begin(0)):
        with pytest.raises(RobotError, match="not connected"):
            call()
    assert bare_arm.goals() == [], "nothing has moved"


def test_a_stop_while_connecting_is_not_undone(config: DeoxysConfig, bare_arm: BareArm, source: Source) -> None:
    robot = DeoxysRobot(replace(config, objects="", reset=""), source)
    robot.connect()
    stopping = threading.Timer(0.05, robot.stop)
    stopping.start()
    with pytest.raises(StoppedError):
        robot.connect()
    with pytest.raises(StoppedError):
        robot.command(UP, in_s(1))
    robot.connect()
    robot.begin(0)
    robot.close()
    assert bare_arm.goals() == []


def test_no_command_is_taken_after_a_failed_connect(config: DeoxysConfig, bare_arm: BareArm, source: Source) -> None:
    bare_arm.mode = 4
    robot = DeoxysRobot(replace(config, objects="", reset=""), source)
    with pytest.raises(RobotFaultError, match="a reflex"):
        robot.connect()
    for call in (robot.observe, lambda: robot.command(UP, in_s(1)), lambda: robot.begin(0)):
        with pytest.raises(RobotError, match="the last attempt failed"):
            call()
    robot.close()
    assert bare_arm.goals() == []


def test_a_stop_ends_a_gripper_that_moves_and_no_other(robot: DeoxysRobot, bare_arm: BareArm) -> None:
    def stop_sends(gripper: float, width: float, *, grasped: bool) -> bool:
        bare_arm.grasped = grasped
        if gripper:
            robot.command(np.array([0, 0, 0, 0, 0, 0, gripper], np.float32), in_s(0.05))
        bare_arm.width = width
        time.sleep(0.05)
        before = bare_arm.gripper_commands.count("FrankaGripperStopMessage")
        robot.stop()
        time.sleep(0.05)
        sent = bare_arm.gripper_commands.count("FrankaGripperStopMessage") > before
        robot.connect()
        robot.begin(0)
        return sent

    assert not stop_sends(0.0, 0.08, grasped=False), "it was told nothing"
    assert stop_sends(1.0, 0.08, grasped=False), "told to close, and not begun"
    assert not stop_sends(1.0, 0.08, grasped=True), "it holds something"
