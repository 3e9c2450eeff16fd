"""Orientations, many at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def rotation_between(a: Array, b: Array) -> Array:
    """Rotation vectors (M, 3) in the world's axes that take orientations x y z w (M, 4) to others."""
    x, y, z, w = a.T
    bx, by, bz, bw = b.T
    vector = np.stack(
        [w * bx - x * bw - by * z + bz * y, w * by - y * bw - bz * x + bx * z, w * bz - z * bw - bx * y + by * x],
        axis=1,
    )
    cosine = bw * w + bx * x + by * y + bz * z
    vector = np.where(cosine[:, None] < 0, -vector, vector)
    sine = np.linalg.norm(vector, axis=1, keepdims=True)
    angle = 2 * np.arctan2(sine, np.abs(cosine)[:, None])
    out: Array = np.where(sine > 1e-12, vector / np.maximum(sine, 1e-12) * angle, 2 * vector)
    return out


def from_rotation_vector(vectors: Array) -> Array:
    """Orientations x y z w (M, 4) of rotation vectors (M, 3)."""
    angle = np.linalg.norm(vectors, axis=1, keepdims=True)
    half_sinc = np.where(angle > 1e-12, np.sin(angle / 2) / np.maximum(angle, 1e-12), 0.5)
    return np.concatenate([vectors * half_sinc, np.cos(angle / 2)], axis=1)


def multiply(a: Array, b: Array) -> Array:
    """Products (M, 4) of quaternions x y z w: b first, then a."""
    ax, ay, az, aw = a.T
    bx, by, bz, bw = b.T
    return np.stack(
        [
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
            aw * bw - ax * bx - ay * by - az * bz,
        ],
        axis=1,
    )


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
