"""Rotations as unit quaternions x y z w, rotation vectors (axis times angle, rad) and matrices, one or many at once."""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def normalize(quat: Array) -> Array:
    """Quaternions (..., 4) scaled to norm 1."""
    return np.asarray(quat / np.linalg.norm(quat, axis=-1, keepdims=True))


def multiply(a: Array, b: Array) -> Array:
    """Products (..., 4) of quaternions: b first, then a."""
    ax, ay, az, aw = np.moveaxis(a, -1, 0)
    bx, by, bz, bw = np.moveaxis(b, -1, 0)
    return np.stack(
        [
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
            aw * bw - ax * bx - ay * by - az * bz,
        ],
        axis=-1,
    )


def rotation_between(a: Array, b: Array) -> Array:
    """Rotation vectors (..., 3) in the world's axes that take orientations a to b (..., 4)."""
    return to_rotation_vector(multiply(b, a * np.array([-1.0, -1.0, -1.0, 1.0])))


def rotated(quat: Array, vector: Array) -> Array:
    """Orientations (..., 4) turned by rotation vectors (..., 3) in the world's axes."""
    return multiply(from_rotation_vector(vector), quat)


def from_rotation_vector(vector: Array) -> Array:
    """Quaternions (..., 4) of rotation vectors (..., 3)."""
    angle = np.linalg.norm(vector, axis=-1, keepdims=True)
    half_sinc = np.where(angle > 1e-12, np.sin(angle / 2) / np.maximum(angle, 1e-12), 0.5)
    return np.concatenate([vector * half_sinc, np.cos(angle / 2)], axis=-1)


def to_rotation_vector(quat: Array) -> Array:
    """Rotation vectors (..., 3) of quaternions (..., 4), of angles from 0 to pi."""
    quat = np.where(quat[..., 3:] < 0, -quat, quat)
    sine = np.linalg.norm(quat[..., :3], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, quat[..., 3:])
    return np.asarray(quat[..., :3] * np.where(sine > 1e-12, angle / np.maximum(sine, 1e-12), 2.0))


def to_matrix(quat: Array) -> Array:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4)."""
    x, y, z, w = np.moveaxis(quat, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def from_matrix(matrix: Array) -> Array:
    """Quaternion (4,) of a rotation matrix (3, 3), the one of the two with w at least 0.

    Shepperd's method: the column of the outer product of the quaternion with itself that has the largest square.
    """
    m = matrix
    outer = np.array([
        [1 + m[0, 0] - m[1, 1] - m[2, 2], m[0, 1] + m[1, 0], m[0, 2] + m[2, 0], m[2, 1] - m[1, 2]],
        [m[0, 1] + m[1, 0], 1 - m[0, 0] + m[1, 1] - m[2, 2], m[1, 2] + m[2, 1], m[0, 2] - m[2, 0]],
        [m[0, 2] + m[2, 0], m[1, 2] + m[2, 1], 1 - m[0, 0] - m[1, 1] + m[2, 2], m[1, 0] - m[0, 1]],
        [m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1], 1 + m[0, 0] + m[1, 1] + m[2, 2]],
    ])  # fmt: skip
    quat = normalize(outer[int(outer.diagonal().argmax())])
    return -quat if quat[3] < 0 else quat


def vector_to_matrix(vector: Array) -> Array:
    """Rotation matrices (..., 3, 3) of rotation vectors (..., 3)."""
    return to_matrix(from_rotation_vector(vector))


def matrix_to_vector(matrix: Array) -> Array:
    """Rotation vector (3,) of a rotation matrix (3, 3), of an angle from 0 to pi."""
    return to_rotation_vector(from_matrix(matrix))


def without_jumps(quats: Array) -> Array:
    """The same orientations (M, 4), each of the sign nearest to the one before."""
    flips = np.cumsum(np.append(0, np.sum(quats[1:] * quats[:-1], axis=1) < 0)) % 2
    return np.asarray(quats * np.where(flips, -1.0, 1.0)[:, None])


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
