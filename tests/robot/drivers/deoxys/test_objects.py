"""Where objects are, as functions and trackers tell it."""

import json
import time

import numpy as np
import pytest

from sacflow_robot.errors import RobotError, WireError
from sacflow_robot.robot.drivers.deoxys.config import DeoxysConfig
from sacflow_robot.robot.drivers.deoxys.driver import DeoxysRobot
from sacflow_robot.robot.drivers.deoxys.objects import Sighting, parse_sighting
from sacflow_robot.robot.drivers.deoxys.twin import FrankaTwin
from sacflow_robot.utils.rotations import from_matrix, matrix_to_vector, vector_to_matrix
from tests.robot.drivers.waiting import eventually

pytestmark = pytest.mark.realtime


def test_a_function_can_tell_where_objects_are(config: DeoxysConfig, live: FrankaTwin) -> None:
    pose = np.array([0.5, 0.1, 0.0, 0, 0, 0, 1.0])
    seen = lambda: Sighting({"cube": pose}, time.monotonic_ns())  # noqa: E731
    robot = DeoxysRobot(config, seen)
    robot.connect()
    start = robot.begin(0)
    world = pose[:3] + np.array(config.base_pos_in_world)
    assert np.allclose(start.observation["object"][:7], [*world, *pose[3:]], atol=1e-6)
    assert np.allclose(start.observation["object"][7:], world - start.observation["robot0_eef_pos"], atol=1e-6)
    robot._source = lambda: Sighting({"ball": pose}, time.monotonic_ns())
    assert eventually(lambda: "ball" in (robot._wire.sighting.poses if robot._wire and robot._wire.sighting else {}))
    with pytest.raises(RobotError, match="'cube' is not seen; seen are: ball"):
        robot.observe()
    robot.close()


def test_poses() -> None:
    rng = np.random.default_rng(0)
    for vector in (*rng.uniform(-1.7, 1.7, (200, 3)), np.zeros(3), np.array([np.pi, 0, 0]), np.array([0, 1e-9, 0])):
        matrix = vector_to_matrix(vector)
        assert np.allclose(matrix @ matrix.T, np.eye(3)) and np.linalg.det(matrix) > 0
        assert np.allclose(vector_to_matrix(matrix_to_vector(matrix)), matrix, atol=1e-7)
        angle = np.linalg.norm(vector)
        expected = np.append(vector * (np.sin(angle / 2) / angle if angle else 0.5), np.cos(angle / 2))
        assert abs(abs(from_matrix(matrix) @ expected) - 1) < 1e-9


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"poses": {"cube": [0, 0, 0, 0, 0, 0]}}',
        b'{"poses": {"cube": [0, 0, NaN, 0, 0, 0, 1]}}',
        b'{"poses": {"cube": [0, 0, 0, 0, 0, 0, 2]}}',
        b'{"poses": {}, "age_s": -1}',
        b'{"poses": {}, "age_s": "old"}',
    ],
)
def test_poses_that_are_none_are_refused(data: bytes) -> None:
    with pytest.raises(WireError, match="object poses cannot be read"):
        parse_sighting(data, 0)


def test_a_tracker_may_say_how_old_its_poses_are() -> None:
    data = json.dumps({"poses": {"cube": [0, 0, 0, 0, 0, 0, 1]}, "age_s": 0.05}).encode()
    seen = parse_sighting(data, 1_000_000_000)
    assert (seen.time_ns, seen.solved, seen.frame) == (950_000_000, None, -1)
