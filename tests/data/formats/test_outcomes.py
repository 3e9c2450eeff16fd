from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sacflow_robot.data.formats.agreement import AgreementOptions
from sacflow_robot.data.formats.demonstrations import DemoOptions, Losses, end_at_success, human_episode
from sacflow_robot.data.formats.foreign_episodes import Outcome, Recorded, judge_outcomes, reward_kind
from sacflow_robot.errors import DataError
from sacflow_robot.spec import RobotSpec

SPARSE = np.array([0.0, 0, 0, 1])
DENSE = np.array([0.1, 0.2, 0.6, 0.95])
END = np.array([False, False, False, True])


def judge(robot: RobotSpec, *recorded: Recorded, said: str, **options: Any) -> list[Outcome]:
    """The outcomes; checks that exactly ``said`` was said of them."""
    losses = Losses()
    reading = DemoOptions(robot, "Lift", agreement=AgreementOptions(**options))
    found = judge_outcomes(recorded, [4] * len(recorded), reading, "a.hdf5", losses)
    assert said in str(losses) and bool(said) == bool(str(losses))
    return found


@pytest.mark.parametrize(
    ("recorded", "options", "said", "solved"),
    [
        (Recorded(SPARSE), {}, "", [3]),
        (Recorded(2.25 * SPARSE), {}, "another scale", [3]),
        (Recorded(SPARSE - 1), {}, "rewards of -1/0", [3]),
        (Recorded(SPARSE - 1, dones=END), {"reward": "-1/0"}, "as --reward -1/0 says", [3]),
        (Recorded(0 * SPARSE), {}, "give --reward -1/0", []),
        (Recorded(0 * SPARSE), {"reward": "-1/0"}, "as --reward -1/0 says", [0, 1, 2, 3]),
        (Recorded(DENSE), {"reward": "dense", "success_above": 0.5}, "as --reward dense says", [2, 3]),
        (Recorded(DENSE - 0.5), {"reward": "sparse"}, "as --reward sparse says", [2, 3]),
        (Recorded(DENSE, solved_states=lambda: END), {}, "dense rewards: success is told from the simulator", [2, 3]),
        (Recorded(DENSE, END), {}, "success flags replace its rewards", [3]),
        (Recorded(dones=END), {}, "no rewards: success is taken from dones", [3]),
        (Recorded(dones=END, solved_states=lambda: 0 * END), {}, "taken from dones, no state follows it", [3]),
        (Recorded(solved_states=lambda: END), {}, "no rewards: success is told from the simulator's states", [2, 3]),
        (Recorded(dones=END, solved_states=lambda: None), {}, "success is taken from dones", [3]),
    ],
)
def test_every_kind_of_reward(
    robot: RobotSpec, recorded: Recorded, options: dict[str, Any], said: str, solved: list[int]
) -> None:
    (found,) = judge(robot, recorded, said=said, **options)
    assert np.flatnonzero(found.solved).tolist() == solved
    assert found.rewards.dtype == np.float32 and np.array_equal(found.rewards > 0, found.solved)


def test_what_cannot_be_told_is_refused_with_the_way_out(robot: RobotSpec) -> None:
    with pytest.raises(DataError, match=r"a\.hdf5 has dense rewards.* --reward dense --success-above X"):
        judge(robot, Recorded(DENSE, dones=END), said="")
    with pytest.raises(DataError, match=r"a\.hdf5 has no rewards"):
        judge(robot, Recorded(), said="")


def test_the_kind_is_that_of_all_episodes_together() -> None:
    assert reward_kind([SPARSE, 0 * SPARSE]) == "sparse"
    assert reward_kind([SPARSE - 1, 0 * SPARSE]) == "-1/0"
    assert reward_kind([SPARSE, DENSE]) == "dense"
    assert reward_kind([SPARSE, None]) == "absent"
    assert reward_kind([np.ones(4)]) == "dense", "one at every step says nothing of the end"
    assert reward_kind([np.ones(1), np.ones(1)]) == "sparse"
    assert reward_kind([0.4 * SPARSE], shaped=True) == "dense"


def test_a_task_of_dense_rewards_keeps_them(robot: RobotSpec) -> None:
    options = DemoOptions(robot, "HalfCheetah-v5", sparse_rewards=False)
    (found,) = judge_outcomes([Recorded(DENSE)], [4], options, "a.hdf5", Losses())
    assert np.array_equal(found.rewards, DENSE) and not found.solved.any()
    observations = {a.key: np.zeros((5, *a.shape), np.float32) for a in robot.observations}
    episode = human_episode(
        observations, np.zeros((4, 7), np.float32), robot, rewards=found.rewards, solved=found.solved
    )
    assert not episode.success and len(end_at_success(replace(episode))) == 4
