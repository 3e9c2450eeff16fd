from __future__ import annotations

import numpy as np
import pytest

from sacflow_robot.envs.expert import make_expert
from sacflow_robot.envs.workers import collect, demonstrate
from sacflow_robot.episode import Source
from sacflow_robot.errors import UnknownNameError


def test_demonstrations_are_good_but_not_perfect_and_reproducible() -> None:
    seen = []
    episodes = collect("lift", range(24), 2, seen.append)
    assert [e.info["seed"] for e in seen] == list(range(24))
    solved = sum(e.success for e in episodes)
    assert 14 <= solved <= 23
    lengths = [len(e) for e in episodes]
    assert max(lengths) > 2 * min(lengths), "demonstrators differ in speed"
    assert all((e.source == Source.EXPERT).all() and np.abs(e.commanded).max() <= 1 for e in episodes)
    again = demonstrate("lift", 5)
    assert np.array_equal(again.commanded, episodes[5].commanded)
    assert np.array_equal(again.states, episodes[5].states)


def test_unknown_task() -> None:
    with pytest.raises(UnknownNameError, match="valid names: lift"):
        make_expert("juggle", 0)
