"""Where commanded motions take the end effector."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Pose(NamedTuple):
    """Position (3,) in meters and unit quaternion x y z w, of the end effector, in the frame of its observation."""

    position: Array
    quat: Array


def hull(motions: Array, reflected: int) -> tuple[Array, Array]:
    """Least and greatest displacement (N,) since an observation, by commands of which it may or may not show the effect.

    Args:
        motions: Displacements commanded (M, N), oldest first.
        reflected: How many of the first of them the observation may show already, or not, or in part; it does not show
            the others. Those may have been acted on already, or not.
    """
    after = np.concatenate([np.zeros((1, motions.shape[1])), np.cumsum(motions, axis=0)])
    shown, done = after[: reflected + 1], after[reflected:]
    return done.min(0) - shown.max(0), done.max(0) - shown.min(0)


def tool_axis(quat: Array) -> Array:
    """Unit vector (3,) along the tool: the z axis of the orientation x y z w."""
    x, y, z, w = quat / np.linalg.norm(quat)
    return np.array([2 * (x * z + y * w), 2 * (y * z - x * w), 1 - 2 * (x * x + y * y)])


def tilt_along(axis: Array, turns: Array, middle: Array) -> float:
    """Largest angle (rad) to ``middle`` that an axis (3,) comes to, turned by rotation vectors (P, 3) one after another."""
    lowest = float(axis @ middle)
    for turn in turns:
        angle = float(np.sqrt(turn @ turn))
        if angle == 0:
            continue
        unit, cosine, sine = turn / angle, np.cos(angle), np.sin(angle)
        # A turn's arc may bulge out of the straight line between its ends; half-way is looked at as well.
        half, half_sine = np.cos(angle / 2), np.sin(angle / 2)
        along = unit * (unit @ axis)
        across, side = axis - along, np.cross(unit, axis)
        lowest = min(lowest, float((along + half * across + half_sine * side) @ middle))
        axis = along + cosine * across + sine * side
        lowest = min(lowest, float(axis @ middle))
    return float(np.arccos(np.clip(lowest, -1, 1)))
