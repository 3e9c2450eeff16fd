"""A stop holds: people, faults and episodes in any order, against the loop, the filter and the session.

After a stop was acknowledged, no motion is commanded until somebody enables the robot by a later, explicit act; and whatever
happens, no command breaks a limit over wall time. Three kinds of robot: in lockstep without a profile, on its own time
commanded in motions, and on its own time commanded in joint positions.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

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

from sacflow_robot.calibrate.recording import Excitation, record
from sacflow_robot.episode import Episode, StepResult
from sacflow_robot.errors import LogWriteError, RobotError, SacflowError, ServerError, StoppedError
from sacflow_robot.robot.control import operator_requests as switches_module
from sacflow_robot.robot.control.episode_loop import EpisodeLoop
from sacflow_robot.robot.control.loop import run_episode
from sacflow_robot.robot.control.operator import Operator, heed, settle
from sacflow_robot.robot.control.operator_requests import OperatorRequests, operator_signals
from sacflow_robot.robot.control.playback import replay_episode
from sacflow_robot.robot.control.session import Session, watched
from sacflow_robot.robot.safety.action_clipper import ActionClipper
from sacflow_robot.robot.safety.filter import LEAST_SPACING, SafetyFilter
from sacflow_robot.robot.safety.latch import State
from sacflow_robot.robot.safety.safety_limits import Box, SafetyLimits
from sacflow_robot.robot.teleop.intervention import Label, TeleopSignal
from sacflow_robot.spec import ArraySpec, FloatArray, Observation, PolicySpec, RobotSpec

EXAMPLES = int(os.environ.get("SACFLOW_STOP_EXAMPLES", "2000")) // 3 + 1
PERIOD = 50_000_000
MS = 1_000_000
SPEED, ACCELERATION = 0.5, 4.0
TURN, TURN_ACCELERATION = 1.0, 8.0
LIMITS = SafetyLimits(
    speed_m_per_s=(SPEED,) * 3,
    acceleration_m_per_s2=(ACCELERATION,) * 3,
    turn_rad_per_s=(TURN,) * 3,
    turn_acceleration_rad_per_s2=(TURN_ACCELERATION,) * 3,
    workspace=Box((-0.3, -0.3, 0.7), (0.3, 0.3, 1.3)),
    hold_to_stop_s=1.0,
)
POSITION_LIMITS = replace(LIMITS, workspace=None)
MOTIONS = RobotSpec(
    robot="made up",
    task="none",
    controller="OSC_POSE delta",
    control_rate_hz=20.0,
    observations=(
        ArraySpec("robot0_eef_pos", (3,), "m", "world"),
        ArraySpec("robot0_eef_quat", (4,), "unit quaternion xyzw", "world", quaternions=(0,)),
    ),
    action_names=("x", "y", "z", "rx", "ry", "rz", "gripper"),
    action_units=("0.05 m",) * 3 + ("0.5 rad",) * 3 + ("closing",),
    action_low=(-1.0,) * 7,
    action_high=(1.0,) * 7,
)
POSITIONS = RobotSpec(
    robot="made up",
    task="none",
    controller="joint position",
    control_rate_hz=20.0,
    observations=(ArraySpec("joints", (3,), "rad"),),
    action_names=("j0", "j1", "j2"),
    action_units=("-2 to 2 rad",) * 3,
    action_low=(-1.0,) * 3,
    action_high=(1.0,) * 3,
)


class VirtualClock:
    def __init__(self) -> None:
        self.time_ns = 10**9

    def now_ns(self) -> int:
        self.time_ns += 1_000  # looking takes a while
        return self.time_ns

    def sleep_until(self, time_ns: int) -> None:
        self.time_ns = max(self.time_ns, time_ns)


class FollowingRobot:
    """Moves as commanded, at once; its senses can fail, while what it does is kept with its time."""

    def __init__(self, spec: RobotSpec, lockstep: bool) -> None:
        self.spec, self.lockstep, self.clock = spec, lockstep, VirtualClock()
        self.positions = spec is POSITIONS
        self.place = np.array([0.1, -0.2, 0.3]) if self.positions else np.array([0.0, 0.0, 1.0])
        self.target = self.place.copy()
        self.commands: list[tuple[int, FloatArray]] = []  # time, motion of the three axes
        self.stopped = True
        self.fault = ""
        self.turns = 0
        self.extra: dict[str, FloatArray] = {}
        self.last = self._seen()

    def connect(self) -> None:
        self.stopped = False

    def begin(self, seed: int) -> StepResult:
        self.commands.append((-1, np.zeros(3)))  # an episode begins here
        return self.observe()

    def observe(self) -> StepResult:
        now = self.clock.now_ns()
        if self.fault == "nan":
            broken = {key: np.full_like(value, np.nan) for key, value in self._seen().items()}
            return StepResult(broken, time_ns=now)
        if self.fault == "stale":
            return StepResult(dict(self.last), time_ns=now - 10**9)
        if self.fault != "frozen":
            self.last = self._seen()
        return StepResult(dict(self.last), time_ns=None if self.lockstep else now)

    def command(self, action: FloatArray, valid_until_ns: int) -> None:
        if self.stopped:
            raise StoppedError("stopped")
        assert valid_until_ns > self.clock.time_ns
        if self.positions:
            target = np.asarray(action[:3], np.float64) * 2
            motion, self.target = target - self.target, target
            self.place = target
        else:
            motion = np.asarray(action[:3], np.float64) * 0.05
            self.place = self.place + motion
            if np.any(action[3:6]):
                self.turns += 1  # how far does not matter here, but that the values change
        self.commands.append((self.clock.time_ns, motion))

    def hold(self) -> None:
        pass

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        pass

    def _seen(self) -> dict[str, FloatArray]:
        place = self.place.astype(np.float32)
        if self.positions:
            return {"joints": place}
        return {
            **self.extra,
            "robot0_eef_pos": place,
            "robot0_eef_quat": np.array([1, 1e-5 * self.turns, 0, 0], np.float32),
        }


@dataclass
class ActionStep:
    action: FloatArray | None
    joined: bool = False


class Policy:
    """Chooses as it is told to."""

    def __init__(self, robot: FollowingRobot) -> None:
        n = sum(a.size for a in robot.spec.observations)
        self.spec = PolicySpec(robot.spec, 5, 4, "flow-g", (0.0,) * n, (1.0,) * n)
        self.clock, self.action, self.dead, self.late_ms = (
            robot.clock,
            np.zeros(robot.spec.action_dim, np.float32),
            False,
            0,
        )
        self.nothing = False

    def begin(self) -> None:
        pass

    def step(self, observation: Observation, noise: FloatArray | None = None) -> ActionStep:
        self.clock.time_ns += self.late_ms * MS
        self.late_ms = 0
        if self.dead:
            raise ServerError("the server is gone")
        return ActionStep(None if self.nothing else self.action.copy())

    def infer(self, observation: Observation, noise: FloatArray) -> FloatArray:
        raise AssertionError("the chooser chooses")


class Disk:
    """A recorder that can be full."""

    def __init__(self) -> None:
        self.full = False

    def begin(self, start: StepResult, time_ns: int, info: Mapping[str, Any]) -> None:
        pass

    def append(self, step: Any) -> None:
        self.mend()

    def end(self, info: Mapping[str, Any]) -> None:
        pass

    def mend(self) -> None:
        if self.full:
            raise LogWriteError("the disk is full")


class Person:
    def __init__(self) -> None:
        self.next = TeleopSignal()
        self.action: FloatArray | None = None

    def poll(self, commanded: FloatArray) -> TeleopSignal:
        signal, self.next = self.next, TeleopSignal()
        return replace(signal, action=self.action)

    def close(self) -> None:
        pass


class Labels:
    """Ends each episode after so many looks in a row in which the robot was not held."""

    def __init__(self, looks: int) -> None:
        self.looks, self.left = looks, looks

    def poll(self, commanded: FloatArray) -> TeleopSignal:
        self.left -= bool(commanded.any())
        return TeleopSignal(label=None if self.left > 1 else Label.SUCCESS)

    def close(self) -> None:
        pass


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
        self.policy, self.disk, self.person, self.switches = Policy(robot), Disk(), Person(), OperatorRequests()
        self.session = Session(
            robot,
            self.policy,
            self.safety,
            switches=self.switches,
            human=self.person,
            recorder=self.disk,
            chooser=self.policy,
            enable_wait_s=0.0,
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
            self.stops.append(self.switches.stop("network"))
        if by != "network":
            self.person.next = replace(self.person.next, stop=True)
        self.unlooked_stop = True

    @rule(by=st.sampled_from(["network", "hand"]))
    def enable(self, by: str) -> None:
        if by == "network":
            self.switches.enable()
        else:
            self.person.next = replace(self.person.next, enable=True)
        self.unlooked_enable = True

    @rule(by=st.sampled_from(["network", "hand", "hangup"]))
    def hold(self, by: str) -> None:
        if by == "network":
            self.switches.hold("asked to")
        elif by == "hangup":
            self.switches.hangup()
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
        self.loop = EpisodeLoop(
            self.robot,
            self.policy.spec,
            0,
            safety=self.safety,
            chooser=self.policy,
            operator=self.session.operator,
            recorder=self.disk,
        )
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
            outcome = self.switches.outcome(number)
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


@pytest.fixture
def robot_spec(robot: RobotSpec) -> RobotSpec:
    """The simulated robot's, by a name that leaves ``robot`` to the robots of these tests."""
    return robot


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


# ---- single cases, each of which was once wrong


def made(spec: RobotSpec = MOTIONS, lockstep: bool = False) -> FollowingRobot:
    robot = FollowingRobot(spec, lockstep)
    robot.connect()
    return robot


def run(robot: FollowingRobot, action: list[float], at: dict[int, Callable[[], None]], **options: Any) -> list[str]:
    """Run an episode that always proposes one action, and does something at some steps; what was said."""
    policy, said = Policy(robot), []  # type: ignore[var-annotated]
    policy.action[: len(action)] = action
    count = iter(range(10_000))
    step = policy.step

    def stepping(observation: Observation, noise: FloatArray | None = None) -> ActionStep:
        at.get(next(count), lambda: None)()
        return step(observation, noise)

    policy.step = stepping  # type: ignore[method-assign]
    options = {"most_steps": 60, "chooser": policy, "tell": said.append} | options
    run_episode(robot, policy, 0, policy_version="v1", **options)
    return said


def moving(robot: FollowingRobot) -> list[int]:
    return [i for i, (time_ns, motion) in enumerate(robot.commands) if time_ns >= 0 and np.abs(motion).max() > 1e-6]


@pytest.mark.parametrize("how", ["network", "hand", "signal", "hangup", "device"])
def test_a_robot_in_lockstep_without_a_profile_obeys_a_stop(how: str) -> None:
    robot, switches, person = made(lockstep=True), OperatorRequests(), Person()

    def fail(commanded: FloatArray) -> TeleopSignal:
        raise OSError("unplugged")

    def stop() -> None:
        if how == "network":
            switches.stop("over the network")
        elif how == "hand":
            person.next = TeleopSignal(stop=True)
        elif how == "signal":
            os.kill(os.getpid(), signal.SIGUSR1)
        elif how == "hangup":
            person.action = np.zeros(7, np.float32)  # a person is in charge
            os.kill(os.getpid(), signal.SIGHUP)
        else:
            person.poll = fail  # type: ignore[method-assign]

    with operator_signals(switches):
        said = run(robot, [0.1], {10: stop}, switches=switches, human=person)
    assert len(robot.commands) - 1 == 10 and robot.stopped
    assert any(line.startswith("stopped: ") for line in said) and switches.state == "stopped"


def test_a_hangup_holds_a_robot_that_nobody_moves_until_somebody_enables_it() -> None:
    robot, switches = made(lockstep=True), OperatorRequests()
    said: list[str] = []

    def tell(line: str) -> None:
        said.append(line)
        switches.enable()

    with operator_signals(switches):
        run(robot, [0.1], {10: lambda: os.kill(os.getpid(), signal.SIGHUP)}, switches=switches, tell=tell)
    assert said == ["hold: the terminal is gone", "enabled"]
    assert len(robot.commands) - 1 == 60, "a hold waits, and is no stop"


def test_a_held_robot_in_lockstep_is_stopped_after_a_while() -> None:
    robot, switches = made(lockstep=True), OperatorRequests()
    said = run(robot, [0.1], {10: lambda: switches.hold("asked to") and None}, switches=switches)
    assert said == ["hold: asked to", "stopped: held for 5 s: asked to"] and len(robot.commands) - 1 == 10


@pytest.mark.parametrize("by", ["hand", "network"])
def test_an_enabling_refused_while_braking_is_forgotten(by: str) -> None:
    robot, switches, person = made(), OperatorRequests(), Person()
    at: dict[int, Callable[[], Any]] = {20: lambda: switches.hold("asked to"), 22: switches.enable}
    if by == "hand":
        at[24] = lambda: setattr(person, "next", TeleopSignal(stop=True))
    else:
        at[24] = lambda: switches.stop("over the network")

    # While the robot is not enabled nobody chooses: what happens then is counted in looks.
    looks = iter(range(10_000))
    poll = person.poll

    def polling(commanded: FloatArray) -> TeleopSignal:
        at.get(next(looks), lambda: None)()
        return poll(commanded)

    person.poll = polling  # type: ignore[method-assign]
    limits = replace(LIMITS, workspace=None)
    said = run(robot, [1.0], {}, safety=SafetyFilter(MOTIONS, limits), switches=switches, human=person)
    assert "cannot enable: the robot is still coming to rest; try again in a moment" in said
    assert "enabled" not in said and said[-1].startswith("stopped: ")
    assert max(moving(robot)) < 40 and robot.stopped


def test_a_stop_wins_over_an_enabling_in_the_same_look() -> None:
    switches, person = OperatorRequests(), Person()
    operator = Operator(switches, person)
    for stop, enable in itertools.product((switches.stop, None), (switches.enable, None)):
        for order in (1, -1):
            for request in [stop, enable][::order]:
                if request is not None:
                    request(*(("",) if request == switches.stop else ()))
            person.next = TeleopSignal(stop=stop is None, enable=enable is None)
            found = operator.look(np.zeros(7, np.float32))
            assert found.stop and not found.enable


def test_a_stop_between_episodes_holds_until_a_later_request() -> None:
    robot, switches, person = made(), OperatorRequests(), Person()
    session = Session(
        robot, Policy(robot), SafetyFilter(MOTIONS, LIMITS), switches=switches, human=person, enable_wait_s=0
    )
    session._sleep = lambda seconds: None
    said: list[str] = []
    session.tell = said.append
    number = switches.stop("between")
    person.next = TeleopSignal(enable=True)
    with pytest.raises(RobotError, match="nobody enabled the robot within 0 s of its stop: between"):
        session.await_enabled()
    assert robot.stopped and switches.outcome(number) == "stopped"
    enabled = switches.enable()
    session.await_enabled()
    assert not robot.stopped and switches.outcome(enabled) == "running" and switches.outcome(number) == "stopped"
    assert said == ["not enabled (between); waiting for a person", "enabled"]


def test_an_episode_does_not_arm_a_robot_that_was_stopped() -> None:
    robot, switches, safety = made(), OperatorRequests(), SafetyFilter(MOTIONS, LIMITS)
    run(robot, [1.0], {5: lambda: switches.stop("enough") and None}, safety=safety, switches=switches)
    robot.connect()
    sent = len(robot.commands)
    with pytest.raises(RobotError, match="the robot is not enabled: enough; enable it before the next episode"):
        run(robot, [1.0], {}, safety=safety, switches=switches)
    assert len(robot.commands) == sent


def test_a_stop_during_the_last_step_is_kept() -> None:
    """The episode ends while the robot still brakes."""
    robot, switches, safety = made(), OperatorRequests(), SafetyFilter(MOTIONS, LIMITS)
    numbers: list[int] = []
    run(
        robot,
        [1.0],
        {29: lambda: numbers.append(switches.stop("late"))},
        safety=safety,
        switches=switches,
        most_steps=30,
    )
    assert safety.state is State.STOPPED and robot.stopped and switches.outcome(numbers[0]) == "stopped"


@pytest.mark.parametrize("late_ms", [3, 6, 20, 40, 49, 60, 90])
def test_a_late_loop_waits_for_the_next_deadline(late_ms: int) -> None:
    robot = made()
    policy = Policy(robot)
    policy.action[0] = 1.0
    run(
        robot,
        [1.0],
        {12: lambda: setattr(policy, "late_ms", late_ms)},
        chooser=policy,
        safety=SafetyFilter(MOTIONS, LIMITS),
    )
    times = np.array([time_ns for time_ns, _ in robot.commands[1:]])
    gaps = np.diff(times) / PERIOD
    assert gaps.min() >= LEAST_SPACING
    assert np.abs((times[-1] - times[0]) / PERIOD % 1 - 0.5) > 0.49, "back on the grid"


def test_the_filter_caps_the_speed_of_a_caller_in_haste() -> None:
    safety, robot = SafetyFilter(MOTIONS, LIMITS), made()
    safety.see(robot.observe().observation, 0)
    safety.enable(0)
    sent = []
    for now_ns in range(0, 40 * PERIOD, PERIOD // 5):
        action = safety.step(np.array([1.0, 0, 0, 0, 0, 0, 0]), now_ns).action
        assert action is not None
        robot.command(action, now_ns + robot.clock.now_ns() + PERIOD)
        sent.append(robot.commands[-1][1][0])
        safety.see(robot.observe().observation, now_ns)
    windows = np.convolve(sent, np.ones(5))
    assert windows.max() <= SPEED * 0.05 * 1.001, "within any period no further than the speed limit allows"


@pytest.mark.parametrize("spec", [MOTIONS, POSITIONS], ids=["motions", "positions"])
def test_values_that_freeze_hold_the_robot_with_the_reason(spec: RobotSpec) -> None:
    robot, limits = made(spec), replace(LIMITS, workspace=None)
    said = run(
        robot, [1.0, 0.0, 0.0], {10: lambda: setattr(robot, "fault", "frozen")}, safety=SafetyFilter(spec, limits)
    )
    assert said[0].startswith("hold: the observed values have not changed for 0.")
    assert "were commanded: they are frozen, or the robot is blocked" in said[0]
    last = moving(robot)[-1]
    assert last - 10 < 0.25 / 0.05 + 8, "within the age that an observation may have, and the time to brake"


def test_values_that_freeze_do_not_move_the_robot_out_of_its_workspace() -> None:
    robot = made()
    robot.place = np.array([0.2, 0.0, 1.0])
    limits = replace(LIMITS, max_observation_age_s=60.0, speed_m_per_s=(2.0,) * 3, acceleration_m_per_s2=(50.0,) * 3)
    run(robot, [1.0], {1: lambda: setattr(robot, "fault", "frozen")}, safety=SafetyFilter(MOTIONS, limits))
    assert robot.place[0] <= 0.3 + 1e-6


def test_standing_still_is_not_frozen() -> None:
    robot, safety = made(), SafetyFilter(MOTIONS, replace(LIMITS, workspace=None, acceleration_m_per_s2=(np.inf,) * 3))
    policy = Policy(robot)
    policy.action[0] = 1.0
    said = run(robot, [], {20: lambda: policy.action.fill(0)}, chooser=policy, safety=safety)
    assert said == [] and safety.state is State.RUNNING


def test_positions_without_limits_get_cautious_ones() -> None:
    robot, safety = made(POSITIONS), SafetyFilter(POSITIONS)
    assert "limited to 0.5 rad/s and 2 rad/s^2" in safety.axes.assumed
    run(robot, [1.0, -1.0, 1.0], {}, safety=safety, most_steps=100)
    steps = np.array([motion for _, motion in robot.commands[1:]])
    assert np.abs(steps).max() <= 0.5 * 0.05 + 1e-6 and np.abs(np.diff(steps, axis=0)).max() <= 2 * 0.05**2 + 1e-6


def test_a_full_disk_refuses_to_enable_and_keeps_holding() -> None:
    robot, switches, disk = made(), OperatorRequests(), Disk()
    said: list[str] = []

    def tell(line: str) -> None:
        said.append(line)
        if line.startswith("cannot enable: the disk"):
            disk.full = False
        if not line.startswith("enabled"):
            switches.enable()

    run(
        robot,
        [0.2],
        {10: lambda: setattr(disk, "full", True)},
        safety=SafetyFilter(MOTIONS, LIMITS),
        switches=switches,
        recorder=disk,
        tell=tell,
    )
    assert said[0] == "hold: the disk is full" and "cannot enable: the disk is full" in said and said[-1] == "enabled"


def test_signals_ask_a_watched_program_to_stop_and_interrupt_any_other() -> None:
    switches = OperatorRequests()
    with pytest.raises(KeyboardInterrupt), operator_signals(switches):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert switches.take() == ("", False)
    with pytest.raises(KeyboardInterrupt), operator_signals(switches), watched(switches):
        os.kill(os.getpid(), signal.SIGTERM)
        assert switches.take()[0] == "stopped by SIGTERM", "first the robot comes to rest"
    switches = OperatorRequests()
    with pytest.raises(KeyboardInterrupt), operator_signals(switches), watched(switches):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    with operator_signals(OperatorRequests()):
        assert signal.getsignal(signal.SIGHUP) != signal.SIG_DFL
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_a_program_that_is_stuck_is_interrupted_by_one_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switches_module, "_ENDING_S", 0.1)
    switches = OperatorRequests()
    with pytest.raises(KeyboardInterrupt), operator_signals(switches), watched(switches):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_a_replay_is_stopped_within_the_limits(make_episode: Callable[..., Episode], robot_spec: RobotSpec) -> None:
    episode = make_episode(60, states=False)
    episode = replace(episode, commanded=np.full_like(episode.commanded, 0.5))
    robot = made(robot_spec)
    robot.extra = {"robot0_gripper_qpos": np.zeros(2, np.float32), "object": np.zeros(10, np.float32)}
    switches = OperatorRequests()
    command, count = robot.command, iter(range(10_000))

    def commanding(action: FloatArray, valid_until_ns: int) -> None:
        command(action, valid_until_ns)
        if next(count) == 20:
            switches.stop("enough")

    robot.command = commanding  # type: ignore[method-assign]
    limits = replace(LIMITS, workspace=None)
    result = replay_episode(robot, episode, safety=SafetyFilter(robot_spec, limits), operator=Operator(switches))
    motions = np.array([motion for _, motion in robot.commands[1:]])
    assert result.stopped == "enough" and 20 < len(motions) < 40 and robot.stopped and switches.state == "stopped"
    assert np.abs(np.diff(motions, axis=0)).max() <= ACCELERATION * 0.05**2 + 1e-6 and not motions[-1].any()
    switches.stop("again")
    robot.connect()
    with pytest.raises(StoppedError, match="stopped before the first command: again"):
        replay_episode(robot, episode, safety=SafetyFilter(robot_spec, limits), operator=Operator(switches))


def test_a_calibration_is_stopped_within_the_limits(robot_spec: RobotSpec) -> None:
    robot, switches, safety = (
        made(robot_spec),
        OperatorRequests(),
        SafetyFilter(robot_spec, replace(LIMITS, workspace=None)),
    )
    robot.extra = {"robot0_gripper_qpos": np.zeros(2, np.float32), "object": np.zeros(10, np.float32)}
    operator = Operator(switches)

    def look(commanded: FloatArray) -> None:
        if len(robot.commands) == 70:
            switches.stop("enough")
        heed(safety, operator, commanded)

    with pytest.raises(RobotError, match="the robot was held or stopped: enough; nothing was measured"):
        record(robot, safety, Excitation(robot_spec, 10.0, 5), 5, heed=look)
    motions = np.array([motion for _, motion in robot.commands[1:]])
    safety.rest()
    assert robot.stopped and safety.state is State.STOPPED and len(motions) < 90 and not motions[-1].any()


def test_a_hold_while_an_episode_begins_waits_for_a_person() -> None:
    robot, switches = made(), OperatorRequests()
    said: list[str] = []
    policy = Policy(robot)
    policy.action[0] = 0.2
    session = Session(
        robot,
        policy,
        SafetyFilter(MOTIONS, LIMITS),
        switches=switches,
        chooser=policy,
        tell=said.append,
        sleep=lambda seconds: switches.enable() and None,
    )
    begin, hangups = robot.begin, iter([switches.hangup])

    def beginning(seed: int) -> StepResult:
        next(hangups, lambda: 0)()
        return begin(seed)

    robot.begin = beginning  # type: ignore[method-assign]
    session.operator.human = Labels(30)
    assert len(session.run(0, "v1").episode) >= 30
    assert said == [
        "held before the first command: the terminal is gone",
        "not enabled (the terminal is gone); waiting for a person",
        "enabled",
    ]


def test_a_hold_before_the_robot_was_ever_enabled_keeps_its_reason() -> None:
    robot, switches = made(), OperatorRequests()
    session = Session(robot, Policy(robot), SafetyFilter(MOTIONS, LIMITS), switches=switches, enable_wait_s=0)
    session._sleep = lambda seconds: None
    switches.hangup()
    with pytest.raises(RobotError, match="the terminal is gone"):
        session.await_enabled()


def test_a_slow_disk_at_enabling_does_not_hold_the_robot_again() -> None:
    robot, switches, disk = made(), OperatorRequests(), Disk()
    mend = disk.mend

    def mending() -> None:
        mend()
        robot.clock.time_ns += 200 * MS

    disk.mend = mending  # type: ignore[method-assign]
    disk.append = lambda step: mend()  # type: ignore[method-assign]
    at = {10: lambda: switches.hold("enough") and None}

    def tell(line: str) -> None:
        said.append(line)
        if "enough" in line or line.startswith("cannot enable"):
            switches.enable()

    said: list[str] = []
    run(robot, [0.2], at, safety=SafetyFilter(MOTIONS, LIMITS), switches=switches, recorder=disk, tell=tell)
    assert said[-1] == "enabled", said


def test_a_calibration_whose_brake_fails_stops_the_robot(robot_spec: RobotSpec) -> None:
    robot, switches, safety = (
        made(robot_spec),
        OperatorRequests(),
        SafetyFilter(robot_spec, replace(LIMITS, workspace=None)),
    )
    robot.extra = {"robot0_gripper_qpos": np.zeros(2, np.float32), "object": np.zeros(10, np.float32)}
    operator, command = Operator(switches), robot.command

    def commanding(action: FloatArray, valid_until_ns: int) -> None:
        if safety.state is not State.RUNNING:
            raise RobotError("the cable is gone")
        command(action, valid_until_ns)

    def look(commanded: FloatArray) -> None:
        if len(moving(robot)) == 5:
            switches.stop("enough")
        heed(safety, operator, commanded)

    robot.command = commanding  # type: ignore[method-assign]
    with pytest.raises(RobotError, match="the cable is gone"):
        record(robot, safety, Excitation(robot_spec, 10.0, 5), 5, heed=look)
    assert robot.stopped


def test_a_robot_is_stopped_before_its_stop_is_answered() -> None:
    robot, switches, safety = made(), OperatorRequests(), SafetyFilter(MOTIONS, LIMITS)
    operator = Operator(switches)
    safety.see(robot.observe().observation, 0)
    safety.enable(0)
    safety.step(np.full(7, 0.5, np.float32), 0)
    number = switches.stop("enough")
    heed(safety, operator, np.zeros(7, np.float32))
    stop, answered = robot.stop, []

    def stopping() -> None:
        answered.append(switches.outcome(number))
        stop()

    robot.stop = stopping  # type: ignore[method-assign]
    settle(robot, safety, operator)
    assert answered == [""] and robot.stopped and switches.outcome(number) == "stopped"


def test_a_calibration_goes_on_after_an_observation_that_is_missing_for_less_than_the_patience(
    robot_spec: RobotSpec,
) -> None:
    robot, safety = made(robot_spec), SafetyFilter(robot_spec, replace(LIMITS, workspace=None))
    robot.extra = {"robot0_gripper_qpos": np.zeros(2, np.float32), "object": np.zeros(10, np.float32)}
    operator, looks = Operator(), itertools.count()

    def look(commanded: FloatArray) -> None:
        robot.fault = "stale" if 80 <= next(looks) < 85 else ""
        heed(safety, operator, commanded)

    made_up = record(robot, safety, Excitation(robot_spec, 10.0, 5), 5, heed=look)
    assert len(made_up.sent_ns) > 150 and safety.state is State.RUNNING


def test_a_stop_by_a_signal_that_ends_the_program_is_an_interruption() -> None:
    switches = OperatorRequests()
    with pytest.raises(KeyboardInterrupt), watched(switches):
        switches.end("SIGTERM")
        raise StoppedError("stopped before the first command: stopped by SIGTERM")
    with pytest.raises(StoppedError), watched(OperatorRequests()):
        raise StoppedError("stopped by hand")
