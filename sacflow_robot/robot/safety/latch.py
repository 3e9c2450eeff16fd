"""The states of a robot's commands: enabled, hold, stopped. Every filter before a robot is a :class:`Latch`.

    request   from enabled           from hold            from stopped
    hold      hold                 hold                 stopped
    halt      hold, then stopped   hold, then stopped   stopped
    stop      stopped              stopped              stopped
    robot       enabled                enabled, at rest only  enabled

``halt`` ends in ``stopped`` as soon as no motion is commanded. Nothing but an explicit act of a person, or the program that
a person starts, calls ``arm`` or ``allow``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sacflow_robot.spec import FloatArray


class State(StrEnum):
    """What a filter lets through."""

    ENABLED = "enabled"
    HOLD = "hold"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What may be sent in one control period.

    Attributes:
        action: The action (A,), float32; None: send nothing; if the state is stopped, stop the robot.
        state: The filter's state.
        changed: Whether it differs from what was proposed, or nothing was.
        held: Whether it is a stop, or standing still, for want of an action that may be followed.
        reason: Why the filter holds or has stopped; empty while it is enabled.
    """

    action: FloatArray | None
    state: State
    changed: bool
    held: bool
    reason: str = ""


class Latch:
    """A state that only an explicit act releases.

    Attributes:
        state: Begins as hold.
        reason: Why it holds or has stopped; empty while enabled.
    """

    def __init__(self) -> None:
        self.state = State.HOLD
        self.reason = "not enabled yet"
        self._halting = False
        self._fresh = True  # neither held nor stopped since it was made or last enabled

    @property
    def at_rest(self) -> bool:
        """Whether no motion is commanded."""
        return True

    @property
    def settled(self) -> bool:
        """Whether the state is final until somebody asks for another: false while the robot still comes to rest."""
        return self.state is not State.HOLD or (self.at_rest and not self._halting)

    @property
    def may_start(self) -> bool:
        """Whether an episode may start without another act of a person: nothing held or stopped since the last one."""
        return self.state is State.ENABLED or self._fresh

    def allow(self) -> None:
        """Let the next episode start: a person's explicit act between episodes, while the robot is at rest."""
        self._release()

    def hold(self, reason: str) -> None:
        """Come to rest and stay so until enabled. Does nothing to a robot that holds or is stopped."""
        if self.state is State.ENABLED or (self.state is State.HOLD and self._fresh):
            self.state, self.reason = State.HOLD, reason
        self._fresh = False

    def halt(self, reason: str) -> None:
        """Emergency stop: come to rest within the limits, then be stopped."""
        self.hold(reason)
        if self.state is State.HOLD:
            self.reason, self._halting = reason, True

    def stop(self, reason: str) -> None:
        """Send nothing any more, at once, until enabled."""
        self._fresh = False
        if self.state is not State.STOPPED:
            self.state, self.reason = State.STOPPED, reason

    def rest(self) -> None:
        """Note that the robot has been told to hold: no motion is commanded any more. A stop under way is complete."""
        if self.state is State.HOLD and self._halting:
            self.stop(self.reason)

    def _release(self) -> None:
        self.state, self.reason = State.ENABLED, ""
        self._halting, self._fresh = False, True
