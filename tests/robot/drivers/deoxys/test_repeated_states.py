"""States and sightings that must not be taken for new ones."""

import threading
import time

import numpy as np
import pytest

from sacflow_robot.errors import RobotFaultError, StaleStateError
from sacflow_robot.robot.drivers.deoxys.driver import DeoxysRobot
from tests.robot.drivers.waiting import eventually, in_s

from .bare_arm import BareArm, Source  # isort: skip
from .observing import observed_ns, raised  # isort: skip

pytestmark = pytest.mark.realtime

UP = np.array([0, 0, 1, 0, 0, 0, 0], np.float32)


def test_a_frame_that_repeats_is_as_old_as_it_is(robot: DeoxysRobot, bare_arm: BareArm) -> None:
    bare_arm.counting = False
    time.sleep(0.03)
    frame, first = bare_arm.frame, robot.observe().time_ns
    bare_arm.position = np.array([0.6, 0.0, 0.4])
    time.sleep(0.2)
    again = robot.observe()
    assert again.time_ns == first and again.stale_reason == f"the state messages repeat frame {frame}"
    with pytest.raises(StaleStateError, match=f"arm state is 0.* s old.*: the state messages repeat frame {frame}"):
        time.sleep(0.4)
        robot.observe()
    bare_arm.counting = True
    assert eventually(lambda: (observed_ns(robot) or 0) > (first or 0))
    assert robot.observe().stale_reason == ""


def test_a_time_that_repeats_is_no_new_state_while_the_arm_is_controlled(robot: DeoxysRobot, bare_arm: BareArm) -> None:
    """deoxys counts the frames that it publishes, and not those in which it has read the arm."""
    bare_arm.reading = False
    time.sleep(0.7)
    assert time.monotonic_ns() - (robot.observe().time_ns or 0) < 10**8, "it reads no arm that nobody controls"
    robot.command(UP, in_s(0.1))
    engaged = time.monotonic_ns()
    time.sleep(0.3)
    seen = robot.observe()
    assert abs((seen.time_ns or 0) - engaged) < 3e7
    assert seen.stale_reason.startswith("the state messages repeat the arm's time 5.")
    bare_arm.reading = True
    assert eventually(lambda: (observed_ns(robot) or 0) > engaged + 10**8)


def test_a_frame_that_runs_backward_is_a_restart(robot: DeoxysRobot, bare_arm: BareArm) -> None:
    robot.command(UP, in_s(0.1))
    assert eventually(lambda: len(bare_arm.goals()) > 0)
    bare_arm.frame = 0
    with pytest.raises(RobotFaultError, match=r"began anew \(frame \d+, then 1\), so deoxys was restarted; connect it"):
        eventually(lambda: robot.observe() is None)
    time.sleep(0.05)
    heard = len(bare_arm.goals())
    time.sleep(0.15)
    assert len(bare_arm.goals()) == heard, "a controller that was started anew is not engaged"
    robot.hold()
    robot.stop()
    robot.connect()
    robot.begin(0)


def test_a_restart_while_connecting_is_none(robot: DeoxysRobot, bare_arm: BareArm) -> None:
    """After a stop, deoxys's program ends, and is started anew a second later."""
    robot.stop()
    bare_arm.frame, bare_arm.publishing = 0, False
    threading.Timer(0.3, setattr, (bare_arm, "publishing", True)).start()
    robot.connect()
    robot.begin(0)


def test_a_silent_arm_is_told_from_one_that_repeats(robot: DeoxysRobot, bare_arm: BareArm) -> None:
    bare_arm.publishing = False
    assert "no newer arm state came; is deoxys running on 127.0.0.1" in raised(robot)


def test_objects_that_are_not_seen_anew_are_as_old_as_they_are(robot: DeoxysRobot, source: Source) -> None:
    source.frame = 7
    time.sleep(0.05)
    first = robot.observe().time_ns
    time.sleep(0.2)
    again = robot.observe()
    assert again.time_ns == first and again.stale_reason == "the object source repeats frame 7"
    source.counting = True
    assert eventually(lambda: (observed_ns(robot) or 0) > (first or 0) + 10**8)
    source.frame = 2
    assert "the object source began anew (frame" in raised(robot)
    robot.observe()
    source.stamp_ns, source.frame, source.counting = time.monotonic_ns(), 1, False
    time.sleep(0.2)
    assert robot.observe().stale_reason == "the object source repeats its capture time"
    source.stamp_ns -= 10**9
    assert "the capture times of the object source run backward" in raised(robot)


def test_poses_that_are_refused_are_named(robot: DeoxysRobot, bare_arm: BareArm) -> None:
    bare_arm.position = np.array([np.nan, 0, 0])
    assert "messages refused: an arm state whose O_T_EE is not 16 finite numbers" in raised(robot)
