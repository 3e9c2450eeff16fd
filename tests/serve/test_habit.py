"""How an answer is waited for."""

from __future__ import annotations

import numpy as np
import pytest

from sacflow_robot.serve.habit import Habit


@pytest.mark.parametrize(("awake_s", "asleep_s", "often"), [(1e-4, 2e-4, True), (2e-3, 2e-4, False)])
def test_the_way_of_waiting_that_brings_answers_sooner_is_taken(awake_s: float, asleep_s: float, often: bool) -> None:
    habit, ways = Habit(), []
    for _ in range(1000):
        ways.append(habit.awake())
        habit.learn(ways[-1], awake_s if ways[-1] else asleep_s)
    assert ways[:2] == [True, False] and 0.9 < ways.count(often) / 1000 < 0.95
    assert habit.patience_s == pytest.approx(2 * min(awake_s, asleep_s), rel=0.05)
    for _ in range(3000):  # it changes its mind when things change
        habit.learn(way := habit.awake(), asleep_s if way else awake_s)
    assert [habit.awake() for _ in range(512)].count(often) == 4


def test_chance_does_not_change_it() -> None:
    rng = np.random.default_rng(0)
    habit, wrong = Habit(), 0
    for i in range(100_000):
        way = habit.awake()
        wrong += i >= 1000 and not way
        habit.learn(way, (3e-4 if way else 3.5e-4) * rng.lognormal(0, 0.25))
    assert wrong < 0.02 * 100_000


def test_answers_that_never_came_teach_nothing() -> None:
    habit = Habit()
    for i in range(2000):
        way = habit.awake()
        if i % 3 == 0:
            habit.learn(way, 1e-4 if way else 2e-4)
    assert habit.awake() and habit.patience_s == pytest.approx(2e-4, rel=0.05)
