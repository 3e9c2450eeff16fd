from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from sacflow_robot.episode import Episode, EpisodeBuilder, Source, StepResult
from sacflow_robot.errors import DataError
from sacflow_robot.spec import RobotSpec

MakeEpisode = Callable[..., Episode]


def test_builder_keeps_the_last_observation_and_the_whole_story_of_an_action(robot: RobotSpec) -> None:
    def result(value: float, terminated: bool = False) -> StepResult:
        observation = {a.key: np.full(a.shape, value, np.float32) for a in robot.observations}
        return StepResult(observation, float(terminated), terminated, state=np.full(32, value))

    builder = EpisodeBuilder(result(0), time_ns=5)
    proposed, commanded = np.full(7, 2, np.float32), np.ones(7, np.float32)
    builder.add(result(1), commanded, policy_action=proposed, time_ns=6)
    builder.add(result(2, True), commanded, source=Source.HUMAN, time_ns=7)
    episode = builder.build(seed=4)
    assert episode.observations["object"][:, 0].tolist() == [0, 1, 2]
    assert episode.states is not None and episode.states[-1, 0] == 2
    assert episode.policy_action[0, 0] == 2 and episode.action[0, 0] == 1
    assert episode.source.tolist() == [Source.POLICY, Source.HUMAN]
    assert episode.time_ns.tolist() == [5, 6, 7]
    assert episode.terminated.tolist() == [False, True] and not episode.truncated.any()
    assert episode.success and episode.info["seed"] == 4
    assert np.isnan(episode.measured).all()


def test_an_episode_that_just_stops_is_truncated(robot: RobotSpec) -> None:
    start = StepResult({a.key: np.zeros(a.shape, np.float32) for a in robot.observations})
    builder = EpisodeBuilder(start)
    with pytest.raises(DataError, match="without steps"):
        builder.build()
    with pytest.raises(DataError, match="without a time"):
        builder.add(start, np.zeros(7, np.float32))
    builder.add(start, np.zeros(7, np.float32), time_ns=3)
    assert builder.build().truncated.tolist() == [True]


def test_inconsistent_episodes_are_refused(make_episode: MakeEpisode, robot: RobotSpec) -> None:
    good = make_episode(4)
    bad = good.action.copy()
    bad[1, 0] = np.nan
    with pytest.raises(DataError, match="NaN"):
        replace(good, action=bad)
    with pytest.raises(DataError, match="'rewards' has 3 rows, expected 4"):
        replace(good, rewards=good.rewards[:3])
    with pytest.raises(DataError, match="'time_ns' has 4 rows, expected 5"):
        replace(good, time_ns=good.time_ns[:4])
    with pytest.raises(DataError, match="only at its last step"):
        replace(good, truncated=np.array([True, False, False, False]))
    with pytest.raises(DataError, match=r"demo: actions have 3 dimensions, task 'lift' takes 7"):
        replace(good, action=good.action[:, :3]).check_fits(robot, "demo")
