"""Whatever comes in, what leaves the filter is within the limits; the robot is a simulated follower with delays."""

import contextlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sacflow_robot.errors import RobotError
from sacflow_robot.robot.safety.filter import SafetyFilter, State
from sacflow_robot.robot.safety.safety_limits import Box, SafetyLimits
from tests.robot.safety.simulated_follower import CASES, GENTLE, PERIOD, ROBOT, Follower, Watch, enabled

NUMBERS = st.one_of(
    st.floats(-1.5, 1.5), st.sampled_from([1.0, -1.0, 0.0]), st.floats(allow_nan=True, allow_infinity=True)
)
STEADY = st.builds(lambda row, n: [row] * n, st.lists(st.floats(-1, 1), min_size=7, max_size=7), st.integers(5, 30))
ROW = st.lists(st.floats(-1, 1), min_size=7, max_size=7)
ODD = st.one_of(
    st.lists(NUMBERS, min_size=7, max_size=7),
    st.lists(NUMBERS, max_size=9),
    st.none(),
    st.just("full speed ahead"),
    st.just([[0.0] * 7]),
    st.just([1e30] * 7),
)
STREAM = st.lists(st.one_of(STEADY, st.lists(ROW, max_size=8), st.lists(ODD, max_size=3)), min_size=1, max_size=8)


@given(
    st.data(),
    STREAM,
    st.integers(0, 2),
    st.integers(0, 2),
    st.booleans(),
)
@settings(max_examples=CASES)
def test_whatever_arrives_no_command_breaks_a_limit_and_the_arm_stays_where_it_may_be(
    data: st.DataObject, stream: list[list[Any]], command_delay: int, sight_delay: int, late: bool
) -> None:
    limits = replace(GENTLE, max_command_delay_s=command_delay * PERIOD / 1e9)
    filter_, robot, watch = SafetyFilter(ROBOT, limits), Follower(command_delay, sight_delay), Watch()
    now = 10**9
    filter_.see(*robot.look(now))
    filter_.enable(now)
    odd = data.draw(st.lists(st.sampled_from(["see", "blind", "nan", "old", "future"]), max_size=6)) if late else []
    for proposed in [row for part in stream for row in part] + [None] * 2:
        seen, captured = robot.look(now)
        sight = odd.pop() if odd else "see"
        if sight == "nan":
            seen = {**seen, "robot0_eef_pos": np.full(3, np.nan, np.float32)}
        if sight == "old":
            captured -= 10**9
        if sight != "blind":
            filter_.see(seen, captured)
        due = now - (data.draw(st.sampled_from([0, 3 * PERIOD, -PERIOD])) if late and sight == "future" else 0)
        verdict = filter_.step(proposed, now, due)
        assert verdict.action is not None, "it stops on its own only after seconds of rest"
        watch.check(verdict.action)
        watch.check_place(robot.move(verdict.action), robot.tilt)
        if filter_.state is State.HOLD and filter_.at_rest and data.draw(st.booleans()):
            filter_.see(*robot.look(now))
            with contextlib.suppress(RobotError):
                filter_.enable(now)
        now += PERIOD
    for _ in range(round(filter_.stop_s * 20) + 1):  # silence
        filter_.see(*robot.look(now))
        verdict = filter_.step(None, now)
        assert verdict.action is not None and verdict.held
        watch.check(verdict.action)
        watch.check_place(robot.move(verdict.action), robot.tilt)
        now += PERIOD
        if watch.at_rest:
            break
    assert watch.at_rest, f"at rest within {filter_.stop_s} s of silence"


def test_a_turn_that_is_seen_already_is_not_taken_for_one_to_come() -> None:
    """With delays both ways, turns back and forth near the cone's edge: found by the test above among 2,500 cases."""
    limits = replace(GENTLE, max_command_delay_s=2 * PERIOD / 1e9)
    filter_, robot, now = SafetyFilter(ROBOT, limits), Follower(2, 2), 10**9
    filter_.see(*robot.look(now))
    filter_.enable(now)
    still, tilt, both = [0.0] * 7, [0, 0, 0, 0, -1, 0, 0], [0, 0, 0, -1, -1, 0, 0]
    for proposed in [still] * 5 + [tilt] * 12 + [[1e30] * 7, "nothing"] + [both] * 5 + [still] * 15 + [None] * 12:
        filter_.see(*robot.look(now))
        action = filter_.step(proposed, now).action
        assert action is not None
        robot.move(action)
        assert robot.tilt <= 0.6 + 1e-5
        if filter_.state is State.HOLD and filter_.at_rest:
            filter_.see(*robot.look(now))
            filter_.enable(now)
        now += PERIOD


def test_what_is_within_the_limits_passes_to_the_last_bit() -> None:
    filter_, rng = enabled(SafetyLimits(workspace=Box((-9, -9, -9), (9, 9, 9)))), np.random.default_rng(0)
    body = Follower(0, 0)
    for step in range(50):
        action = rng.uniform(-1, 1, 7).astype(np.float32)
        verdict = filter_.step(action, step * PERIOD)
        assert verdict.action is not None and np.array_equal(verdict.action, action) and not verdict.changed
        body.move(verdict.action)
        filter_.see(body.look(0)[0], (step + 1) * PERIOD)


def test_an_arm_outside_its_workspace_may_only_come_back_and_is_not_armed_where_it_must_not_be() -> None:
    filter_ = enabled(GENTLE, position=(0.3, 0, 0.3))
    out = filter_.step([1, 0, 0, 0, 0, 0, 0], 0).action
    assert out is not None and out[0] == 0
    filter_ = enabled(GENTLE, position=(0.3, 0, 0.3))
    back = filter_.step([-1, 0, 0, 0, 0, 0, 0], 0).action
    assert back is not None and back[0] < 0
    with pytest.raises(RobotError, match="inside the post, which it must keep out of"):
        enabled(GENTLE, position=(0.15, 0, 0.1))
