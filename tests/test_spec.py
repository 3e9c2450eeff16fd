import json
from dataclasses import replace

import numpy as np
import pytest

from sacflow_robot.errors import DataError, InvalidValueError, UsageError
from sacflow_robot.spec import PolicySpec, RobotSpec, all_finite


@pytest.fixture
def spec(robot: RobotSpec) -> PolicySpec:
    return PolicySpec(robot, 5, 4, "flow-g", (0.5,) * 19, (1.0,) * 19, {"seed": 3})


def test_spec_survives_json_and_its_fingerprint_notices_changes(spec: PolicySpec) -> None:
    again = PolicySpec.from_json(spec.to_json())
    assert again == spec
    assert again.fingerprint == spec.fingerprint
    assert replace(spec, chunk_length=6).fingerprint != spec.fingerprint


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"arm": {}}', "null", "[" * 100_000, '{"arm": 3}'])
def test_unreadable_spec_is_one_line(text: str) -> None:
    with pytest.raises(DataError, match=r"^[^\n]+$"):
        PolicySpec.from_json(text)


@pytest.mark.parametrize(
    "change", [{"chunk_length": 0}, {"chunk_length": -1}, {"chunk_length": 10**9}, {"euler_steps": 0}]
)
def test_absurd_specs_are_refused(spec: PolicySpec, change: dict[str, int]) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        PolicySpec.from_json(replace(spec, **change).to_json())
    robot = replace(spec.robot, action_low=(-1.0,) * 3)
    with pytest.raises(DataError, match="out of range"):
        PolicySpec.from_json(replace(spec, robot=robot).to_json())


def test_differences_name_every_field(robot: RobotSpec) -> None:
    changed = replace(robot, robot="UR5e", observations=robot.observations[:-1], control_rate_hz=10.0)
    found = robot.differences(changed)
    assert [line.partition(":")[0] for line in found] == ["robot", "control_rate_hz", "observation object"]
    assert "absent" in found[-1]
    assert robot.differences(robot) == []
    swapped = replace(robot, observations=robot.observations[::-1])
    (line,) = robot.differences(swapped)
    assert line.startswith("order of observations: robot0_eef_pos, ")
    assert any(line.startswith("order") for line in robot.differences(replace(swapped, robot="UR5e")))


def test_observation_is_checked(robot: RobotSpec) -> None:
    good = {a.key: np.zeros((2, *a.shape)) for a in robot.observations}
    assert robot.check_observation(good, (2,))["object"].dtype == np.float32
    with pytest.raises(InvalidValueError, match="lacks 'object'"):
        robot.check_observation({k: v for k, v in good.items() if k != "object"}, (2,))
    with pytest.raises(InvalidValueError, match=r"'object' has shape \(2, 3\), expected \(2, 10\)"):
        robot.check_observation({**good, "object": np.zeros((2, 3))}, (2,))
    with pytest.raises(InvalidValueError, match="'object' contains NaN"):
        robot.check_observation({**good, "object": np.full((2, 10), np.nan)}, (2,))


def test_action_is_clipped_and_refused_when_not_finite(robot: RobotSpec) -> None:
    assert robot.check_action([3, -3, 0, 0, 0, 0, 0.5]).tolist() == [1, -1, 0, 0, 0, 0, 0.5]
    with pytest.raises(InvalidValueError, match="not sent"):
        robot.check_action([np.nan] * 7)
    with pytest.raises(InvalidValueError, match=r"\(6,\), expected \(7,\)"):
        robot.check_action([0] * 6)


def test_quaternions_are_a_hint_that_no_file_without_it_is_refused_for(robot: RobotSpec) -> None:
    plain = replace(robot, observations=tuple(replace(a, quaternions=()) for a in robot.observations))
    assert robot.quaternions == (3, 12) and plain.quaternions == ()
    assert robot == plain and not robot.differences(plain)
    assert "quaternions" not in plain.to_json(), "fingerprints from before the hint stand"
    assert RobotSpec.from_dict(json.loads(robot.to_json())).quaternions == (3, 12)
    beyond = json.loads(robot.to_json())
    beyond["observations"][3]["quaternions"] = [8]
    with pytest.raises(DataError, match="a quaternion lies outside its array"):
        RobotSpec.from_dict(beyond)


def test_unflatten_undoes_flatten(robot: RobotSpec) -> None:
    flat = np.random.default_rng(0).standard_normal((3, 2, robot.observation_dim)).astype(np.float32)
    observation = robot.unflatten(flat)
    assert {key: array.shape for key, array in observation.items()} == {
        a.key: (3, 2, *a.shape) for a in robot.observations
    }
    assert np.array_equal(robot.flatten(observation), flat)


def test_all_finite() -> None:
    for fine in (np.zeros((0, 3), np.float32), np.array([[1, 3e38]], np.float32), np.array(-1e300)):
        assert all_finite(fine)
    for bad in (np.nan, np.inf, -np.inf):
        assert not all_finite(np.array([[1, bad]], np.float32)) and not all_finite(np.array(bad))
        assert not all_finite(np.array([[1, 2], [bad, 3]], np.float32).T)


def test_actions_between_bounds_of_their_own(robot: RobotSpec) -> None:
    assert robot.has_unit_actions and robot.with_unit_actions() == robot
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 7)).astype(np.float32)
    assert robot.to_unit(actions) is actions and robot.from_unit(actions) is actions, "not a bit of them changes"
    wide = replace(robot, action_low=(-180.0, 0.0, *[-1.0] * 5), action_high=(90.0, 0.08, *[1.0] * 5))
    assert not wide.has_unit_actions and wide.with_unit_actions() == robot
    low, high = wide.action_bounds
    found = wide.from_unit(np.stack([-np.ones(7), np.zeros(7), np.ones(7)]).astype(np.float32))
    assert np.array_equal(found[[0, 2]], [low, high]) and np.allclose(found[1], (low + high) / 2)
    assert np.allclose(wide.to_unit(found), np.outer([-1, 0, 1], np.ones(7)), atol=1e-6)
    assert np.abs(wide.to_unit(1e6 * np.ones((1, 7), np.float32))).max() == 1
    for ends in ({"action_high": (np.inf,) * 7}, {"action_low": (1.0,) * 7}, {"action_low": (np.nan,) * 7}):
        with pytest.raises(UsageError, match=f"action {robot.action_names[0]} goes from .* expected bounds"):
            replace(robot, **ends).with_unit_actions()
