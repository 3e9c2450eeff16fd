"""Configuration, recording and result of an episode: the parts between a policy and a robot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sacflow_robot.episode import Episode, Step, StepResult
from sacflow_robot.errors import LogWriteError, SpecMismatchError
from sacflow_robot.interfaces import GripperLimited, Policy, Recorder, ResilientRecorder, Robot
from sacflow_robot.robot.control.action_queue import ActionSource
from sacflow_robot.robot.control.operator import Operator
from sacflow_robot.robot.control.timing import LoopTiming
from sacflow_robot.robot.drivers.wrappers import unwrapped
from sacflow_robot.robot.safety.action_clipper import ActionClipper
from sacflow_robot.robot.safety.filter import SafetyFilter
from sacflow_robot.robot.teleop.intervention import Label
from sacflow_robot.spec import RobotSpec

if TYPE_CHECKING:
    from sacflow_robot.calibrate.profile import Profile

Safety = SafetyFilter | ActionClipper


@dataclass(frozen=True)
class RunConfig:
    """Everything about an episode beside the robot, the policy and the seed.

    Attributes:
        policy_version: Version of the policy, for the log.
        safety: Passes every command; None for :func:`default_safety`. Starting an episode enables it, unless it was held or
            stopped since.
        actions: Source of the actions; None for the policy, chunk by chunk, open loop.
        operator: Everything through which a person controls the robot.
        recorder: Gets every step as it is taken. After an error on the way, the episode is ended there and marked
            interrupted.
        info: More to record about the episode; JSON values.
        max_steps: Steps after which the episode is cut; None for no limit.
        enable_wait_s: Longest wait between two episodes for a person to enable the robot again (s).
        tell: Gets what a person has to know at once: held, stopped, enabled. Must not wait.
    """

    policy_version: str = ""
    safety: Safety | None = None
    actions: ActionSource | None = None
    operator: Operator = field(default_factory=Operator)
    recorder: Recorder | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    max_steps: int | None = None
    enable_wait_s: float = 60.0
    tell: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class EpisodeRun:
    """One episode and how well the loop kept time.

    Attributes:
        episode: The episode, as recorded.
        overruns: Steps whose action was not ready within one control period: of its observation on a lockstep robot, of its
            deadline on any other.
        timing: Times at which its commands were sent.
        held: Steps on which the robot was held, or stood still because no action came.
        stopped: Why the robot was stopped; empty if it was not.
        label: How a person judged the episode; None if nobody did.
    """

    episode: Episode
    overruns: int
    timing: LoopTiming
    held: int = 0
    stopped: str = ""
    label: Label | None = None


class StepRecording:
    """The recording of one episode: each step in the period after it, when a robot that moves has had its next command.

    Args:
        recorder: Gets the steps; None records nothing.
        wait: Whether a step that cannot be kept is an error at once, as on a robot that stands still meanwhile. Else a
            resilient recorder keeps it for later.
    """

    def __init__(self, recorder: Recorder | None, wait: bool) -> None:
        self._recorder = recorder
        self._wait = wait
        self._step: Step | None = None  # taken, and not yet given to the recorder
        self._begun = False

    def begin(self, start: StepResult, captured_ns: int, info: Mapping[str, Any]) -> None:
        if self._recorder is not None:
            self._recorder.begin(start, captured_ns, info)
            self._begun = True

    def take(self, step: Step) -> None:
        """Take a step, for the next :meth:`flush`."""
        self._step = step

    def flush(self) -> str:
        """Give the step to the recorder; the reason why a resilient one could not write it, else empty.

        Raises:
            LogWriteError: The recorder cannot keep the step.
        """
        step = self._step
        self._step = None
        if step is None or self._recorder is None or not self._begun:
            return ""
        try:
            self._recorder.append(step)
        except LogWriteError as error:
            if self._wait or not isinstance(self._recorder, ResilientRecorder):
                raise
            return str(error)
        return ""

    def mend(self) -> None:
        """Have a resilient recorder try again."""
        if isinstance(self._recorder, ResilientRecorder):
            self._recorder.mend()

    def end(self, info: Mapping[str, Any]) -> None:
        if self._recorder is not None and self._begun:
            self.flush()
            self._begun = False
            self._recorder.end(info)


def default_safety(robot: Robot, profile: Profile | None = None) -> Safety:
    """Bounds and a latch for a robot in lockstep; the safety filter for any other, or with a profile of safety limits.

    A `GripperLimited` robot also gets the profile's gripper limits.

    Args:
        profile: Calibration profile whose limits hold on top of the robot's own.

    Raises:
        SpecMismatchError: The profile is of another robot.
    """
    if profile is None:
        return ActionClipper(robot.spec) if robot.lockstep else SafetyFilter(robot.spec)
    if profile.safety is None and robot.lockstep:
        return ActionClipper(robot.spec, profile.action_limits(robot.spec))
    limits = profile.safety_limits(robot.spec)
    inner = unwrapped(robot)
    if isinstance(inner, GripperLimited):
        inner.limit_gripper(limits.gripper_force_n, limits.gripper_width_m)
    return SafetyFilter(robot.spec, limits)


def check_fit(policy: Policy, robot: RobotSpec) -> None:
    """Refuse a policy that was made for another robot.

    Raises:
        SpecMismatchError: They differ; the message names every field that does.
    """
    different = robot.differences(policy.spec.robot)
    if different:
        raise SpecMismatchError(f"the policy does not fit the robot (robot, policy): {'; '.join(different)}")
