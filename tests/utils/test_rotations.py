"""Rotations agree with one another in every form."""

import numpy as np
import pytest

from sacflow_robot.utils import rotations

VECTORS = np.array([[0, 0, 0], [0.1, 0, 0], [0, -2, 1], [1e-13, 0, 0], [0, 0, np.pi], [2, 1, -1.5]], np.float64)


def test_vectors_quaternions_and_matrices_are_turned_into_one_another() -> None:
    quats = rotations.from_rotation_vector(VECTORS)
    assert np.linalg.norm(quats, axis=1) == pytest.approx(1)
    assert rotations.to_rotation_vector(quats) == pytest.approx(VECTORS)
    matrices = rotations.to_matrix(quats)
    for quat, matrix, vector in zip(quats, matrices, VECTORS, strict=True):
        assert rotations.from_matrix(matrix) == pytest.approx(quat if quat[3] >= 0 else -quat)
        assert matrix @ matrix.T == pytest.approx(np.eye(3), abs=1e-12) and matrix @ vector == pytest.approx(vector)
        assert rotations.to_matrix(rotations.from_rotation_vector(vector)) == pytest.approx(matrix)


def test_a_product_turns_first_by_the_right_factor() -> None:
    a, b = rotations.from_rotation_vector(VECTORS[1]), rotations.from_rotation_vector(VECTORS[2])
    both = rotations.to_matrix(rotations.multiply(a, b))
    assert both == pytest.approx(rotations.to_matrix(a) @ rotations.to_matrix(b))


def test_what_lies_between_two_orientations_takes_one_to_the_other() -> None:
    quats = rotations.from_rotation_vector(VECTORS)
    between = rotations.rotation_between(quats[:-1], quats[1:])
    reached = rotations.rotated(quats[:-1], between)
    assert np.abs(np.sum(reached * quats[1:], axis=1)) == pytest.approx(1)
    assert np.linalg.norm(between, axis=1).max() <= np.pi + 1e-9


def test_signs_follow_the_quaternion_before() -> None:
    quats = rotations.from_rotation_vector(np.linspace(0, 3, 20)[:, None] * np.array([0, 0, 1.0]))
    flipped = quats * np.where(np.arange(20) % 3, 1.0, -1.0)[:, None]
    assert rotations.without_jumps(flipped) == pytest.approx(-quats)
