"""A stop holds: people, faults and episodes in any order, against the loop, the filter and the session.

After a stop was acknowledged, no motion is commanded until somebody enables the robot by a later, explicit act; and whatever
happens, no command breaks a limit over wall time. Three kinds of robot: in lockstep without a profile, on its own time
commanded in motions, and on its own time commanded in joint positions.
"""

import contextlib
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sacflow_robot.errors import LogWriteError, RobotError, SacflowError
from sacflow_robot.robot.control.loop import EpisodeLoop
from sacflow_robot.robot.control.operator import Operator, OperatorRequests
from sacflow_robot.robot.control.run_config import RunConfig
from sacflow_robot.robot.control.session import Session
from sacflow_robot.robot.safety.action_clipper import ActionClipper
from sacflow_robot.robot.safety.filter import LEAST_SPACING, SafetyFilter
from sacflow_robot.robot.safety.latch import State
from sacflow_robot.robot.teleop.intervention import Label
from sacflow_robot.spec import FloatArray
from tests.robot.safety.following_robot import (
    ACCELERATION,
    LIMITS,
    MOTIONS,
    PERIOD,
    POSITION_LIMITS,
    POSITIONS,
    SPEED,
    TURN,
    TURN_ACCELERATION,
    Disk,
    FollowingRobot,
    Person,
    Policy,
)

EXAMPLES = int(os.environ.get("SACFLOW_STOP_EXAMPLES", "2000")) // 3 + 1


class StopMachine(RuleBasedStateMachine):
    kind = "motions"

    @initialize(action=st.sampled_from([[1.0, 0.3, -1.0], [0.2, -0.8, 0.5], [-1.0, -1.0, -1.0], [0.0, 0.0, 0.0]]))
    def make(self, action: list[float]) -> None:
        self.robot = robot = FollowingRobot(POSITIONS if self.kind == "positions" else MOTIONS, self.kind == "lockstep")
        robot.connect()
        self.safety: SafetyFilter | ActionClipper
        if self.kind == "lockstep":
            self.safety = ActionClipper(robot.spec)
        else:
            self.safety = SafetyFilter(robot.spec, POSITION_LIMITS if self.kind == "positions" else LIMITS)
        self.policy, self.disk, self.person, self.requests = Policy(robot), Disk(), Person(), OperatorRequests()
        self.session = Session(
            robot,
            self.policy,
            RunConfig(
                safety=self.safety,
                actions=self.policy,
                operator=Operator(self.requests, self.person),
                recorder=self.disk,
                enable_wait_s=0.0,
            ),
            sleep=lambda seconds: None,
        )
        self.loop: EpisodeLoop | None = None
        self.stops: list[int] = []  # requests over the network that have no outcome yet
        self.unlooked_stop = self.unlooked_enable = self.unlooked_hold = False
        self.latched = False  # held or stopped, and nobody has enabled it since
        self.quiet_from: int | None = None  # commands from this index on must not move it
        self.braking = 0
        self.checked = 0
        self.propose(action)
        self.begin_episode()

    # ---- what people do

    @rule(by=st.sampled_from(["network", "hand", "both"]))
    def stop(self, by: str) -> None:
        if by != "hand":
            self.stops.append(self.requests.stop("network"))
        if by != "network":
            self.person.next = replace(self.person.next, stop=True)
        self.unlooked_stop = True

    @rule(by=st.sampled_from(["network", "hand"]))
    def enable(self, by: str) -> None:
        if by == "network":
            self.requests.enable()
        else:
            self.person.next = replace(self.person.next, enable=True)
        self.unlooked_enable = True

    @rule(by=st.sampled_from(["network", "hand", "hangup"]))
    def hold(self, by: str) -> None:
        if by == "network":
            self.requests.hold("asked to")
        elif by == "hangup":
            self.requests.hangup()
        else:
            self.person.next = replace(self.person.next, hold=True)
        self.unlooked_hold = True

    @rule(action=st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3))
    def take_over(self, action: list[float]) -> None:
        self.person.action = self._action(action)

    @rule()
    def hand_back(self) -> None:
        self.person.action = None

    @rule(label=st.sampled_from(list(Label)))
    def label(self, label: Label) -> None:
        self.person.next = replace(self.person.next, label=label)

    @precondition(lambda self: self.loop is not None)
    @rule(count=st.integers(1, 8))
    def enable_again_and_again(self, count: int) -> None:
        for _ in range(count):
            self.enable("network")
            self.control(1)

    # ---- what goes wrong, and right again

    @rule(action=st.lists(st.floats(-3, 3, width=32), min_size=3, max_size=3))
    def propose(self, action: list[float]) -> None:
        self.policy.action, self.policy.nothing, self.policy.dead = self._action(action), False, False

    @rule(what=st.sampled_from(["nothing", "dead", "nan", "infinite"]))
    def fail_policy(self, what: str) -> None:
        self.policy.nothing, self.policy.dead = what == "nothing", what == "dead"
        if what in ("nan", "infinite"):
            self.policy.action = np.full_like(self.policy.action, np.nan if what == "nan" else np.inf)

    @rule(fault=st.sampled_from(["", "", "frozen", "nan", "stale"]))
    def fail_senses(self, fault: str) -> None:
        self.robot.fault = fault

    @precondition(lambda self: self.loop is not None)
    @rule(action=st.sampled_from([[1.0, 0.0, 0.0], [-1.0, 0.5, 0.0], [0.0, 0.0, -1.0]]))
    def drive_blind(self, action: list[float]) -> None:
        self.robot.fault = "frozen"
        self.propose(action)
        self.control(30)

    @rule(full=st.booleans())
    def fill_disk(self, full: bool) -> None:
        self.disk.full = full

    @rule(late_ms=st.integers(1, 260))
    def be_late(self, late_ms: int) -> None:
        self.policy.late_ms = late_ms

    # ---- what the program does

    @precondition(lambda self: self.loop is None)
    @rule()
    def begin_episode(self) -> None:
        before = self.safety.may_start
        self.loop = EpisodeLoop(self.robot, self.policy, self.session.config, noise_shape=self.policy.spec.noise_shape)
        asked = self.unlooked_stop or self.unlooked_hold
        try:
            self.loop.begin({})
        except SacflowError:
            self._end(suppress=True)
        else:
            assert before and not asked, "an episode began although the robot was held or stopped, or was asked to be"
            self._unlatch()
        self._looked(asked)

    @precondition(lambda self: self.loop is None)
    @rule()
    def wait_between_episodes(self) -> None:
        stop, enable = self.unlooked_stop or self.unlooked_hold, self.unlooked_enable
        before = self.safety.may_start
        try:
            self.session.await_enabled()
        except RobotError:
            assert not self.safety.may_start
        else:
            assert not stop, "a stop or a hold in the same look did not win"
            assert before or enable, "the robot was enabled although nobody asked for it"
            if not before:
                self._unlatch()
        self._looked(stop)

    @precondition(lambda self: self.loop is not None)
    @rule()
    def control_once(self) -> None:
        self.control(1)

    @precondition(lambda self: self.loop is not None)
    @rule(count=st.sampled_from([2, 4, 12, 30]))
    def control(self, count: int) -> None:
        for _ in range(count):
            if self.loop is None:
                return
            self._step(self.loop)

    def _step(self, loop: EpisodeLoop) -> None:
        was, stop, enable = self.safety.state, self.unlooked_stop or self.unlooked_hold, self.unlooked_enable
        halting = was is State.STOPPING
        try:
            loop.step()
        except SacflowError:
            self._end(suppress=True)
        else:
            if loop.ended:
                self._end()
        now = self.safety.state
        if was is not State.RUNNING and now is State.RUNNING:
            assert enable and not stop, "it was enabled without a request, or against a stop in the same look"
            assert not halting, "a stop under way was undone"
            assert not self.disk.full, "it was enabled although its steps cannot be kept"
            self._unlatch()
        self._looked(stop)

    def _end(self, suppress: bool = False) -> None:
        assert self.loop is not None
        loop, self.loop = self.loop, None
        with contextlib.suppress(LogWriteError):  # the program says so; the robot holds
            loop.finish({}, suppress=suppress)

    # ---- the model

    def _looked(self, stop: bool) -> None:
        """Somebody looked at the requests; note what was acknowledged."""
        self.unlooked_stop = self.unlooked_enable = self.unlooked_hold = False
        if stop:
            self.latched = True
        if self.latched and self.safety.settled and self.quiet_from is None:
            self.quiet_from = len(self.robot.commands)
        for number in list(self.stops):
            outcome = self.requests.outcome(number)
            if outcome:
                assert outcome == "stopped", f"a stop led to {outcome!r}"
                assert self.robot.stopped, "the robot itself was not stopped when the stop was acknowledged"
                self.stops.remove(number)
        self.braking = self.braking + 1 if self.stops and self.loop is not None else 0
        longest = 2 if isinstance(self.safety, ActionClipper) else self.safety._motion.stop_periods + 4
        assert self.braking <= longest, "a stop was not acknowledged in time"

    def _unlatch(self) -> None:
        self.latched, self.quiet_from = False, None

    def _action(self, axes: list[float]) -> FloatArray:
        action = np.zeros(self.robot.spec.action_dim, np.float32)
        action[:3] = axes
        return action

    # ---- what always holds

    @invariant()
    def nothing_moves_after_a_stop(self) -> None:
        if self.quiet_from is None:
            return
        for time_ns, motion in self.robot.commands[self.quiet_from :]:
            assert time_ns < 0 or np.abs(motion).max() < 1e-6, "it moved after a stop or a hold was acknowledged"

    @invariant()
    def limits_hold_over_wall_time(self) -> None:
        if self.kind == "lockstep":
            return
        speed, acceleration = (TURN, TURN_ACCELERATION) if self.kind == "positions" else (SPEED, ACCELERATION)
        most, jump = speed * 0.05 + 1e-6, acceleration * 0.05**2 + 1e-6
        commands = self.robot.commands
        while self.checked < len(commands):
            time_ns, motion = commands[self.checked]
            before_ns, before = commands[self.checked - 1] if self.checked else (-1, np.zeros(3))
            self.checked += 1
            if time_ns < 0:
                continue
            assert np.abs(motion).max() <= most, "faster than the limit"
            times = [t for t, moved in commands[: self.checked - 1] if t >= 0 and np.abs(moved).max() > 1e-9]
            if times and np.abs(motion).max() > 1e-9:
                assert time_ns - times[-1] >= LEAST_SPACING * PERIOD, "two commands within one period"
            if before_ns >= 0 and time_ns - before_ns <= 2.4 * PERIOD:
                assert np.abs(motion - before).max() <= jump, "the speed changed faster than the limit"
        if self.kind == "motions":
            place = self.robot.place
            low, high = np.array(LIMITS.workspace.low), np.array(LIMITS.workspace.high)  # type: ignore[union-attr]
            assert (place >= low - 1e-5).all() and (place <= high + 1e-5).all(), f"out of its workspace: {place}"

    def teardown(self) -> None:
        if getattr(self, "loop", None) is not None:
            self._end(suppress=True)


class LockstepMachine(StopMachine):
    kind = "lockstep"


class PositionsMachine(StopMachine):
    kind = "positions"


@pytest.mark.parametrize(
    "machine", [StopMachine, LockstepMachine, PositionsMachine], ids=["motions", "lockstep", "positions"]
)
def test_a_stop_holds(machine: type[StopMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
