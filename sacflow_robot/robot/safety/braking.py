"""Commanded motion in discrete time, with limited speed, acceleration and jerk, that can always stop.

In period k an axis moves at the velocity v_k. Its change d_k = v_k - v_{k-1} is the acceleration times the period T, and
d_k - d_{k-1} the jerk times T squared, so that the limits say |v| <= V, |d| <= D = A T and |d_k - d_{k-1}| <= J T^2 = R.

What makes the three fit together is where a change d leads to: taken back as quickly as the jerk allows, by R a period,
it adds to the velocity, its own period included, G(d) = d + (d - R) + (d - 2R) + ... as long as the terms are positive. So a
change d keeps the speed limit for good if |v + G(d)| <= V, and the quickest stop without overshoot takes the d for which
v + G(d) = 0, or the nearest that its limits leave. G is odd, increasing and piecewise linear; its inverse is closed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Motion:
    """Limits of N axes, per control period.

    Attributes:
        period_s: T (s).
        speed: V (N,), in meters or radians per second.
        change: D (N,): largest change of the velocity from one period to the next.
        bend: R (N,): largest change of that change.
    """

    period_s: float
    speed: Array
    change: Array
    bend: Array

    @staticmethod
    def of(period_s: float, speed: Array, acceleration: Array, jerk: Array) -> Motion:
        """From limits (N,) per second, second squared and cubed; infinity for none, except the speed."""
        # Beyond these no limit can bind, and everything stays finite.
        change = np.minimum(acceleration * period_s, 2 * speed)
        return Motion(period_s, speed, change, np.minimum(jerk * period_s**2, 2 * change))

    @property
    def stop_periods(self) -> int:
        """Periods within which every axis is at rest, from any motion within the limits."""
        taper = np.ceil(self.change / self.bend)
        return int((2 * taper + np.ceil(self.speed / self.change) + 2).max(initial=0))


def lead(change: Array, bend: Array) -> Array:
    """G: what a change of velocity adds until it is taken back."""
    size = np.abs(change)
    n = np.floor(size / bend)
    return np.asarray(np.sign(change) * ((n + 1) * size - bend * n * (n + 1) / 2))


def change_for(velocity: Array, bend: Array) -> Array:
    """Inverse of :func:`lead`: the change that adds that velocity until it is taken back."""
    size = np.abs(velocity)
    n = np.floor((np.sqrt(1 + 8 * size / bend) - 1) / 2)
    return np.asarray(np.sign(velocity) * (size + bend * n * (n + 1) / 2) / (n + 1))


def allowed(motion: Motion, velocity: Array, change: Array) -> tuple[Array, Array]:
    """Least and greatest next change (N,) that keep all limits for good, from a motion that does so itself."""
    low = np.maximum(-motion.change, change - motion.bend)
    high = np.minimum(motion.change, change + motion.bend)
    low = np.maximum(low, change_for(-motion.speed - velocity, motion.bend))
    high = np.minimum(high, change_for(motion.speed - velocity, motion.bend))
    back = np.sign(change) * np.maximum(np.abs(change) - motion.bend, 0)  # always allowed, whatever rounding says
    return np.minimum(low, back), np.maximum(high, back)


def stop_change(motion: Motion, velocity: Array, change: Array) -> Array:
    """The next change (..., N) of the quickest stop, which never overshoots where the motion leaves the choice."""
    low = np.maximum(-motion.change, change - motion.bend)
    high = np.minimum(motion.change, change + motion.bend)
    return np.clip(change_for(-velocity, motion.bend), low, high)


def stop_path(motion: Motion, velocity: Array, change: Array) -> Array:
    """Displacements (P, ..., N) in this period and in those of the stop after it, for motions (..., N)."""
    path = [velocity]
    for _ in range(motion.stop_periods + 1):
        if not velocity.any():
            break
        change = stop_change(motion, velocity, change)
        velocity = velocity + change
        velocity = np.where(np.abs(velocity) < 1e-12 * motion.speed, 0.0, velocity)
        path.append(velocity)
    return np.stack(path) * motion.period_s


def reach(motion: Motion, velocity: Array, change: Array) -> Array:
    """A distance (N,) that this period and the stop after it certainly do not exceed, in either direction."""
    after = lead(change, motion.bend) - change  # what the change goes on adding after this period
    top = np.maximum(np.abs(velocity), np.abs(velocity + after))
    taper = np.abs(change) / motion.bend
    slow = top / motion.change + motion.change / motion.bend
    return top * motion.period_s * (taper + slow + 4)
