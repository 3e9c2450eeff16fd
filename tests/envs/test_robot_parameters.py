import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sacflow_robot.envs.robot_parameters import (
    QUANTITIES,
    Measured,
    RobotParameters,
    check_value,
    model_of,
    read_measured,
    read_sections,
)

STORY = {"date": "2026-11-23", "method": "by hand"}


@st.composite
def models(draw: st.DrawFn) -> RobotParameters:
    values = {}
    for name in draw(st.sets(st.sampled_from(sorted(QUANTITIES)))):
        q = QUANTITIES[name]
        values[name] = tuple(draw(st.floats(q.low, q.high)) for _ in range(q.count))
    return RobotParameters(values)


@given(models())
def test_a_model_survives_being_written(model: RobotParameters) -> None:
    assert RobotParameters.from_json(model.to_json()) == model
    assert model.having({}).to_json() == model.to_json()
    assert all(len(model.values[name]) == QUANTITIES[name].count for name in model)


@given(st.floats(allow_nan=True, allow_infinity=True).filter(lambda x: not abs(x) <= math.pi))
def test_no_angle_wraps_around_in_silence(angle: float) -> None:
    with pytest.raises(ValueError, match=r"wraps around|finite"):
        check_value("joints.zero_offset_rad", [0, 0, angle, 0, 0, 0, 0])


def test_one_number_stands_for_all_joints_and_sensors_are_found_by_key() -> None:
    model = RobotParameters({"joints.friction_loss_nm": 0.5, "sensors.object.noise_m": (1e-3,)})  # type: ignore[dict-item]
    friction = model.array("joints.friction_loss_nm")
    assert friction is not None and np.array_equal(friction, [0.5] * 7)
    assert list(model.sensor("object")) == ["noise_m"] and model.sensor("robot0_eef_pos") == {}
    assert model.part("sensors").values == {"sensors.object.noise_m": (1e-3,)}
    assert model.array("payload.center_m") is None and model.number("payload.mass_kg") == 0.0


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("joints.friction_loss", {"value": 1}, "lacks its unit, or has another; write friction_loss_nm"),
        ("transport.command_delay_s", {"value": 1}, "write command_delay_ms"),
        ("joints.color", {"value": 1}, "unknown key joints.color; known are damping_nm_s_per_rad"),
        ("wings.span_m", {"value": 1}, "unknown section 'wings'"),
        ("payload.mass_kg", {"value": -0.1}, "is -0.1, expected a number from 0 to 20"),
        ("payload.mass_kg", {"value": math.nan}, "expected a finite number"),
        ("payload.mass_kg", {"value": True}, "expected a finite number"),
        ("payload.center_m", {"value": [0, 0]}, "has 2 numbers, expected 3"),
        ("joints.zero_offset_rad", {"value": 6.29}, "6.29 rad, which wraps around"),
        ("payload.mass_kg", {"value": 1, "uncertainty": -1}, "uncertainty is -1"),
        ("payload.mass_kg", {"value": 1, "uncertainty": math.inf}, "uncertainty is inf"),
        ("payload.mass_kg", {"value": 1, "date": "yesterday"}, "date is 'yesterday'"),
        ("payload.mass_kg", {"value": 1, "method": " "}, "method is ' '"),
        ("sensors.object.noise", {"value": 1}, "write noise_m or noise_rad"),
    ],
)
def test_what_a_profile_may_not_say(name: str, entry: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_measured(name, {"uncertainty": 0.0, **STORY, **entry})


def test_sections_become_measured_values() -> None:
    entry = {"value": 0.2, "uncertainty": 0.01, **STORY}
    found = read_sections({"payload": {"mass_kg": entry}, "sensors": {"object": {"noise_m": entry}}})
    assert found["payload.mass_kg"] == Measured((0.2,), (0.01,), "2026-11-23", "by hand")
    assert model_of(found).number("sensors.object.noise_m") == 0.2
    with pytest.raises(ValueError, match="expected a map of date, method, uncertainty, value"):
        read_sections({"payload": {"mass_kg": 0.2}})
