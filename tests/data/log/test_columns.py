"""An episode's info in its row."""

import numpy as np
import pytest

from sacflow_robot.data.log.columns import INFO_BYTES, info_row, parse_info
from sacflow_robot.envs.robot_parameters import QUANTITIES, RobotParameters
from sacflow_robot.errors import DataError


def every_quantity() -> RobotParameters:
    """A model that holds all there is, each number with as many digits as a draw has."""
    rng = np.random.default_rng(0)
    drawn = {n: tuple(rng.uniform(max(q.low, -1), min(q.high, 9), q.count).tolist()) for n, q in QUANTITIES.items()}
    sensors = {f"sensors.{key}.noise_m": (rng.random() / 1e3,) for key in ("robot0_eef_pos", "object")}
    return RobotParameters({**drawn, **sensors})


def test_info_is_kept_exactly_even_a_whole_arm_model() -> None:
    for info in ({}, {"seed": 3, "success": True}, {"arm_model": every_quantity().to_json(), "twin": None}):
        row = info_row(info)
        assert row.shape == (INFO_BYTES,)
        assert parse_info(row) == info


def test_info_that_does_not_fit_even_deflated_is_refused() -> None:
    noise = np.random.default_rng(0).bytes(3 * INFO_BYTES).hex()
    with pytest.raises(DataError, match="shorten it"):
        info_row({"note": noise})


def test_a_damaged_row_is_no_info() -> None:
    row = info_row({"arm_model": every_quantity().to_json()}).copy()
    row[40:80] = 255
    with pytest.raises(ValueError, match="not JSON"):
        parse_info(row)
