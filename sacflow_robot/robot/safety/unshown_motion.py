"""Commanded motions that no observation has shown yet."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from sacflow_robot.robot.safety.safety_limits import Array, Axes, SafetyLimits

# A commanded motion this large has to change what is observed.
_NOTICEABLE_M = 1e-3
_NOTICEABLE_RAD = 2e-3
# The most that may be commanded while what is observed does not change.
_BLIND_M = 0.02
_BLIND_RAD = 0.1


class UnshownMotion:
    """Sums up the motions (N,) of the axes since the last change of what is observed of them.

    Values that freeze while their time stamps stay fresh (a tracker, a driver's thread) would else let the robot drift without
    bound: each observation would seem to say that nothing moved. A measured value repeats to the last bit only by chance.

    Args:
        axes: What the robot's actions move.
        limits: How old observations may be, and how late commands.
        period_ns: Control period (ns).

    Attributes:
        frozen: Why the observed values count as frozen; empty while they do not.
    """

    def __init__(self, axes: Axes, limits: SafetyLimits, period_ns: int) -> None:
        self._axes = axes
        self._max_age_s = limits.max_observation_age_s
        self._span_ns = period_ns + round(limits.max_command_delay_s * 1e9)
        self._noticeable = np.where(axes.length, _NOTICEABLE_M, _NOTICEABLE_RAD)
        self._blind_path = np.where(axes.length, _BLIND_M, _BLIND_RAD)
        self._sent: deque[tuple[int, Array]] = deque()  # motions that an observation need not show by now
        self._overdue = np.zeros(len(axes.index))  # the sum of those before
        self._changed_ns = np.zeros(len(axes.index), np.int64)
        self._shown_ns = np.zeros(len(axes.index), np.int64)
        self.frozen = ""

    def begin(self) -> None:
        """Begin an episode, whose clock may start anew. What no observation has shown stays: frozen values may still be."""
        self._overdue = self.total()
        self._sent.clear()
        self._changed_ns = np.zeros_like(self._changed_ns)
        self._shown_ns = np.zeros_like(self._shown_ns)
        self.frozen = ""

    def restart_age(self, captured_ns: int) -> None:
        """Begin the frozen values' age anew; what is not shown stays: it may be where the robot is."""
        self._shown_ns = np.full_like(self._shown_ns, captured_ns)
        self.frozen = ""

    def send(self, motion: Array, now_ns: int) -> None:
        """Note a commanded motion (N,)."""
        self._sent.append((now_ns, motion))

    def total(self) -> Array:
        """Sum (N,) of the motions since the last change of what is observed of their axes."""
        total = self._overdue
        for sent_ns, motion in self._sent:
            total = total + np.where(self._changed_ns > sent_ns, 0.0, motion)
        return total

    def pending(self, captured_ns: int) -> tuple[list[Array], int]:
        """Motions (N,) that the last observation may not show, and how many of them, from the first on, it may show."""
        overdue = [self._overdue] if self._overdue.any() else []
        maybe_shown = len(overdue) + sum(sent_ns < captured_ns for sent_ns, _ in self._sent)
        return [*overdue, *(motion for _, motion in self._sent)], maybe_shown

    def see(self, same: npt.NDArray[np.bool_], captured_ns: int) -> None:
        """Drop the motions that an observation has to show by now, and add up those of axes that read as they did before.

        Args:
            same: Which axes (N,) read bit for bit what they did in the observation before.
            captured_ns: Capture time of the observation.
        """
        self._changed_ns = np.where(same, self._changed_ns, captured_ns)
        self._overdue = np.where(same, self._overdue, 0.0)
        while self._sent and self._sent[0][0] + self._span_ns <= captured_ns:
            sent_ns, motion = self._sent.popleft()
            self._overdue = self._overdue + np.where(self._changed_ns > sent_ns, 0.0, motion)
        size = np.abs(self._overdue)
        self._shown_ns = np.where(size > self._noticeable, self._shown_ns, captured_ns)
        age_s = (captured_ns - self._shown_ns) / 1e9
        frozen = (size > self._blind_path) & (age_s > self._max_age_s)
        self.frozen = ""
        if frozen.any():
            axis = int(np.argmax(np.where(frozen, size / self._blind_path, 0)))
            unit = "m" if self._axes.length[axis] else "rad"
            self.frozen = (
                f"the observed values have not changed for {age_s[axis]:.2f} s, in which {size[axis]:.2f} {unit} of "
                f"{self._axes.names[axis]!r} were commanded: they are frozen, or the robot is blocked"
            )
