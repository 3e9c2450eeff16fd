"""Arms commanded in positions: their limits, where they begin, and which limits fit which arm."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sacflow_robot.errors import InvalidValueError
from sacflow_robot.robot.safety.filter import SafetyFilter, State
from sacflow_robot.robot.safety.safety_limits import Box, SafetyLimits
from sacflow_robot.spec import ArraySpec, RobotSpec
from tests.robot.safety.simulated_follower import CASES, GENTLE, PERIOD, ROBOT

JOINTS = RobotSpec(
    robot="six",
    task="none",
    controller="joint position",
    control_rate_hz=20.0,
    observations=(ArraySpec("joint_pos", (3,), "deg"),),
    action_names=("a", "b", "c", "gripper"),
    action_units=("deg", "deg", "deg", "0.08 m"),
    action_low=(-180.0,) * 3 + (0.0,),
    action_high=(180.0,) * 3 + (1.0,),
)
JOINT_LIMITS = SafetyLimits(
    turn_rad_per_s=(1.0,),
    turn_acceleration_rad_per_s2=(4.0,),
    turn_jerk_rad_per_s3=(40.0,),
    joint_rad=((-1.0, 1.0), (-0.5, 2.0), (0.0, 0.2)),
    gripper_width_m=(0.01, 0.06),
    max_observation_age_s=60,
)


@given(st.lists(st.lists(st.floats(-300, 300), min_size=4, max_size=4), min_size=1, max_size=30))
@settings(max_examples=CASES)
def test_joints_commanded_in_positions_keep_their_limits_and_start_where_they_stand(targets: list[list[float]]) -> None:
    filter_ = SafetyFilter(JOINTS, JOINT_LIMITS)
    start = np.array([10.0, 20.0, 5.0], np.float32)
    filter_.see({"joint_pos": start}, 0)
    filter_.enable(0)
    sent = [start.astype(np.float64)] * 3
    now = 0
    for target in [*(t for t in targets for _ in range(4)), *[None] * 30]:
        action = filter_.step(target, now).action
        assert action is not None
        assert 0.01 - 1e-6 <= action[3] * 0.08 <= 0.06 + 1e-6 or target is None
        sent.append(action[:3].astype(np.float64))
        now += PERIOD
    places = np.radians(np.stack(sent))
    low, high = np.array(JOINT_LIMITS.joint_rad).T
    assert (places >= low - 1e-5).all() and (places <= high + 1e-5).all()
    for order, bound in ((1, 1.0), (2, 4.0), (3, 40.0)):
        rounding = 4e-6 / 0.05**order  # of angles in degrees as float32
        assert np.abs(np.diff(places, order, axis=0)).max() / 0.05**order <= bound * (1 + 1e-6) + rounding
    assert np.array_equal(sent[-1], sent[-2]), "at rest"


RANGED = replace(
    JOINTS,
    observations=(ArraySpec("joint_pos", (4,), "deg"),),
    action_units=("-90 to 90 deg", "0 to 120 deg", "-10 to 30 deg", "0 to 100 deg"),
    action_low=(-1.0,) * 4,
    action_high=(1.0,) * 4,
)


def test_positions_in_ranges_as_of_a_lerobot_arm_are_limited_and_begin_where_the_joints_stand() -> None:
    filter_ = SafetyFilter(RANGED, replace(JOINT_LIMITS, joint_rad=()))
    filter_.begin(np.array([0, 0, 0, 0.5], np.float32))
    start = np.array([45.0, 30.0, 10.0, 75.0], np.float32)
    filter_.see({"joint_pos": start}, 0)
    filter_.enable(0)
    still = filter_.step(None, 0).action
    assert still is not None and np.allclose(still, [0.5, -0.5, 0.0, 0.5]), "holding moves no joint, nor the gripper"
    sent = [still] * 3 + [filter_.step(np.ones(4), step * PERIOD).action for step in range(1, 120)]
    places = np.radians(np.stack(sent)[:, :3].astype(np.float64) * [90, 60, 20] + [0, 60, 10])  # type: ignore[arg-type]
    assert np.allclose(places[-1], np.radians([90, 120, 30]), atol=1e-6), "as far as the robot goes"
    for order, bound in ((1, 1.0), (2, 4.0), (3, 40.0)):
        assert np.abs(np.diff(places, order, axis=0)).max() / 0.05**order <= bound * (1 + 1e-6) + 4e-6 / 0.05**order


def test_positions_that_no_limit_can_be_given_for_are_refused() -> None:
    spec = replace(RANGED, action_units=("-90 to 90 deg", "0 to 100 % of range", "-10 to 30 deg", "0 to 100 deg"))
    with pytest.raises(InvalidValueError, match=r"'b' is commanded in '0 to 100 % of range'.* use_degrees"):
        SafetyFilter(spec)


def test_after_silence_positions_are_held_where_the_arm_is_not_where_it_was_told_to_be() -> None:
    filter_ = SafetyFilter(JOINTS, JOINT_LIMITS)
    filter_.see({"joint_pos": np.array([10.0, 20.0, 5.0], np.float32)}, 0)
    filter_.enable(0)
    for step in range(10):
        filter_.step([50, 50, 5, 0], step * PERIOD)
    moved, now = np.array([-20.0, 40.0, 8.0], np.float32), 60 * PERIOD
    for seen in (None, moved):  # the loop asks once more before it looks again
        if seen is not None:
            filter_.see({"joint_pos": seen}, now)
        action = filter_.step([50, 50, 5, 0], now).action
        now += PERIOD
    assert filter_.state is State.HOLD and "silent for 2550 ms" in filter_.reason
    assert action is not None and np.allclose(action[:3], moved)
    filter_.see({"joint_pos": moved - 1}, now)
    action = filter_.step(None, now).action
    assert action is not None and np.allclose(action[:3], moved), "one place, not what is seen anew"


def test_limits_that_do_not_fit_the_arm_are_refused() -> None:
    for limits, message in (
        (SafetyLimits(workspace=GENTLE.workspace), "need a robot that is commanded in x, y, z"),
        (SafetyLimits(cone=GENTLE.cone), "tool cone"),
        (SafetyLimits(joint_rad=((0, 1),) * 7), "7 joints, the robot is commanded in 3"),
    ):
        with pytest.raises(InvalidValueError, match=message):
            SafetyFilter(JOINTS, limits)
    with pytest.raises(InvalidValueError, match="no room left"):
        SafetyFilter(ROBOT, SafetyLimits(workspace=Box((0, 0, 0), (0.1, 1, 1)), tracking_margin_m=0.06))
