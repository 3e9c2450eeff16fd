from __future__ import annotations

import numpy as np
import pytest

from sacflow_robot.envs.experts.expert import make_expert
from sacflow_robot.envs.experts.habits import draw_habits
from sacflow_robot.envs.experts.hand import Hand, nearest_yaw
from sacflow_robot.envs.tasks import TASKS
from sacflow_robot.envs.workers import collect, demonstrate
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
    assert all((e.source == Source.EXPERT).all() and np.abs(e.commanded).max() <= 1 for e in episodes)
    assert all(e.info["expert"] == "mixed" for e in episodes)
    again = demonstrate("lift", "mixed", 5)
    assert np.array_equal(again.commanded, episodes[5].commanded)
    assert np.array_equal(again.states, episodes[5].states)


@pytest.mark.parametrize("task", TASKS)
def test_the_proficient_expert_solves_every_task_in_both_ways(task: str) -> None:
    ways = {make_expert(task, seed, "proficient").first_way for seed in range(4)}
    assert ways == {True, False}
    for seed in range(4):
        episode = demonstrate(task, "proficient", seed)
        assert episode.success and len(episode) < TASKS[task].horizon


def test_the_two_ways_of_grasping_differ() -> None:
    """The can is grasped with the fingers turned to one side or to the other."""
    yaws: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(4):
        episode = demonstrate("can", "proficient", seed)
        hand = Hand(draw_habits("proficient", np.random.default_rng(0)), np.random.default_rng(0), first_way=True)
        closing = int(np.argmax(episode.commanded[:, -1] > 0))
        hand.see({key: column[closing] for key, column in episode.observations.items()})
        yaws[make_expert("can", seed, "proficient").first_way].append(hand.yaw)
    assert yaws[True] == pytest.approx([0.5] * len(yaws[True]), abs=0.2)
    assert yaws[False] == pytest.approx([-0.5] * len(yaws[False]), abs=0.2)


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
