from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sacflow_robot.learn.config import LearnerConfig, TrainConfig
from sacflow_robot.learn.schedule import RegularizationSchedule

LEARNER = LearnerConfig(bc_coef=0.5, bc_coef_final=0.1, warmup_steps=1000, discount=0.9)


def make(kind: Any, **learner: Any) -> RegularizationSchedule:
    changed = replace(LEARNER, bc_schedule=kind, **learner)
    return RegularizationSchedule(TrainConfig(online_steps=5000, learner=changed))


def episode(steps: int, solved: bool) -> np.ndarray:
    rewards = np.zeros(steps, np.float32)
    rewards[-1] = solved
    return rewards


def test_constant_is_what_was_configured() -> None:
    assert [make("constant").weight(n) for n in (0, 3000, 9000)] == [0.5] * 3


def test_linear_by_hand() -> None:
    weights = [make("linear").weight(n) for n in (0, 1000, 3000, 5000, 9000)]
    assert weights == pytest.approx([0.5, 0.5, 0.3, 0.1, 0.1])


def test_adaptive_lets_go_while_better_than_cloning_and_holds_while_worse() -> None:
    schedule = make("adaptive")
    for i in range(20):
        schedule.observe(episode(20, i % 2 == 0), warming_up=True)
    assert schedule.weight(1000) == 0.5
    for _ in range(9):
        schedule.observe(episode(10, True), warming_up=False)
    assert schedule.weight(1500) == 0.5, "too few to tell"
    for _ in range(3):
        schedule.observe(episode(10, True), warming_up=False)
    assert schedule.weight(1500) == pytest.approx(0.5 * 0.9**3), "solved more often, and sooner"
    for _ in range(60):
        schedule.observe(episode(10, True), warming_up=False)
    assert schedule.weight(3000) == pytest.approx(0.1), "never below the final weight"
    for _ in range(60):
        schedule.observe(episode(20, False), warming_up=False)
    assert schedule.weight(4500) == pytest.approx(0.5), "never above the configured one"


def test_solving_sooner_counts_as_better_and_as_good_changes_nothing() -> None:
    sooner, same = make("adaptive"), make("adaptive")
    for schedule, steps in ((sooner, 15), (same, 20)):
        for _ in range(20):
            schedule.observe(episode(20, True), warming_up=True)
        for _ in range(20):
            schedule.observe(episode(steps, True), warming_up=False)
    assert sooner.weight(2000) < 0.2 and same.weight(2000) == 0.5


def test_goes_on_where_it_was() -> None:
    schedule, again = make("adaptive"), make("adaptive")
    for warming_up in (True, False):
        for _ in range(15):
            schedule.observe(episode(10 if warming_up else 5, True), warming_up=warming_up)
    again.load_state_dict(schedule.state_dict())
    for one in (schedule, again):
        one.observe(episode(5, True), warming_up=False)
    assert schedule.state_dict() == again.state_dict() and schedule.weight(2000) < 0.5
