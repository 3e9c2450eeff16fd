from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.calibrate.profile import load_profile, with_story, write_profile
from sacflow_robot.errors import DataError, SpecMismatchError
from sacflow_robot.spec import RobotSpec

SHIPPED = Path(__file__).parents[2] / "calibration" / "sim_panda.yaml"


def test_limits_are_in_action_units_and_within_the_arms_own(robot: RobotSpec) -> None:
    profile = load_profile(SHIPPED)
    assert [bound.tolist() for bound in profile.action_limits(robot)] == [[-1] * 7, [1] * 7]
    gentle = replace(profile, max_translation_per_step_m=0.01, max_rotation_per_step_rad=9.0)
    low, high = gentle.action_limits(robot)
    assert high == pytest.approx([0.2] * 3 + [1] * 4) and np.array_equal(low, -high)
    with pytest.raises(SpecMismatchError, match="for 'Panda', the robot is 'UR5e'"):
        profile.action_limits(replace(robot, robot="UR5e"))


def test_what_the_safety_filter_enforces_is_read_in_physical_units(robot: RobotSpec) -> None:
    profile = load_profile(SHIPPED.with_name("panda.yaml"))
    limits = profile.safety_limits(robot)
    assert limits.speed_m_per_s == (0.85,) * 3 and limits.turn_rad_per_s == (1.25,)
    assert limits.keep_out[0].name == "the robot's own base" and limits.keep_out[0].high == (-0.4, 0.2, 1.35)
    assert limits.cone is not None and limits.cone.angle_rad == 0.8 and len(limits.joint_rad) == 7
    per_step = replace(profile, max_translation_per_step_m=0.01).safety_limits(robot)
    assert per_step.speed_m_per_s == pytest.approx((0.2,) * 3), "what a step may be and how fast go together"
    assert len({limits.sha256, per_step.sha256, profile.safety_limits(robot).sha256}) == 2
    with pytest.raises(SpecMismatchError, match="the robot is 'UR5e'"):
        profile.safety_limits(replace(robot, robot="UR5e"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "max_translation_per_step_m: 0.05",
            "max_translation_per_step: 0.05",
            "missing keys: max_translation_per_step_m;",
        ),
        ("max_translation_per_step_m: 0.05", "max_translation_per_step_m: -1", "is -1, expected a positive number"),
        ("max_translation_per_step_m: 0.05", "max_translation_per_step_m: .inf", "expected a positive number"),
        ("max_translation_per_step_m: 0.05", "max_translation_per_step_m: five", "is 'five', expected"),
        ("max_translation_per_step_m: 0.05", "max_translation_per_step_m: 1:30", "is 90, expected"),
        ("version: 3", "version: one", "version is 'one', expected a whole number"),
        ("date: 2026-11-23", "date: 2026-13-45", "cannot be read"),
        ("robot: Panda", "robot: [", "cannot be read"),
        ("patience_s: 0.1", "patience: 0.1", "safety: unknown keys: patience; known are max_speed_m_per_s"),
        ("patience_s: 0.1", "patience_s: -1", "safety: patience_s is -1, expected a number from 0 to 10"),
        ("patience_s: 0.1", "max_jerk_m_per_s3: [1, 2]", "max_jerk_m_per_s3 is .*, expected one positive number, or 3"),
        ("patience_s: 0.1", "max_speed_m_per_s: 0", "expected positive numbers"),
        ("x: [-0.6, 0.6]", "x: [0.6, -0.6]", "workspace_m.x is .* whose lowest is not below its highest"),
        ("x: [-0.6, 0.6], ", "", "workspace_m is .*, expected x, y and z"),
        ("patience_s: 0.1", "tool_cone: {axis: [0, 0, -2], angle_rad: 1}", "tool_cone.axis is -2, expected a number"),
        ("patience_s: 0.1", "tool_cone: {axis: [0, 0, -0.5], angle_rad: 1}", "which is not of length 1"),
    ],
)
def test_bad_profiles(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(SHIPPED.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        load_profile(path)
    with pytest.raises(DataError, match=r"no calibration profile .*; name the robot's own with --profile FILE"):
        load_profile(tmp_path / "absent.yaml")


def test_measured_sections_are_read_with_their_story_and_change_the_digest(tmp_path: Path) -> None:
    for name in ("sim_panda.yaml", "franka_twin.yaml", "template.yaml"):
        profile = load_profile(SHIPPED.with_name(name))
        assert profile.measured and profile.model.number("controller.translation_stiffness_per_s2") == 150
    friction = load_profile(SHIPPED.with_name("franka_twin.yaml")).measured["joints.friction_loss_nm"]
    assert len(friction.value) == len(friction.uncertainty) == 7 and "Gaz" in friction.method
    changed = tmp_path / "changed.yaml"
    changed.write_text(SHIPPED.read_text().replace("mass_kg: {value: 0.0", "mass_kg: {value: 0.1"))
    assert load_profile(changed).sha256 != load_profile(SHIPPED).sha256


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mass_kg: {value: 0.0", "mass: {value: 0.0", "payload.mass lacks its unit, or has another; write mass_kg"),
        ("mass_kg: {value: 0.0", "mass_kg: {value: -1", "payload.mass_kg is -1, expected a number from 0 to 20"),
        ("mass_kg: {value: 0.0", "mass_kg: {value: .nan", "expected a finite number"),
        ("actuator_delay_ms: {value: 0.0", "actuator_delay_ms: {value: 21", "from 0 to 20"),
        ("payload:\n", "payload:\n  weight_n: 1\n", "unknown key payload.weight_n"),
        ("robot: Panda", "robot: Panda\nversion: 9", "version given twice"),
        ("payload:\n", "payload: 3\nhand_eye:\n", "payload is 3, expected keys and values"),
        (
            "joints:\n",
            "joints:\n  zero_offset_rad: {value: 6.3, uncertainty: 0, date: 2026-01-01, method: x}\n",
            "wraps around",
        ),
    ],
)
def test_bad_measured_sections(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "profile.yaml"
    text = SHIPPED.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=message) as caught:
        load_profile(path)
    assert "\n" not in str(caught.value)


def test_an_update_keeps_the_words_about_limits_and_counts_the_version_up(tmp_path: Path) -> None:
    values = {"payload.mass_kg": (np.array([0.25]), np.array([0.01])), "transport.jitter_ms": (np.ones(1), np.ones(1))}
    new, path = with_story(values, "scales"), tmp_path / "mine.yaml"
    before, made = load_profile(SHIPPED), write_profile(path, SHIPPED, new)
    assert made.version == before.version + 1 and made.safety == before.safety
    assert {**before.measured, **new} == dict(made.measured)
    assert "# Policies were trained without limits of acceleration" in path.read_text()
    again = write_profile(path, path, {})
    assert again.measured == made.measured, "in place, too"
    with pytest.raises(DataError, match=r"not possible: payload\.mass_kg is 30"):
        with_story({"payload.mass_kg": (np.array([30.0]), np.zeros(1))}, "scales")
