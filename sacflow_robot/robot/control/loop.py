"""The control loop, one control period at a time: observe, choose, make safe, command, record.

One loop for both kinds of robot. A lockstep robot executes each command while the loop waits; any other robot moves on its own time,
and the loop commands it at the deadlines of a :class:`~sacflow_robot.robot.control.timing.Pacer`.

Every command passes a :class:`~sacflow_robot.robot.safety.latch.Latch`, whose table ``TRANSITIONS`` is the state machine of the loop
as well, and a person's requests are obeyed before it:

    running             choose an action, and send as much of it as is safe
    hold                brake, then stand, until a person enables the robot; after ``hold_to_stop_s``, stopped
    stopping            brake, then stopped
    stopped             stop the robot; the episode is over
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from sacflow_robot.episode import EpisodeBuilder, Source, Step, StepFlag, StepResult
from sacflow_robot.errors import DataError, InvalidValueError, LogWriteError, RobotError, ServerError, StoppedError
from sacflow_robot.interfaces import Robot
from sacflow_robot.robot.control.action_queue import ActionSource, Connected
from sacflow_robot.robot.control.operator import OperatorInput, obey, refuse_if_stopped, settle
from sacflow_robot.robot.control.run_config import EpisodeRun, RunConfig, StepRecording, default_safety
from sacflow_robot.robot.control.timing import Pacer, no_garbage_collection
from sacflow_robot.robot.safety.latch import State, Verdict
from sacflow_robot.robot.teleop.intervention import Label
from sacflow_robot.spec import FloatArray
from sacflow_robot.utils.seeding import chunk_noise

VALID_PERIODS = 2
"""Control periods after which a robot that hears nothing new holds by itself, beside the profile's longest command delay."""

_LOOK_NS = 20_000_000  # how often a held robot in lockstep, to which nothing is sent, looks for requests


class EpisodeLoop:
    """An episode in progress: :meth:`begin`, then :meth:`step` until ``ended``, then :meth:`finish`; or :meth:`run`.

    Args:
        seed: Decides the noise, and the start on a simulated robot.
        noise_shape: Shape (H, A) of the noise that the source of actions gets; None for no noise.
        pacer: When to send; by default once in each control period.

    Attributes:
        safety: Passes every command.
        steps: Commands sent.
        overruns: Commands that were late.
        stopped: Why the robot was stopped; empty if it was not.
    """

    def __init__(
        self,
        robot: Robot,
        actions: ActionSource,
        config: RunConfig,
        *,
        seed: int = 0,
        noise_shape: tuple[int, int] | None = None,
        pacer: Pacer | None = None,
    ) -> None:
        self.safety = default_safety(robot) if config.safety is None else config.safety
        self.pacer = Pacer(robot.clock, robot.spec.period_ns, robot.lockstep) if pacer is None else pacer
        self._robot = robot
        self._spec = robot.spec
        self._clock = robot.clock
        self._actions = actions
        self._config = config
        self._operator = config.operator
        self._tell = config.tell
        self._seed = seed
        self._noise_shape = noise_shape
        limits = self.safety.limits
        self._valid_ns = VALID_PERIODS * robot.spec.period_ns + round(1e9 * limits.max_command_delay_s)
        self._hold_to_stop_s = limits.hold_to_stop_s
        self._commanded = np.zeros(robot.spec.action_dim, np.float32)
        self._recording = StepRecording(config.recorder, wait=robot.lockstep)
        self._held_since_ns: int | None = None  # of a robot to which nothing is sent while it holds
        self._told = State.RUNNING
        self._trouble = ""
        self.overruns = 0
        self.held = 0
        self.steps = 0
        self.stopped = ""
        self.label: Label | None = None
        self.ended = False

    def run(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """Run the episode from its begin to its end. Returns more to record about it, known at its end."""
        try:
            # The collection comes first: it takes long enough to miss deadlines.
            with contextlib.nullcontext() if self._robot.lockstep else no_garbage_collection():
                self.begin(info)
                while not self.ended and (self._config.max_steps is None or self.steps < self._config.max_steps):
                    self.step()
        except BaseException:
            self.finish({"interrupted": True}, suppress=True)
            raise
        outcome: dict[str, Any] = {}
        if self.label is not None:
            outcome = {"label": str(self.label), "success": self.label is Label.SUCCESS}
        if self.stopped or self.label is Label.DISCARD:
            outcome["interrupted"] = True
        if self.stopped:
            outcome["stopped"] = self.stopped
        self.finish(outcome)
        return outcome

    def begin(self, info: Mapping[str, Any]) -> None:
        """Start the episode and enable the robot.

        Raises:
            StoppedError: A stop or a hold was requested; nothing was sent.
            RobotError: The robot was held or stopped before, and nobody has enabled it since; or it cannot be enabled.
        """
        refuse_if_stopped(self._robot, self.safety, self._operator)
        self._actions.begin()
        start = self._start()
        self._received_ns = self._clock.now_ns()
        self._observation = self._spec.check_observation(start.observation)
        self._captured_ns = self._received_ns if start.time_ns is None else start.time_ns
        self._builder = EpisodeBuilder(start, self._captured_ns)
        self._inferred_ns = -1
        refuse_if_stopped(self._robot, self.safety, self._operator)
        self._recording.begin(start, self._captured_ns, info)
        self.pacer.begin(self._received_ns)
        self.safety.begin(start.measured)
        self.safety.see(start.observation, self._nominal_ns() if self._robot.lockstep else self._captured_ns)
        self.safety.enable(self._filter_now_ns())
        self.ended = self._is_over(start)

    def step(self) -> None:
        proposed, joined = self._choose()
        self.pacer.wait_for_spacing(self.safety.earliest_ns)
        requested = self._operator.look(self._commanded)
        verdict, source = self._make_safe(proposed, requested)
        if verdict.action is None:
            self._send_nothing(verdict)
            return
        sent_ns, late = self._command(verdict.action)
        self._record()
        self.pacer.wait_for_deadline()
        # What the step follows from, before the observation takes its place.
        received_ns = self._received_ns
        result, blind = self._observe()
        flags = StepFlag.LATE * late | StepFlag.CLIPPED * (verdict.changed and not verdict.held)
        flags |= StepFlag.CHUNK_START * joined | StepFlag.HELD * verdict.held | StepFlag.OBS_INVALID * bool(blind)
        step = Step(
            result,
            verdict.action,
            self._captured_ns,
            verdict.action if proposed is None else proposed,
            source,
            flags,
            received_ns,
            self._inferred_ns,
            sent_ns,
            requested.action,
        )
        self._builder.append(step)
        self._recording.take(step)
        self.steps += 1
        self.overruns += late
        self.held += verdict.held
        if self._robot.lockstep:
            self._record()
            if blind:
                raise InvalidValueError(blind)
        self.ended = self._is_over(result) or requested.label is not None
        self.label = requested.label

    def finish(self, info: Mapping[str, Any], suppress: bool = False) -> None:
        """Hold the robot, hand the last step over, and end the recording."""
        with contextlib.suppress(RobotError) if suppress else contextlib.nullcontext():
            settle(self._robot, self.safety, self._operator)
        with contextlib.suppress(DataError) if suppress else contextlib.nullcontext():
            self._recording.end(info)

    def result(self, info: Mapping[str, Any]) -> EpisodeRun:
        """The episode so far.

        Raises:
            StoppedError: It has no steps, for the robot was stopped before the first.
        """
        if not self.steps and self.stopped:
            raise StoppedError(f"stopped before the first command: {self.stopped}")
        episode = self._builder.build(**info)
        return EpisodeRun(episode, self.overruns, self.pacer.timing, self.held, self.stopped, self.label)

    # ---- what a replay does otherwise

    def _start(self) -> StepResult:
        return self._robot.begin(self._seed)

    def _is_over(self, result: StepResult) -> bool:
        return result.ended

    # ---- parts of a step

    def _choose(self) -> tuple[FloatArray | None, bool]:
        """The action, None for none, and whether a new chunk begins with it."""
        if self.safety.state is not State.RUNNING:
            # What is planned now would be for a place where the robot is not when it is enabled again.
            if isinstance(self._actions, Connected):
                self._actions.keep_alive()
            return None, False
        noise = None if self._noise_shape is None else chunk_noise(self._noise_shape, self._seed, self.steps)
        try:
            chosen = self._actions.step(self._observation, noise)
        except ServerError as error:
            if self._robot.lockstep:
                raise
            self._trouble = str(error)
            return None, False
        if chosen.action is not None:
            self._trouble = ""
        if chosen.joined:
            self._inferred_ns = self._clock.now_ns()
        return chosen.action, chosen.joined

    def _make_safe(self, proposed: FloatArray | None, requested: OperatorInput) -> tuple[Verdict, Source]:
        safety = self.safety
        obey(safety, requested)
        if requested.enable:
            self._enable()
        wanted = proposed if requested.action is None else requested.action
        now_ns = self._filter_now_ns()  # after enabling, which may have waited for a disk
        if wanted is not None and self._robot.lockstep and safety.state is State.RUNNING:
            self._spec.check_action(wanted)  # what cannot be sent is an error, for nobody is there to enable again
        verdict = safety.step(wanted, now_ns, None if self._robot.lockstep else self.pacer.deadline_ns)
        if safety.state is not self._told:
            self._told = safety.state
            self._actions.begin()
            because = f" ({self._trouble})" if self._trouble else ""
            self._tell(f"{safety.state}: {safety.reason}{because}")
        if verdict.held:
            return verdict, Source.HOLD
        return verdict, Source.POLICY if requested.action is None else Source.HUMAN

    def _enable(self) -> None:
        """Enable the robot if it can be enabled now; a request that is refused is forgotten."""
        if self.safety.state not in (State.HOLD, State.STOPPING):
            return
        try:
            self._recording.mend()
            self.safety.enable(self._filter_now_ns())
        except LogWriteError as error:
            self._tell(f"cannot enable: {error}")
            return
        except RobotError as error:
            self._tell(str(error))
            return
        self._told = State.RUNNING
        self._held_since_ns = None
        self._actions.begin()
        self._tell("enabled")

    def _send_nothing(self, verdict: Verdict) -> None:
        """Stop a robot that is stopped; wait where there is nothing to send to it."""
        safety = self.safety
        if verdict.state is not State.STOPPED:
            now_ns = self._clock.now_ns()
            if self._held_since_ns is None:
                self._held_since_ns = now_ns
                self._robot.hold()
            if now_ns - self._held_since_ns < self._hold_to_stop_s * 1e9:
                self._operator.report(safety)
                self._clock.sleep_until(now_ns + _LOOK_NS)
                return
            safety.stop(f"held for {self._hold_to_stop_s:g} s: {verdict.reason}")
            self._tell(f"{safety.state}: {safety.reason}")
        self._robot.stop()
        self._operator.report(safety)
        self.stopped = safety.reason
        self.ended = True

    def _command(self, action: FloatArray) -> tuple[int, bool]:
        """Send an action (A,); when (ns), and whether that was late."""
        sent_ns = self._clock.now_ns()
        due_ns = self._captured_ns if self._robot.lockstep else self.pacer.deadline_ns
        self._robot.command(action, max(sent_ns, self.pacer.deadline_ns) + self._valid_ns)
        self.pacer.sent_ns.append(sent_ns)
        self._commanded = action
        self._held_since_ns = None
        self._operator.report(self.safety)
        return sent_ns, sent_ns - due_ns > self._spec.period_ns

    def _observe(self) -> tuple[StepResult, str]:
        """The newest observation; a broken one leaves the one before in its place, with the reason."""
        result = self._robot.observe()
        self._received_ns = self._clock.now_ns()
        self._captured_ns = self._received_ns if result.time_ns is None else result.time_ns
        try:
            self._observation = self._spec.check_observation(result.observation)
        except InvalidValueError as error:
            return dataclasses.replace(result, observation=dict(self._observation)), str(error)
        seen_ns = self._nominal_ns(1) if self._robot.lockstep else self._captured_ns
        self.safety.see(self._observation, seen_ns, result.stale_reason)
        return result, ""

    def _filter_now_ns(self) -> int:
        """The safety filter's time: the clock's, or on a lockstep robot the nominal one, which alone passes there."""
        return self._nominal_ns() if self._robot.lockstep else self._clock.now_ns()

    def _nominal_ns(self, more_steps: int = 0) -> int:
        return (self.steps + more_steps) * self._spec.period_ns

    def _record(self) -> None:
        """Record the step before; what a resilient recorder cannot write holds the robot."""
        problem = self._recording.flush()
        if problem:
            self._trouble = ""
            self.safety.hold(problem)
