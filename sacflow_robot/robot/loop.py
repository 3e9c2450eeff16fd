"""The control loop: observe, choose, make safe, command, record.

One loop for both kinds of arm. A lockstep arm executes each command while the loop waits; any other arm moves on its own time,
and the loop commands it at fixed deadlines of the arm's clock, which do not drift: a late command delays none after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sacflow_robot.episode import Episode, EpisodeBuilder, Source, Step, StepFlag
from sacflow_robot.errors import DataError, InvalidValueError, LogWriteError, RobotError, ServerError, SpecMismatchError
from sacflow_robot.randomness import chunk_noise
from sacflow_robot.robot.limits import ActionLimits
from sacflow_robot.robot.safety import SafetyFilter, State, Verdict
from sacflow_robot.robot.switches import Switches
from sacflow_robot.robot.takeover import HANDS_OFF, HumanInput, HumanSignal, Label
from sacflow_robot.robot.timing import LoopTiming, no_garbage_collection
from sacflow_robot.spec import ArmSpec, FloatArray, Observation, Policy, PolicySpec, Recorder, Robot, StepResult

VALID_PERIODS = 2
"""Control periods after which an arm that hears nothing new holds by itself, beside the profile's longest command delay."""


class Chosen(Protocol):
    """What a chooser says in one control period; ``serve.stream.StreamStep`` is one."""

    @property
    def action(self) -> FloatArray | None: ...

    @property
    def joined(self) -> bool: ...


class Chooser(Protocol):
    """Where actions come from, one in each control period; ``serve.stream.ChunkStream`` is one."""

    def begin(self) -> None:
        """Forget what was planned."""
        ...

    def step(self, observation: Observation, noise: FloatArray | None = None) -> Chosen: ...

    def keep_alive(self) -> None:
        """Keep what actions come from at hand while the arm is held; called in every such period, and waits for nothing."""
        ...


@dataclass(frozen=True, slots=True)
class _Planned:
    action: FloatArray
    joined: bool


class OpenLoop:
    """Chunks one after another, each played to its end: for arms whose time stands still while a policy thinks."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.begin()

    def begin(self) -> None:
        self._chunk, self._next = np.zeros((0, 0), np.float32), 0

    def step(self, observation: Observation, noise: FloatArray | None = None) -> _Planned:
        joined = self._next == len(self._chunk)
        if joined:
            assert noise is not None
            batch = {key: array[None] for key, array in observation.items()}
            self._chunk, self._next = self._policy.infer(batch, noise[None])[0], 0
        self._next += 1
        return _Planned(self._chunk[self._next - 1], joined)

    def keep_alive(self) -> None:
        """A policy that is asked between steps has nothing to keep."""


@dataclass(frozen=True)
class EpisodeRun:
    """One episode and how well the loop kept time.

    Attributes:
        episode: The episode.
        overruns: Steps whose action was not ready within one control period: of its observation on a lockstep arm, of its
            deadline on any other.
        timing: When commands were sent.
        held: Steps on which the arm was held, or stood still for want of an action.
        stopped: Why the arm was stopped; empty if it was not.
        label: What a person said of the episode; None for nothing.
    """

    episode: Episode
    overruns: int
    timing: LoopTiming
    held: int = 0
    stopped: str = ""
    label: Label | None = None


def check_fit(policy: Policy, robot: ArmSpec) -> None:
    """Refuse a policy that was made for another arm.

    Raises:
        SpecMismatchError: Names every field that differs.
    """
    different = robot.differences(policy.spec.arm)
    if different:
        raise SpecMismatchError(f"the policy does not fit the robot (robot, policy): {'; '.join(different)}")


def run_episode(
    robot: Robot,
    policy: Policy,
    seed: int,
    *,
    policy_version: str,
    recorder: Recorder | None = None,
    limits: tuple[FloatArray, FloatArray] | None = None,
    safety: SafetyFilter | None = None,
    chooser: Chooser | None = None,
    human: HumanInput | None = None,
    switches: Switches | None = None,
    info: Mapping[str, Any] | None = None,
    most_steps: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> EpisodeRun:
    """Run one episode.

    The noise of the chunk chosen at step t is ``chunk_noise((H, A), seed, t)``, so that the episode can be repeated.

    Args:
        robot: The arm, connected.
        policy: Local or remote policy; says what it is, and chooses chunk by chunk, open loop, without a ``chooser``.
        seed: Decides the noise, and the start on a simulated arm.
        policy_version: Recorded with the episode.
        recorder: Gets every step as it is taken; when something goes wrong on the way, the episode is ended there and
            marked interrupted.
        limits: Lower and upper bound (A,) of the commanded action, within the arm's own.
        safety: The safety filter; starting an episode arms it. Without one, a lockstep arm's actions are held within the
            bounds alone, and any other gets the filter without limits but those bounds and the default ages.
        chooser: Where actions come from.
        human: Through what a person takes over.
        switches: What a person asked for from elsewhere: stop, arm.
        info: What else to record about the episode; JSON values.
        most_steps: Steps after which the episode is cut; None for no limit.
        tell: Where to say what a person has to know at once: held, stopped, armed.

    Raises:
        InvalidValueError: On a lockstep arm, an observation or an action holds NaN or infinity; nothing was sent on it.
        LogWriteError: The recorder cannot keep the steps; the arm gets no further command.
    """
    bounds = ActionLimits(robot.spec, limits)
    if safety is None and not robot.lockstep:
        safety = SafetyFilter(robot.spec)
    episode = _Running(
        *(robot, policy.spec, seed, bounds, safety, chooser or OpenLoop(policy), recorder, human, switches, tell)
    )
    about = {
        "seed": seed,
        "task": robot.spec.task,
        "robot": robot.spec.robot,
        "policy_version": policy_version,
        "spec_fingerprint": policy.spec.fingerprint,
        "clock": "monotonic of the robot's computer",
        **({} if safety is None else {"safety_sha256": safety.limits.sha256}),
        **(info or {}),
    }
    try:
        # The collection comes first: it takes long enough to miss deadlines.
        with contextlib.nullcontext() if robot.lockstep else no_garbage_collection():
            episode.begin(about)
            while not episode.ended and (most_steps is None or episode.steps < most_steps):
                episode.step()
    except BaseException:
        with contextlib.suppress(RobotError):
            robot.hold()
        episode.finish({"interrupted": True}, suppress=True)
        raise
    robot.hold()
    said: dict[str, Any] = {} if episode.label is None else {"label": str(episode.label)}
    if episode.label is not None:
        said["success"] = episode.label is Label.SUCCESS
    if episode.stopped or episode.label is Label.DISCARD:
        said |= {"interrupted": True} | ({"stopped": episode.stopped} if episode.stopped else {})
    episode.finish(said)
    return episode.result({**about, **said})


class _Running:
    """An episode in progress."""

    def __init__(
        self,
        robot: Robot,
        policy: PolicySpec,
        seed: int,
        bounds: ActionLimits,
        safety: SafetyFilter | None,
        chooser: Chooser,
        recorder: Recorder | None,
        human: HumanInput | None,
        switches: Switches | None,
        tell: Callable[[str], None],
    ) -> None:
        self._robot, self._arm, self._clock, self._noise_shape = robot, robot.spec, robot.clock, policy.noise_shape
        self._seed, self._bounds, self._safety, self._chooser = seed, bounds, safety, chooser
        self._recorder, self._human, self._tell = recorder, human, tell
        self._switches = switches or Switches()
        self._period_ns = robot.spec.period_ns
        delay_s = 0.0 if safety is None else safety.limits.max_command_delay_s
        self._valid_ns = VALID_PERIODS * self._period_ns + round(delay_s * 1e9)
        self._kept: Step | None = None  # taken, and not yet given to the recorder
        self._recording = False
        self._sent: list[int] = []
        self.overruns = self.missed = self.held = self.steps = 0
        self.stopped, self.label, self.ended = "", None, False  # type: str, Label | None, bool
        self._state, self._trouble, self._arming = State.ARMED, "", False

    def begin(self, about: Mapping[str, Any]) -> None:
        self._chooser.begin()
        start = self._robot.begin(self._seed)
        self._received = self._clock.now_ns()
        self._observation = self._arm.check_observation(start.observation)
        self._captured = self._received if start.time_ns is None else start.time_ns
        self._builder = EpisodeBuilder(start, self._captured)
        self._inferred = -1
        self._commanded = np.zeros(self._arm.action_dim, np.float32)
        if self._recorder is not None:
            self._recorder.begin(start, self._captured, about)
            self._recording = True
        self._deadline = self._received
        if self._safety is not None:
            self._safety.begin(self._gripper_at(start))
            self._safety.see(start.observation, self._filter_time(seen=True))
            self._safety.arm(self._filter_time())
        self.ended = start.ended

    def step(self) -> None:
        """One control period: from an observation to the next."""
        noise = chunk_noise(self._noise_shape, self._seed, self.steps)
        proposed, joined = self._choose(noise)
        if joined:
            self._inferred = self._clock.now_ns()
        signal = HANDS_OFF if self._human is None else self._human.poll(self._commanded)
        verdict, source = self._make_safe(proposed, signal)
        if verdict.action is None:
            self._stop(verdict.reason)
            return
        sent = self._clock.now_ns()
        late = sent - (self._captured if self._robot.lockstep else self._deadline) > self._period_ns
        self._robot.command(verdict.action, max(sent, self._deadline) + self._valid_ns)
        self._record()
        if not self._robot.lockstep:
            self._wait()
        result = self._robot.observe()
        before, self._received = self._received, self._clock.now_ns()
        result, blind = self._take(result)
        flags = StepFlag.LATE * late | StepFlag.CLIPPED * (verdict.changed and not verdict.held)
        flags |= StepFlag.CHUNK_START * joined | StepFlag.HELD * verdict.held | StepFlag.BLIND * bool(blind)
        self._kept = Step(
            *(result, verdict.action, self._captured, verdict.action if proposed is None else proposed, source, flags),
            *(before, self._inferred, sent, signal.action),
        )
        self._builder.append(self._kept)
        self._sent.append(sent)
        self.steps, self.overruns, self.held = self.steps + 1, self.overruns + late, self.held + verdict.held
        self._commanded = verdict.action
        if self._robot.lockstep:
            self._record()
            if blind:
                raise InvalidValueError(blind)
        self.ended = result.ended
        if signal.label is not None:
            self.ended, self.label = True, signal.label

    def finish(self, info: Mapping[str, Any], suppress: bool = False) -> None:
        """Hand the last step over, and end the recording."""
        if self._recorder is None or not self._recording:
            return
        with contextlib.suppress(DataError) if suppress else contextlib.nullcontext():
            self._record()
            self._recording = False
            self._recorder.end(info)

    def result(self, about: Mapping[str, Any]) -> EpisodeRun:
        timing = LoopTiming(self._period_ns, np.array(self._sent, np.int64), self.missed)
        return EpisodeRun(self._builder.build(**about), self.overruns, timing, self.held, self.stopped, self.label)

    # ---- parts of a step

    def _choose(self, noise: FloatArray) -> tuple[FloatArray | None, bool]:
        if self._safety is not None and self._safety.state is not State.ARMED:
            return None, False  # what is planned now would be for a place where the arm is not when it is armed again
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

    def _make_safe(self, proposed: FloatArray | None, signal: HumanSignal) -> tuple[Verdict, int]:
        """What to send, and whose it is."""
        wanted, source = (proposed, Source.POLICY) if signal.action is None else (signal.action, Source.HUMAN)
        safety = self._safety
        if safety is None:
            asked = np.zeros(self._arm.action_dim, np.float32) if wanted is None else wanted
            sent = self._bounds(asked)
            return Verdict(sent, State.ARMED, not np.array_equal(sent, asked), wanted is None), source
        now = self._filter_time()
        self._heed(safety, signal, now)
        if wanted is not None and self._robot.lockstep:
            self._bounds(wanted)  # refuses what cannot be sent with an error, for nobody is there to arm again
        verdict = safety.step(wanted, now, None if self._robot.lockstep else self._deadline)
        if safety.state is not self._state:
            self._state = safety.state
            if safety.state is not State.ARMED:
                self._chooser.begin()
                because = f" ({self._trouble})" if self._trouble else ""
                self._tell(f"{safety.state}: {safety.reason}{because}")
        return verdict, Source.HOLD if verdict.held else source

    def _heed(self, safety: SafetyFilter, signal: HumanSignal, now_ns: int) -> None:
        """Do what a person asked for."""
        reason, arm = self._switches.take()
        if signal.stop:
            reason = "stopped by hand"
        if reason:
            safety.halt(reason)
            return
        if (signal.arm or arm or self._arming) and safety.state is State.HOLD:
            mend = getattr(self._recorder, "mend", None)
            if mend is not None:
                mend()
            try:
                safety.arm(now_ns)
            except RobotError as error:
                if not self._arming:
                    self._tell(str(error))
                self._arming = not safety.at_rest
                return
            self._arming = False
            self._state = State.ARMED
            self._chooser.begin()
            self._tell("armed")

    def _take(self, result: StepResult) -> tuple[StepResult, str]:
        """Take an observation up; a broken one leaves the one before in its place, with the reason."""
        try:
            seen, blind = self._arm.check_observation(result.observation), ""
        except InvalidValueError as error:
            blind = str(error)
            result = StepResult(
                dict(self._observation), result.reward, result.terminated, result.truncated, result.state,
                result.measured, result.success, result.time_ns,
            )  # fmt: skip
        else:
            self._observation = seen
        self._captured = self._received if result.time_ns is None else result.time_ns
        if self._safety is not None and not blind:
            self._safety.see(seen, self._filter_time(seen=True, steps=self.steps + 1))
        return result, blind

    def _gripper_at(self, start: StepResult) -> FloatArray | None:
        """Where the gripper of an arm that is commanded in positions stands (M,), in the action's units, if it tells."""
        if self._safety is None or start.measured is None or not self._safety.axes.absolute:
            return None
        gripper = start.measured[self._safety.axes.gripper]
        return gripper if np.isfinite(gripper).all() else None

    def _filter_time(self, seen: bool = False, steps: int | None = None) -> int:
        """The safety filter's time: the clock's, or on a lockstep arm the nominal one, which alone passes there."""
        if self._robot.lockstep:
            return (self.steps if steps is None else steps) * self._period_ns
        return self._captured if seen else self._clock.now_ns()

    def _wait(self) -> None:
        """Until the next deadline. Those that passed meanwhile are missed: nothing is sent in haste to make up for them."""
        self._deadline += self._period_ns
        behind = self._clock.now_ns() - self._deadline
        if behind > 0:
            self.missed += 1 + behind // self._period_ns
            self._deadline += (behind // self._period_ns) * self._period_ns
            return
        self._clock.sleep_until(self._deadline)

    def _record(self) -> None:
        """Give the step before to the recorder; an arm that is not lockstep has had its command by then."""
        step, self._kept = self._kept, None
        if step is None or self._recorder is None or not self._recording:
            return
        try:
            self._recorder.append(step)
        except LogWriteError as error:
            if self._robot.lockstep or self._safety is None or not hasattr(self._recorder, "mend"):
                raise
            self._trouble = ""
            self._safety.hold(str(error))

    def _stop(self, reason: str) -> None:
        if self._safety is not None and self._safety.state is not State.STOPPED:
            raise RobotError(f"no command can be sent: {reason}")
        self._robot.stop()
        self.stopped, self.ended = reason, True
