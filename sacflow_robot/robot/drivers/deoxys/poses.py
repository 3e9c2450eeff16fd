"""The little rotation arithmetic that this wire needs. Quaternions are x y z w, matrices (3, 3)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def matrix_from_vector(vector: Array) -> Array:
    """Rotation matrix of a rotation vector (3,): axis times angle in radians."""
    angle = float(np.linalg.norm(vector))
    x, y, z = vector / angle if angle > 1e-12 else vector
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    rotation: Array = np.eye(3) + cross
    if angle > 1e-12:
        rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)
    return rotation


def quaternion_from_matrix(matrix: Array) -> Array:
    """Unit quaternion (4,) of a rotation matrix, the one of the two with w at least 0.

    The largest of the four squares is taken first, which no rotation makes small (Shepperd's method).
    """
    m = matrix
    squares = np.array([
        1 + m[0, 0] - m[1, 1] - m[2, 2],
        1 - m[0, 0] + m[1, 1] - m[2, 2],
        1 - m[0, 0] - m[1, 1] + m[2, 2],
        1 + m[0, 0] + m[1, 1] + m[2, 2],
    ])  # fmt: skip
    largest = int(squares.argmax())
    if largest == 0:
        quaternion = np.array([squares[0], m[0, 1] + m[1, 0], m[0, 2] + m[2, 0], m[2, 1] - m[1, 2]])
    elif largest == 1:
        quaternion = np.array([m[0, 1] + m[1, 0], squares[1], m[1, 2] + m[2, 1], m[0, 2] - m[2, 0]])
    elif largest == 2:
        quaternion = np.array([m[0, 2] + m[2, 0], m[1, 2] + m[2, 1], squares[2], m[1, 0] - m[0, 1]])
    else:
        quaternion = np.array([m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1], squares[3]])
    quaternion /= np.linalg.norm(quaternion)
    result: Array = -quaternion if quaternion[3] < 0 else quaternion
    return result


def vector_from_matrix(matrix: Array) -> Array:
    """Rotation vector (3,) of a rotation matrix, of angle at most pi."""
    quaternion = quaternion_from_matrix(matrix)
    sine = float(np.linalg.norm(quaternion[:3]))
    factor = 2 * float(np.arctan2(sine, quaternion[3])) / sine if sine > 1e-12 else 2.0
    vector: Array = factor * quaternion[:3]
    return vector
