"""When the filter holds and stops, how it comes to rest, and how that ends."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sacflow_robot.errors import RobotError
from sacflow_robot.robot.safety.filter import State
from tests.robot.safety.simulated_follower import GENTLE, PERIOD, Follower, Watch, enabled


@pytest.mark.parametrize(
    ("proposed", "reason"),
    [
        (np.full(7, np.nan), "the action contains NaN or infinity"),
        (np.zeros(6), r"has shape \(6,\), expected \(7,\)"),
        ("go", "is not an action"),
    ],
)
def test_what_cannot_be_an_action_is_a_hold_at_once_and_stays_one(proposed: Any, reason: str) -> None:
    filter_ = enabled(GENTLE)
    filter_.step(np.ones(7), 0)
    verdict = filter_.step(proposed, PERIOD)
    assert filter_.state is State.HOLD and verdict.held and verdict.action is not None
    assert re.search(reason, filter_.reason)
    for step in range(2, 12):
        verdict = filter_.step(np.ones(7), step * PERIOD)
    assert filter_.state is State.HOLD and verdict.action is not None and not verdict.action[:6].any()
    with pytest.raises(RobotError, match="cannot enable: the last observation is"):
        filter_.enable(12 * PERIOD)
    filter_.see(*Follower(0, 0).look(12 * PERIOD))
    filter_.enable(12 * PERIOD)
    assert filter_.state is State.RUNNING


def test_actions_that_are_missing_late_or_out_of_order_are_a_hold_within_two_periods() -> None:
    for lateness, proposed in ((0, None), (3 * PERIOD, np.ones(7))):
        filter_ = enabled(replace(GENTLE, max_observation_age_s=5))
        for step in range(4):
            filter_.step(np.ones(7), step * PERIOD)
        states = []
        for step in range(4, 8):
            filter_.step(proposed, step * PERIOD, step * PERIOD - lateness)
            states.append(filter_.state)
        assert states == [State.RUNNING, State.RUNNING, State.HOLD, State.HOLD], "two periods after the first was due"
    filter_ = enabled(GENTLE)
    first = filter_.step(np.ones(7), 0, 0)
    verdict = filter_.step(-np.ones(7), PERIOD, -1)
    assert verdict.held and first.action is not None and verdict.action is not None, "older than the one before"


def test_a_stop_is_latched_and_comes_by_itself_after_a_long_hold() -> None:
    filter_ = enabled(replace(GENTLE, hold_to_stop_s=1.0, max_observation_age_s=60))
    filter_.hold("a hand")
    for step in range(40):
        verdict = filter_.step(np.ones(7), step * PERIOD)
    assert filter_.state is State.STOPPED and verdict.action is None and verdict.reason == "held for 1 s: a hand"
    filter_.hold("again")
    assert filter_.state is State.STOPPED
    filter_ = enabled(replace(GENTLE, max_observation_age_s=60))
    filter_.step(np.ones(7), 0)
    filter_.halt("pressed")
    steps = 1
    while filter_.step(np.ones(7), steps * PERIOD).action is not None:
        steps += 1
    assert (
        filter_.state is State.STOPPED
        and filter_.reason == "pressed"
        and steps * PERIOD <= (filter_.stop_s + 0.1) * 1e9
    )


def test_a_clock_that_goes_back_is_a_hold_that_comes_to_rest_within_the_limits() -> None:
    filter_, watch = enabled(replace(GENTLE, max_observation_age_s=60)), Watch()
    times = [step * PERIOD for step in range(12)] + [step * PERIOD for step in range(3, 60)]
    for now in times:
        action = filter_.step([0.2, 0, 0, 0, 0, 0, 0], now).action
        assert action is not None
        watch.check(action)
    assert filter_.state is State.HOLD and "clock went back by 400 ms" in filter_.reason and watch.at_rest


def test_one_time_in_the_future_is_a_hold_that_a_person_can_end() -> None:
    filter_, body = enabled(replace(GENTLE, max_observation_age_s=60)), Follower(0, 0)
    seen, _ = body.look(0)
    assert filter_.see(seen, 3600 * 10**9)
    for step in range(1, 6):
        filter_.step(np.zeros(7), step * PERIOD)
    assert filter_.state is State.HOLD and "in the future" in filter_.reason
    assert filter_.see(seen, 6 * PERIOD), "it is not the older one"
    filter_.enable(6 * PERIOD)
    assert filter_.step(np.zeros(7), 6 * PERIOD).reason == "" and filter_.state is State.RUNNING


def test_a_new_episode_does_not_begin_with_the_grip_of_the_last() -> None:
    filter_ = enabled(GENTLE)
    filter_.step([0, 0, 0, 0, 0, 0, 1], 0)
    filter_.begin()
    filter_.see(*Follower(0, 0).look(PERIOD))
    filter_.enable(PERIOD)
    action = filter_.step(None, PERIOD).action
    assert action is not None and action[6] == 0
