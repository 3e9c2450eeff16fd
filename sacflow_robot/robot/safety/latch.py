"""The state machine of a robot's commands. Every filter before a robot is a :class:`Latch`; its states change here only.

After a hold or a stop, nothing but ``enable`` lets actions through again. It is called for a person's explicit act, or by the
program that a person started, before the robot has moved.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.errors import InvalidValueError, RobotError
from sacflow_robot.robot.safety.safety_limits import SafetyLimits
from sacflow_robot.spec import FloatArray, RobotSpec


class State(StrEnum):
    """States, and what a filter lets through in each."""

    READY = "ready"  # nothing; never enabled, held or stopped yet: an episode may enable it
    RUNNING = "running"  # actions
    HOLD = "hold"  # a motion to rest, then standing still
    STOPPING = "stopping"  # a motion to rest, then nothing
    STOPPED = "stopped"  # nothing


class Event(Enum):
    """Causes of a change of state."""

    ENABLE = auto()  # a person's explicit act, or that of the program that a person started
    HOLD = auto()  # a person's request, or a fault that a person has to look at
    HALT = auto()  # a person's emergency stop
    REST = auto()  # no motion is commanded any more
    STOP = auto()  # nothing can or may be sent any more


TRANSITIONS: Mapping[tuple[State, Event], State] = {
    (State.READY, Event.ENABLE): State.RUNNING,  # the first episode begins
    (State.READY, Event.HOLD): State.HOLD,  # a hold counts before the first episode, too
    (State.READY, Event.HALT): State.STOPPING,  # and so does a stop
    (State.READY, Event.STOP): State.STOPPED,
    (State.RUNNING, Event.HOLD): State.HOLD,  # come to rest within the limits, and wait for a person
    (State.RUNNING, Event.HALT): State.STOPPING,  # come to rest within the limits, then be stopped
    (State.RUNNING, Event.STOP): State.STOPPED,  # at once, where braking within the limits is impossible
    (State.HOLD, Event.ENABLE): State.RUNNING,  # only at rest; the filter also wants to have seen the robot
    (State.HOLD, Event.HALT): State.STOPPING,
    (State.HOLD, Event.STOP): State.STOPPED,  # nobody came for a long time
    (State.STOPPING, Event.REST): State.STOPPED,  # the stop is complete; nothing else ends it
    (State.STOPPING, Event.STOP): State.STOPPED,
    (State.STOPPED, Event.ENABLE): State.RUNNING,  # the robot was reached anew, see ``Session.await_enabled``
}
"""The state that an event leads to. An event that is not here changes neither the state nor its reason."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The action to send in one control period.

    Attributes:
        action: The action (A,), float32; None: send nothing; if the state is stopped, stop the robot.
        state: State of the filter after this period.
        changed: Whether it differs from what was proposed, or nothing was.
        held: Whether it is a stop, or standing still, for want of an action that may be followed.
        reason: Why the filter holds, stops or has stopped; empty while it is running.
    """

    action: FloatArray | None
    state: State
    changed: bool
    held: bool
    reason: str = ""


class Latch:
    """A state that only an explicit act releases; see :data:`TRANSITIONS`.

    Attributes:
        state: Begins as ready.
        reason: Why it holds, stops or has stopped; empty while it is running.
    """

    def __init__(self) -> None:
        self.state = State.READY
        self.reason = "not enabled yet"

    @property
    def at_rest(self) -> bool:
        """True while no motion is commanded."""
        return True

    @property
    def earliest_ns(self) -> int:
        """Earliest time of the next motion (ns); 0 for at once."""
        return 0

    @property
    def settled(self) -> bool:
        """True if the state is final until another is requested; false while the robot still comes to rest."""
        return self.state is not State.STOPPING and (self.state is not State.HOLD or self.at_rest)

    @property
    def may_start(self) -> bool:
        """True if an episode may start without another act of a person: nothing held or stopped since the last one."""
        return self.state in (State.READY, State.RUNNING)

    def enable(self, now_ns: int) -> None:
        """Let actions through from now on: a person's explicit act, or that of the program that a person started.

        Raises:
            RobotError: A stop is under way, or the robot still moves.
        """
        self._check_enabling(now_ns)
        self.allow()

    def allow(self) -> None:
        """Let the next episode start: a person's explicit act between episodes, while the robot is at rest."""
        self._follow(Event.ENABLE, "")

    def hold(self, reason: str) -> None:
        """Come to rest and stay so until enabled. Does nothing to a robot that holds, stops or is stopped."""
        self._follow(Event.HOLD, reason)

    def halt(self, reason: str) -> None:
        """Emergency stop: come to rest within the limits, then be stopped."""
        self._follow(Event.HALT, reason)

    def stop(self, reason: str) -> None:
        """Send nothing any more, at once, until enabled."""
        self._follow(Event.STOP, reason)

    def rest(self) -> None:
        """Note that the robot has been told to hold: no motion is commanded any more. A stop under way is complete."""
        self._follow(Event.REST, self.reason)

    def _check_enabling(self, now_ns: int) -> None:
        if self.state is State.STOPPING:
            raise RobotError("cannot enable: the robot is still being stopped; try again in a moment")
        if not self.at_rest:
            raise RobotError("cannot enable: the robot is still coming to rest; try again in a moment")

    def _follow(self, event: Event, reason: str) -> None:
        following = TRANSITIONS.get((self.state, event))
        if following is not None:
            self.state = following
            self.reason = reason


class ActionClipper(Latch):
    """For a robot in lockstep without a profile: clips actions to bounds, and lets none through after a hold or a stop.

    A robot whose time stands still is at rest as soon as it gets no command, so it neither brakes nor is sent anything while
    it holds.

    Args:
        bounds: Lower and upper bound (A,), (A,) on top of them, in action units, e.g. those of a calibration profile.

    Attributes:
        limits: None but the defaults of how long it holds.

    Raises:
        InvalidValueError: The bounds do not have the action's dimension.
    """

    def __init__(self, robot: RobotSpec, bounds: tuple[FloatArray, FloatArray] | None = None) -> None:
        super().__init__()
        self.limits = SafetyLimits()
        self._robot = robot
        self._bounds = bounds
        if bounds is not None and any(bound.shape != (robot.action_dim,) for bound in bounds):
            shapes = " and ".join(str(bound.shape) for bound in bounds)
            raise InvalidValueError(f"action limits have shapes {shapes}, expected ({robot.action_dim},)")

    def __call__(self, proposed: npt.ArrayLike) -> FloatArray:
        """The action (A,) to send, float32.

        Raises:
            InvalidValueError: The action has the wrong shape or holds NaN or infinity; nothing may be sent.
        """
        allowed = self._robot.check_action(proposed)
        if self._bounds is None:
            return allowed
        clipped: FloatArray = np.clip(allowed, *self._bounds).astype(np.float32)
        return clipped

    def begin(self, measured: FloatArray | None = None) -> None:
        """As of a :class:`~sacflow_robot.robot.safety.filter.SafetyFilter`; there is no state to reset."""

    def see(self, observation: Mapping[str, Any], captured_ns: int, stale_reason: str = "") -> bool:
        """As of a :class:`~sacflow_robot.robot.safety.filter.SafetyFilter`; observations do not matter here."""
        return True

    def step(self, proposed: npt.ArrayLike | None, now_ns: int, due_ns: int | None = None) -> Verdict:
        """The action to send in place of a proposed one (A,); nothing where there is none, or while held or stopped."""
        self.rest()
        if self.state is not State.RUNNING or proposed is None:
            return Verdict(None, self.state, True, True, self.reason or "no action came")
        sent = self(proposed)
        return Verdict(sent, self.state, not np.array_equal(sent, np.asarray(proposed)), False)
