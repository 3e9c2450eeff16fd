"""The control loop, one control period at a time: observe, choose, make safe, command, record.

One loop for both kinds of robot. A lockstep robot executes each command while the loop waits; any other robot moves on its own time,
and the loop commands it at fixed deadlines of the robot's clock, which do not drift. After a late command the loop waits for
the next deadline that leaves the robot its whole period: nothing is sent in haste, so that limits hold over wall time.

Every command passes a :class:`~sacflow_robot.robot.safety.latch.Latch`, on every robot, and a person's requests are obeyed before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from sacflow_robot.episode import Episode, EpisodeBuilder, Source, Step, StepFlag, StepResult
from sacflow_robot.errors import DataError, InvalidValueError, LogWriteError, RobotError, ServerError, StoppedError
from sacflow_robot.interfaces import Recorder, Robot
from sacflow_robot.robot.control.action_sources import ActionSource, Connected
from sacflow_robot.robot.control.operator import Operator, Requests, obey
from sacflow_robot.robot.control.timing import LoopTiming
from sacflow_robot.robot.safety.action_clipper import ActionClipper
from sacflow_robot.robot.safety.filter import LEAST_SPACING, SafetyFilter
from sacflow_robot.robot.safety.latch import State, Verdict
from sacflow_robot.robot.teleop.intervention import Label
from sacflow_robot.spec import FloatArray, PolicySpec
from sacflow_robot.utils.seeding import chunk_noise

VALID_PERIODS = 2
"""Control periods after which a robot that hears nothing new holds by itself, beside the profile's longest command delay."""

_PHASE_LAG, _LEAST_PHASE_LAG_NS = 0.1, 500_000  # a command later than this share of its period skips the next deadline
HOLD_TO_STOP_NS = 5_000_000_000
"""How long a robot holds until it is stopped, where no limits say otherwise."""

_LOOK_NS = 20_000_000  # how often a held robot in lockstep, to which nothing is sent, looks for requests


@runtime_checkable
class Mendable(Protocol):
    """A recorder that can go on after it failed."""

    def mend(self) -> None:
        """Try again to write what is kept.

        Raises:
            LogWriteError: It still cannot; what is kept stays kept.
        """
        ...


@dataclass(frozen=True)
class EpisodeRun:
    """One episode and how well the loop kept time.

    Attributes:
        episode: The episode.
        overruns: Steps whose action was not ready within one control period: of its observation on a lockstep robot, of its
            deadline on any other.
        timing: When commands were sent.
        held: Steps on which the robot was held, or stood still for want of an action.
        stopped: Why the robot was stopped; empty if it was not.
        label: What a person said of the episode; None for nothing.
    """

    episode: Episode
    overruns: int
    timing: LoopTiming
    held: int = 0
    stopped: str = ""
    label: Label | None = None


class EpisodeLoop:
    """An episode in progress: :meth:`begin`, then :meth:`step` until ``ended``, then :meth:`finish`.

    Args:
        robot: The robot, connected.
        policy: What the policy is.
        seed: Decides the noise, and the start on a simulated robot.
        safety: What every command passes.
        chooser: Where actions come from.
        operator: A person's requests and input device.
        recorder: Gets every step as it is taken.
        tell: Where to say what a person has to know at once.

    Attributes:
        steps: Commands sent.
        overruns: Commands that were late.
        missed: Deadlines at which nothing was sent.
        held: Steps on which the robot was held.
        stopped: Why the robot was stopped; empty if it was not.
        label: What a person said of the episode.
        ended: Whether it is over.
    """

    def __init__(
        self,
        robot: Robot,
        policy: PolicySpec,
        seed: int,
        *,
        safety: SafetyFilter | ActionClipper,
        chooser: ActionSource,
        operator: Operator,
        recorder: Recorder | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._robot = robot
        self._spec = robot.spec
        self._clock = robot.clock
        self._noise_shape = policy.noise_shape
        self._seed = seed
        self._safety = safety
        self._chooser = chooser
        self._operator = operator
        self._recorder = recorder
        self._tell = tell
        self._period_ns = robot.spec.period_ns
        self._valid_ns = VALID_PERIODS * self._period_ns
        self._hold_to_stop_ns = HOLD_TO_STOP_NS
        if isinstance(safety, SafetyFilter):
            self._valid_ns += round(1e9 * safety.limits.max_command_delay_s)
            self._hold_to_stop_ns = round(1e9 * safety.limits.hold_to_stop_s)
        self._kept: Step | None = None  # taken, and not yet given to the recorder
        self._recording = False
        self._sent: list[int] = []
        self._held_since: int | None = None  # of a robot to which nothing is sent while it holds
        self._state = State.RUNNING
        self._trouble = ""
        self.overruns = 0
        self.missed = 0
        self.held = 0
        self.steps = 0
        self.stopped = ""
        self.label: Label | None = None
        self.ended = False

    def begin(self, about: Mapping[str, Any]) -> None:
        """Start the episode and enable the robot.

        Raises:
            StoppedError: A stop or a hold was requested; nothing was sent.
            RobotError: The robot was held or stopped before, and nobody has enabled it since; or it cannot be enabled.
        """
        self._commanded = np.zeros(self._spec.action_dim, np.float32)
        self._refuse_if_stopped()
        self._chooser.begin()
        start = self._robot.begin(self._seed)
        self._received = self._clock.now_ns()
        self._observation = self._spec.check_observation(start.observation)
        self._captured = self._received if start.time_ns is None else start.time_ns
        self._builder = EpisodeBuilder(start, self._captured)
        self._inferred = -1
        self._refuse_if_stopped()
        if self._recorder is not None:
            self._recorder.begin(start, self._captured, about)
            self._recording = True
        self._deadline = self._received
        self._safety.begin(self._gripper_at(start))
        self._safety.see(start.observation, self._filter_time(seen=True))
        self._safety.enable(self._filter_time())
        self.ended = start.ended

    def step(self) -> None:
        """One control period: from an observation to the next."""
        noise = chunk_noise(self._noise_shape, self._seed, self.steps)
        proposed, joined = self._choose(noise)
        if joined:
            self._inferred = self._clock.now_ns()
        self._wait_for_spacing()
        requests = self._operator.look(self._commanded)
        signal = requests.signal
        verdict, source = self._make_safe(proposed, requests)
        if verdict.action is None:
            self._send_nothing(verdict)
            return
        sent = self._clock.now_ns()
        late = sent - (self._captured if self._robot.lockstep else self._deadline) > self._period_ns
        self._robot.command(verdict.action, max(sent, self._deadline) + self._valid_ns)
        self._sent.append(sent)
        self._held_since = None
        self._operator.report(self._safety)
        self._record()
        if not self._robot.lockstep:
            self._wait_for_deadline()
        result = self._robot.observe()
        before, self._received = self._received, self._clock.now_ns()
        result, blind = self._take(result)
        flags = StepFlag.LATE * late | StepFlag.CLIPPED * (verdict.changed and not verdict.held)
        flags |= StepFlag.CHUNK_START * joined | StepFlag.HELD * verdict.held | StepFlag.OBS_INVALID * bool(blind)
        self._kept = Step(
            *(result, verdict.action, self._captured, verdict.action if proposed is None else proposed, source, flags),
            *(before, self._inferred, sent, signal.action),
        )
        self._builder.append(self._kept)
        self.steps += 1
        self.overruns += late
        self.held += verdict.held
        self._commanded = verdict.action
        if self._robot.lockstep:
            self._record()
            if blind:
                raise InvalidValueError(blind)
        self.ended = result.ended
        if signal.label is not None:
            self.ended, self.label = True, signal.label

    def finish(self, info: Mapping[str, Any], suppress: bool = False) -> None:
        """Hold the robot, hand the last step over, and end the recording."""
        with contextlib.suppress(RobotError) if suppress else contextlib.nullcontext():
            self._robot.hold()
        self._safety.rest()
        if self._safety.state is State.STOPPED and not self.stopped:  # the episode ended before the robot was at rest
            with contextlib.suppress(RobotError) if suppress else contextlib.nullcontext():
                self._robot.stop()
        self._operator.report(self._safety)
        if self._recorder is None or not self._recording:
            return
        with contextlib.suppress(DataError) if suppress else contextlib.nullcontext():
            self._record()
            self._recording = False
            self._recorder.end(info)

    def result(self, about: Mapping[str, Any]) -> EpisodeRun:
        """The episode so far.

        Raises:
            StoppedError: It has no steps, for the robot was stopped before the first.
        """
        if not self.steps and self.stopped:
            raise StoppedError(f"stopped before the first command: {self.stopped}")
        timing = LoopTiming(self._period_ns, np.array(self._sent, np.int64), self.missed)
        return EpisodeRun(self._builder.build(**about), self.overruns, timing, self.held, self.stopped, self.label)

    # ---- parts of a step

    def _refuse_if_stopped(self) -> None:
        requests = self._operator.look(self._commanded, between=True)
        obey(self._safety, requests)
        if self._safety.may_start:
            return
        if self._safety.state is State.STOPPED:
            self._robot.stop()
        self._operator.report(self._safety)
        if requests.stop or requests.hold:
            how = "stopped" if requests.stop else "held"
            raise StoppedError(f"{how} before the first command: {requests.stop or requests.hold}")
        raise RobotError(
            f"the robot is not enabled: {self._safety.reason or 'held'}; enable it before the next episode"
        )

    def _choose(self, noise: FloatArray) -> tuple[FloatArray | None, bool]:
        if self._safety.state is not State.RUNNING:
            # What is planned now would be for a place where the robot is not when it is enabled again.
            if isinstance(self._chooser, Connected):
                self._chooser.keep_alive()
            return None, False
        try:
            chosen = self._chooser.step(self._observation, noise)
        except ServerError as error:
            if self._robot.lockstep:
                raise
            self._trouble = str(error)
            return None, False
        if chosen.action is not None:
            self._trouble = ""
        return chosen.action, chosen.joined

    def _make_safe(self, proposed: FloatArray | None, requests: Requests) -> tuple[Verdict, int]:
        """What to send, and whose it is."""
        signal, safety = requests.signal, self._safety
        wanted, source = (proposed, Source.POLICY) if signal.action is None else (signal.action, Source.HUMAN)
        obey(safety, requests)
        if requests.enable:
            self._enable()
        now = self._filter_time()  # after enabling, which may have waited for a disk
        if wanted is not None and self._robot.lockstep and safety.state is State.RUNNING:
            self._spec.check_action(wanted)  # what cannot be sent is an error, for nobody is there to enable again
        verdict = safety.step(wanted, now, None if self._robot.lockstep else self._deadline)
        if safety.state is not self._state:
            self._state = safety.state
            if safety.state is not State.RUNNING:
                self._chooser.begin()
                because = f" ({self._trouble})" if self._trouble else ""
                self._tell(f"{safety.state}: {safety.reason}{because}")
        return verdict, Source.HOLD if verdict.held else source

    def _enable(self) -> None:
        """Enable the robot if it can be enabled now; a request that is refused is forgotten."""
        if self._safety.state not in (State.HOLD, State.STOPPING):
            return
        try:
            if isinstance(self._recorder, Mendable):
                self._recorder.mend()
            self._safety.enable(self._filter_time())
        except LogWriteError as error:
            self._tell(f"cannot enable: {error}")
            return
        except RobotError as error:
            self._tell(str(error))
            return
        self._state = State.RUNNING
        self._held_since = None
        self._chooser.begin()
        self._tell("enabled")

    def _send_nothing(self, verdict: Verdict) -> None:
        """Stop a robot that is stopped; wait where there is nothing to send to it."""
        safety = self._safety
        if verdict.state is not State.STOPPED:
            now = self._clock.now_ns()
            if self._held_since is None:
                self._held_since = now
                self._robot.hold()
            if now - self._held_since < self._hold_to_stop_ns:
                self._operator.report(safety)
                self._clock.sleep_until(now + _LOOK_NS)
                return
            safety.stop(f"held for {self._hold_to_stop_ns / 1e9:g} s: {verdict.reason}")
            self._tell(f"{safety.state}: {safety.reason}")
        self._robot.stop()
        self._operator.report(safety)
        self.stopped, self.ended = safety.reason, True

    def _take(self, result: StepResult) -> tuple[StepResult, str]:
        """Take an observation up; a broken one leaves the one before in its place, with the reason."""
        try:
            seen, blind = self._spec.check_observation(result.observation), ""
        except InvalidValueError as error:
            blind = str(error)
            result = StepResult(
                dict(self._observation), result.reward, result.terminated, result.truncated, result.state,
                result.measured, result.success, result.time_ns,
            )  # fmt: skip
        else:
            self._observation = seen
        self._captured = self._received if result.time_ns is None else result.time_ns
        if not blind:
            self._safety.see(seen, self._filter_time(seen=True, steps=self.steps + 1), result.stale_reason)
        return result, blind

    def _gripper_at(self, start: StepResult) -> FloatArray | None:
        """Where the gripper of a robot that is commanded in positions stands (M,), in the action's units, if it tells."""
        if not isinstance(self._safety, SafetyFilter) or start.measured is None or not self._safety.axes.absolute:
            return None
        gripper = start.measured[self._safety.axes.gripper]
        return gripper if np.isfinite(gripper).all() else None

    def _filter_time(self, seen: bool = False, steps: int | None = None) -> int:
        """The safety filter's time: the clock's, or on a lockstep robot the nominal one, which alone passes there."""
        if self._robot.lockstep:
            return (self.steps if steps is None else steps) * self._period_ns
        return self._captured if seen else self._clock.now_ns()

    def _wait_for_spacing(self) -> None:
        """Until the command before has had its period, less what a clock and a scheduler are off."""
        if self._robot.lockstep:
            return
        own_ns = self._sent[-1] + round(LEAST_SPACING * self._period_ns) if self._sent else 0
        before_ns = self._safety.earliest_ns if isinstance(self._safety, SafetyFilter) else 0  # of the last episode too
        self._clock.sleep_until(max(own_ns, before_ns))

    def _wait_for_deadline(self) -> None:
        """Until the next deadline that has not passed and leaves the last command its period; those between are missed.

        A command that was a little late (a scheduler's jitter) takes the deadline after it a little late as well, by less and
        less; one that was later skips it, or two commands would move the robot within one period.
        """
        lag_ns = max(round(_PHASE_LAG * self._period_ns), min(_LEAST_PHASE_LAG_NS, self._period_ns // 4))
        self._deadline += self._period_ns
        earliest = self._sent[-1] + round(LEAST_SPACING * self._period_ns) - lag_ns
        behind = max(self._clock.now_ns(), earliest) - self._deadline
        if behind > 0:
            skipped = -(-behind // self._period_ns)
            self.missed += skipped
            self._deadline += skipped * self._period_ns
        self._clock.sleep_until(self._deadline)

    def _record(self) -> None:
        """Give the step before to the recorder; a robot that is not lockstep has had its command by then."""
        step, self._kept = self._kept, None
        if step is None or self._recorder is None or not self._recording:
            return
        try:
            self._recorder.append(step)
        except LogWriteError as error:
            if self._robot.lockstep or not isinstance(self._recorder, Mendable):
                raise
            self._trouble = ""
            self._safety.hold(str(error))
