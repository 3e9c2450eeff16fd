"""The driver's threads, and the states that it must not take for new ones, against an arm's side without a simulator."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.errors import RobotError, RobotFaultError, StaleStateError, StoppedError
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.robot.conformance import check_robot
from sacflow_robot.robot.control.run_config import RunConfig
from sacflow_robot.robot.control.session import run_episode
from sacflow_robot.robot.drivers.deoxys.config import DeoxysConfig
from sacflow_robot.robot.drivers.deoxys.driver import DeoxysRobot
from sacflow_robot.robot.drivers.deoxys.objects import Sighting
from sacflow_robot.spec import FloatArray, Observation

from .bare_arm import BareArm  # isort: skip

pytestmark = pytest.mark.realtime

UP = np.array([0, 0, 1, 0, 0, 0, 0], np.float32)
STILL = (True, [0.0] * 6)


class Source:
    """An object source that does what a test has it do."""

    def __init__(self) -> None:
        self.frame, self.counting, self.stamp_ns = 1, False, 0
        self.act: Callable[[], object] = lambda: None

    def __call__(self) -> Sighting:
        made = self.act()
        if made is not None:
            return made  # type: ignore[return-value]
        self.frame += self.counting
        frame = self.frame if self.frame > 1 else -1
        return Sighting(
            {"cube": np.array([0.5, 0, 0, 0, 0, 0, 1.0])}, self.stamp_ns or time.monotonic_ns(), frame=frame
        )


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def robot(config: DeoxysConfig, bare_arm: BareArm, source: Source) -> Iterator[DeoxysRobot]:
    made = DeoxysRobot(replace(config, objects="", reset=""), source)
    made.connect()
    made.begin(0)
    yield made
    source.act = lambda: None
    made.close()


def in_s(seconds: float) -> int:
    return time.monotonic_ns() + round(seconds * 1e9)


def eventually(true: Callable[[], bool], within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.005)
    return False


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


def raising(error: BaseException) -> Callable[[], object]:
    def act() -> object:
        raise error

    return act


@pytest.mark.parametrize("error", [RuntimeError("camera unplugged"), SystemExit("camera unplugged")])
def test_a_source_that_raises_is_named_and_the_arm_kept_standing(
    robot: DeoxysRobot, bare_arm: BareArm, source: Source, error: BaseException
) -> None:
    source.act = raising(error)
    robot.command(UP, in_s(0.1))
    sent = time.monotonic()
    assert eventually(lambda: len(bare_arm.goals(sent)) >= 5), "a standstill in each period, without anybody's call"
    moving, *still = bare_arm.goals(sent - 0.02)
    assert moving[1][2] > 0 and all(goal == STILL for goal in still)
    assert raised(robot) == f"the object source failed: {type(error).__name__}: camera unplugged"
    robot.hold()
    heard = len(bare_arm.goals())
    assert eventually(lambda: len(bare_arm.goals()) >= heard + 5)
    source.act = lambda: None
    assert eventually(lambda: time.monotonic_ns() - (_observed(robot) or 0) < 10**8), "it goes on once the source does"


def _observed(robot: DeoxysRobot) -> int | None:
    try:
        return robot.observe().time_ns
    except RobotError:
        return None


def test_one_failure_is_told_once(robot: DeoxysRobot, source: Source) -> None:
    failures = [RuntimeError("one bad frame")]

    def act() -> object:
        if failures:
            raise failures.pop()
        return None

    source.act = act
    assert "one bad frame" in raised(robot)
    for _ in range(3):
        robot.observe()


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"cube": [0] * 7}, "TypeError: a dict where a Sighting is expected"),
        (Sighting({"cube": np.full(7, np.nan)}, 0), "the pose of 'cube' is not seven finite numbers"),
        (Sighting({"cube": np.zeros(7)}, 0), "the orientation of 'cube' is not a unit quaternion"),
        (Sighting({}, 10**18 * 2), "s in the future; expected time.monotonic_ns()"),
    ],
)
def test_what_is_no_sighting_is_the_sources_fault(robot: DeoxysRobot, source: Source, made: object, said: str) -> None:
    source.act = lambda: made
    assert said in raised(robot)


def test_a_source_that_hangs_does_not_keep_the_arm_from_standing(
    robot: DeoxysRobot, bare_arm: BareArm, source: Source
) -> None:
    go_on = threading.Event()
    source.act = lambda: print("it hangs", go_on.wait(10))
    robot.command(UP, in_s(0.1))
    sent = time.monotonic()
    assert eventually(lambda: bare_arm.goals(sent).count(STILL) >= 3)
    assert "object pose is 0." in (said := raised(robot)) and "the object source has not returned for 0." in said
    robot.hold()
    robot.stop()
    assert eventually(lambda: bare_arm.arm_commands[-1][1].termination)
    go_on.set()


def test_the_drivers_own_thread_outlives_what_fails_in_it(
    robot: DeoxysRobot, bare_arm: BareArm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(data: bytes, received_ns: int) -> None:
        raise OSError("out of memory")

    robot.command(UP, in_s(0.1))
    monkeypatch.setattr("sacflow_robot.robot.drivers.deoxys.wire.parse_arm_state", broken)
    sent = time.monotonic()
    assert eventually(lambda: bare_arm.goals(sent).count(STILL) >= 3)
    assert raised(robot) == "the driver's thread failed: OSError: out of memory"


def test_a_thread_that_has_ended_is_found_and_replaced(robot: DeoxysRobot, bare_arm: BareArm) -> None:
    robot.command(UP, in_s(0.1))
    robot._closing.set()
    thread = robot._thread
    assert thread is not None
    thread.join()
    for call in (robot.observe, lambda: robot.command(UP, in_s(0.1))):
        with pytest.raises(
            RobotError, match="the thread that keeps the arm standing has ended; connect the robot again"
        ):
            call()
    time.sleep(0.05)
    heard = len(bare_arm.goals())
    robot.hold()
    assert eventually(lambda: len(bare_arm.goals()) == heard + 1 and bare_arm.goals()[-1] == STILL)
    robot.stop()
    robot.connect()
    robot.begin(0)


# ---- states that bring nothing new


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
    assert eventually(lambda: (_observed(robot) or 0) > (first or 0))
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
    assert eventually(lambda: (_observed(robot) or 0) > engaged + 10**8)


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
    assert eventually(lambda: (_observed(robot) or 0) > (first or 0) + 10**8)
    source.frame = 2
    assert "the object source began anew (frame" in raised(robot)
    robot.observe()
    source.stamp_ns, source.frame, source.counting = time.monotonic_ns(), 1, False
    time.sleep(0.2)
    assert robot.observe().stale_reason == "the object source repeats its capture time"
    source.stamp_ns -= 10**9
    assert "the capture times of the object source run backward" in raised(robot)


# ---- any state, more than once


def test_the_conformance_kit_with_an_arm_that_falls_silent(
    config: DeoxysConfig, bare_arm: BareArm, source: Source
) -> None:
    check_robot(
        lambda: DeoxysRobot(replace(config, objects="", reset=""), source),
        lose=lambda robot: setattr(bare_arm, "publishing", False),
    )


def test_poses_that_are_refused_are_named(robot: DeoxysRobot, bare_arm: BareArm) -> None:
    bare_arm.position = np.array([np.nan, 0, 0])
    assert "messages refused: an arm state whose O_T_EE is not 16 finite numbers" in raised(robot)


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


# ---- in the control loop


class Up:
    """An action source that goes up, and does something on its fifth step."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.step_number, self._act = 0, act
        self.action, self.joined = UP, False

    def begin(self) -> None:
        pass

    def step(self, observation: Observation, noise: FloatArray | None = None) -> Up:
        self.step_number += 1
        if self.step_number == 5:
            self._act()
        return self


def test_the_loop_holds_the_arm_and_says_why(
    robot: DeoxysRobot, bare_arm: BareArm, source: Source, policy_file: Path
) -> None:
    policy = OnnxPolicy(policy_file)
    for act, told, error in (
        (
            lambda: setattr(source, "act", raising(RuntimeError("unplugged"))),
            "",
            "the object source failed: .*unplugged",
        ),
        (
            lambda: setattr(bare_arm, "counting", False),
            "hold: the last observation is .* ms old: the state messages repeat frame",
            "the newest arm state is 0.5.* s old.*the state messages repeat frame",
        ),
    ):
        said: list[str] = []
        with pytest.raises(RobotError, match=error):
            run_episode(
                robot, policy, 0, RunConfig(policy_version="", actions=Up(act), tell=said.append, max_steps=100)
            )
        assert any(re.match(told, line) for line in said) or not told, said
        ended = time.monotonic()
        assert eventually(lambda ended=ended: len(bare_arm.goals(ended)) >= 3)  # type: ignore[misc]
        assert all(goal == STILL for goal in bare_arm.goals(ended)), "left in hold"
        source.act, bare_arm.counting = (lambda: None), True
