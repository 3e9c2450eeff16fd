import math

import numpy as np
import pytest

from sacflow_robot.envs.demonstrations import collect, demonstrate
from sacflow_robot.envs.experts.expert import make_expert
from sacflow_robot.envs.experts.primitives import nearest_yaw
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.tasks import TASKS
from sacflow_robot.episode import Source
from sacflow_robot.errors import UnknownNameError


def test_mixed_demonstrations_are_good_but_not_perfect_and_reproducible() -> None:
    seen = []
    episodes = collect("lift", "mixed", range(24), 2, seen.append)
    assert [e.info["seed"] for e in seen] == list(range(24))
    solved = sum(e.success for e in episodes)
    assert 14 <= solved <= 23
    lengths = [len(e) for e in episodes]
    assert max(lengths) > 2 * min(lengths), "demonstrators differ in speed"
    assert all((e.source == Source.EXPERT).all() and np.abs(e.action).max() <= 1 for e in episodes)
    assert all(e.info["expert"] == "mixed" for e in episodes)
    again = demonstrate("lift", "mixed", 5)
    assert np.array_equal(again.action, episodes[5].action)
    assert np.array_equal(again.states, episodes[5].states)


@pytest.mark.parametrize("task", TASKS)
def test_the_proficient_expert_solves_every_task_in_both_ways(task: str) -> None:
    ways = {make_expert(task, seed, "proficient").first_way for seed in range(4)}
    assert ways == {True, False}
    for seed in range(4):
        episode = demonstrate(task, "proficient", seed)
        assert episode.success and len(episode) < TASKS[task].horizon


def show(task: str, seed: int, first_way: bool) -> tuple[bool, float, float]:
    """Whether the task was solved, the hand's yaw (rad) when it first closed, and the gripper command at the end."""
    env, expert = RobosuiteEnv(task), make_expert(task, seed, "proficient")
    expert._hand.first_way = first_way
    result, yaw, action = env.begin(seed), math.nan, np.zeros(7)
    while not result.ended:
        action = expert.act(result.observation)
        if math.isnan(yaw) and action[-1] > 0:
            yaw = expert._hand.yaw
        result = env.command(action)
    return result.terminated, yaw, float(action[-1])


@pytest.mark.parametrize(("task", "starts"), [("stack", (3, 6)), ("can", (0, 1)), ("square", (17, 31))])
def test_the_two_ways_grasp_with_the_hand_turned_otherwise(task: str, starts: tuple[int, ...]) -> None:
    """From starts where both are about as short; elsewhere there is but one."""
    for seed in starts:
        (first_solved, first, _), (second_solved, second, _) = (show(task, seed, way) for way in (True, False))
        assert first_solved and second_solved
        assert 0.8 < abs(first - second) < 3.5


def test_the_two_ways_of_opening_a_door_pull_with_fingers_closed_and_open() -> None:
    for seed in range(2):
        assert show("door", seed, True)[::2] == (True, 1.0)
        assert show("door", seed, False)[::2] == (True, -1.0)


def test_poor_is_worse_than_mixed_is_worse_than_proficient() -> None:
    solved = {
        quality: sum(e.success for e in collect("stack", quality, range(16), 2, lambda _: None))
        for quality in ("poor", "mixed", "proficient")
    }
    assert solved["poor"] + 2 <= solved["mixed"] <= solved["proficient"] == 16


def test_nearest_yaw() -> None:
    assert nearest_yaw(3.0, 0.1, np.pi / 2) == pytest.approx(3.0 - np.pi)
    assert nearest_yaw(-0.2, 0.0, np.pi) == pytest.approx(-0.2)


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="valid names: can, door, lift, square, stack"):
        make_expert("juggle", 0)
    with pytest.raises(UnknownNameError, match="valid names: mixed, poor, proficient"):
        make_expert("lift", 0, "perfect")  # type: ignore[arg-type]
