"""The driver's threads against an arm's side without a simulator: whatever fails, the arm is kept standing."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.errors import RobotError
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.robot.control.run_config import RunConfig
from sacflow_robot.robot.control.session import run_episode
from sacflow_robot.robot.drivers.deoxys.driver import DeoxysRobot
from sacflow_robot.robot.drivers.deoxys.objects import Sighting
from sacflow_robot.spec import FloatArray, Observation
from tests.robot.drivers.waiting import eventually, in_s

from .bare_arm import BareArm, Source  # isort: skip
from .observing import observed_ns, raised  # isort: skip

pytestmark = pytest.mark.realtime

UP = np.array([0, 0, 1, 0, 0, 0, 0], np.float32)
STILL = (True, [0.0] * 6)


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
    assert eventually(lambda: time.monotonic_ns() - (observed_ns(robot) or 0) < 10**8), (
        "it goes on once the source does"
    )


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
