from collections.abc import Callable
from dataclasses import replace

import numpy as np

from sacflow_robot.data.formats.demonstrations import human_parts
from sacflow_robot.data.replay_buffer import Origin, ReplayBuffer
from sacflow_robot.episode import Episode
from sacflow_robot.spec import RobotSpec


def test_the_stretches_that_a_person_had_the_arm(make_episode: Callable[..., Episode]) -> None:
    source = np.array([0, 1, 1, 1, 0, 3, 1, 1], np.uint8)
    human = np.where(source[:, None] == 1, np.arange(8.0)[:, None], np.nan).astype(np.float32).repeat(7, axis=1)
    episode = replace(make_episode(8), source=source, intervention_action=human)
    first, last = human_parts(episode)
    assert first.intervention_action is not None and first.intervention_action[:, 0].tolist() == [1, 2, 3]
    assert np.array_equal(first.action, episode.action[1:4]) and len(first.time_ns) == 4
    assert first.observations["robot0_eef_pos"][:, 0].tolist() == [1, 2, 3, 4]
    assert first.truncated[-1] and not first.terminated.any() and first.success
    assert last.terminated[-1] and not last.truncated[-1] and last.info["taken_over_at"] == 6
    assert human_parts(make_episode(5)) == []


def test_parts_are_sampled_as_demonstrations(make_episode: Callable[..., Episode], robot: RobotSpec) -> None:
    episode = replace(make_episode(20, seed=3), source=np.repeat(np.array([0, 1, 0], np.uint8), [8, 6, 6]))
    buffer = ReplayBuffer(robot, 5, 0.99, 100)
    (part,) = human_parts(episode)
    buffer.append(part, Origin.DEMOS)
    buffer.append(episode, Origin.REPLAY)
    batch = buffer.sample(200, np.random.default_rng(0), {Origin.DEMOS: 1.0})
    steps = batch.observation[:, 0]
    assert steps.min() == 8 and steps.max() == 13
    assert not batch.critic_valid[steps >= 10].any() and batch.critic_valid[steps < 10].all()
