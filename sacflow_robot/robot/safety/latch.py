"""The state machine of a robot's commands. Every filter before a robot is a :class:`Latch`; its states change here only.

After a hold or a stop, nothing but ``enable`` lets actions through again. It is called for a person's explicit act, or by the
program that a person started, before the robot has moved.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from sacflow_robot.errors import RobotError
from sacflow_robot.spec import FloatArray


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
        held: Whether it is a stop, or standing still because there is no action that may be followed.
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
