from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.calibrate.profile import load_profile
from sacflow_robot.errors import DataError, SpecMismatchError
from sacflow_robot.spec import ArmSpec

SHIPPED = Path(__file__).parents[2] / "calibration" / "sim_panda.yaml"


def test_limits_are_in_action_units_and_within_the_arms_own(arm: ArmSpec) -> None:
    profile = load_profile(SHIPPED)
    assert [bound.tolist() for bound in profile.action_limits(arm)] == [[-1] * 7, [1] * 7]
    gentle = replace(profile, max_translation_per_step_m=0.01, max_rotation_per_step_rad=9.0)
    low, high = gentle.action_limits(arm)
    assert high == pytest.approx([0.2] * 3 + [1] * 4) and np.array_equal(low, -high)
    with pytest.raises(SpecMismatchError, match="for 'Panda', the arm is 'UR5e'"):
        profile.action_limits(replace(arm, robot="UR5e"))


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
        ("version: 1", "version: one", "version is 'one', expected a whole number"),
        ("date: 2026-11-22", "date: 2026-13-45", "cannot be read"),
        ("robot: Panda", "robot: [", "cannot be read"),
    ],
)
def test_bad_profiles(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(SHIPPED.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        load_profile(path)
    with pytest.raises(DataError, match="cannot be read"):
        load_profile(tmp_path / "absent.yaml")
