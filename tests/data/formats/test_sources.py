"""Episode logs against the robot and task that they are to serve."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sacflow_robot.data.formats.agreement import AgreementOptions
from sacflow_robot.data.formats.demonstrations import DemoOptions, DemoSet
from sacflow_robot.data.formats.sources import load_demos, read_demos, write_demos
from sacflow_robot.data.log.episode_writer import write_log
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, SpecMismatchError, UnknownNameError
from sacflow_robot.spec import RobotSpec

Make = Callable[..., Episode]


def options(robot: RobotSpec, **agreement: Any) -> DemoOptions:
    return DemoOptions(robot, "Lift", agreement=AgreementOptions(**agreement))


def test_a_log_of_another_rate_or_robot(make_episode: Make, robot: RobotSpec, tmp_path: Path) -> None:
    theirs = replace(robot, robot="UR5e", control_rate_hz=10.0)
    episode = make_episode(6)
    episode = replace(episode, time_ns=2 * episode.time_ns, action=np.full_like(episode.action, 0.5))
    write_log(tmp_path / "a.zarr", theirs, [episode])
    with pytest.raises(SpecMismatchError, match=r"robot UR5e.*--as-robot Panda\); the file says 10 Hz.*--resample"):
        read_demos(tmp_path / "a.zarr", options(robot))
    demos = read_demos(tmp_path / "a.zarr", options(robot, resample=True, as_robot="Panda"))
    (found,) = demos.episodes
    assert demos.robot == robot and len(found) == 12 and found.success
    assert np.diff(found.time_ns).tolist() == [50_000_000] * 12
    assert np.allclose(found.action[:, :6], found.action[0, 0]) and 0.4 < found.action[0, 0] < 0.5
    assert "left out: flags" not in str(demos.losses) and "resampled from 10 to 20 Hz" in str(demos.losses)


def test_a_log_is_measured_against_its_own_rate_before_it_is_resampled(
    make_episode: Make, robot: RobotSpec, tmp_path: Path
) -> None:
    write_log(tmp_path / "a.zarr", replace(robot, control_rate_hz=10.0), [make_episode(12)])
    with pytest.raises(DataError, match="its timestamps are 20 Hz apart, and the file says 10 Hz"):
        read_demos(tmp_path / "a.zarr", options(robot, resample=True))


@pytest.mark.parametrize("suffix", [".zarr", ".hdf5", ".lerobot"])
@pytest.mark.parametrize("other", [lambda r: r - 1, lambda r: np.linspace(0.1, 0.9, len(r), dtype=np.float32)])
def test_other_rewards_of_a_file_written_here_become_the_tasks(
    make_episode: Make, robot: RobotSpec, tmp_path: Path, other: Callable[[Any], Any], suffix: str
) -> None:
    """Converted they are kept, learned from they are those that the task gives."""
    episode = make_episode(6)
    written = replace(episode, rewards=other(episode.rewards))
    write_demos(tmp_path / f"a{suffix}", DemoSet(robot, [written]))
    assert np.array_equal(read_demos(tmp_path / f"a{suffix}", options(robot)).episodes[0].rewards, written.rewards)
    demos = load_demos(tmp_path / f"a{suffix}", options(robot))
    assert demos.episodes[0].rewards.tolist() == [0, 0, 0, 0, 0, float(episode.success)]
    assert "rewards other than 0 and 1" in str(demos.losses)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (np.zeros(13, np.int64), "episode 1: its timestamps are all 0 s"),
        (np.arange(13)[::-1] * 50_000_000, "episode 1, step 1: its timestamp runs backwards"),
        (np.arange(13) * 20_000_000, "50 Hz apart, and the file says 20 Hz"),
    ],
)
@pytest.mark.parametrize("suffix", [".zarr", ".hdf5"])
def test_times_that_contradict_the_rate(
    make_episode: Make, robot: RobotSpec, tmp_path: Path, times: np.ndarray, message: str, suffix: str
) -> None:
    episodes = [make_episode(3), replace(make_episode(12), time_ns=times.astype(np.int64))]
    write_demos(tmp_path / f"a{suffix}", DemoSet(robot, episodes))
    with pytest.raises(DataError, match=message):
        read_demos(tmp_path / f"a{suffix}", options(robot))


def test_a_file_written_here_that_contradicts_its_own_env_args(
    make_episode: Make, robot: RobotSpec, tmp_path: Path
) -> None:
    said = {"env_name": "Lift", "env_kwargs": {"robots": ["Panda"], "control_freq": 10}}
    write_demos(tmp_path / "a.hdf5", DemoSet(robot, [make_episode(3)], said))
    with pytest.raises(SpecMismatchError, match=r"env_args does not agree .* says 10 Hz"):
        read_demos(tmp_path / "a.hdf5", options(robot))


@pytest.mark.parametrize("suffix", [".zarr", ".hdf5"])
def test_a_subset_of_any_format(make_episode: Make, robot: RobotSpec, tmp_path: Path, suffix: str) -> None:
    demos = DemoSet(robot, [make_episode(n) for n in (3, 4, 5)], masks={"train": [2, 0], "none": []})
    write_demos(tmp_path / f"a{suffix}", demos)
    found = read_demos(tmp_path / f"a{suffix}", options(robot, filter_key="train"))
    assert [len(e) for e in found.episodes] == [3, 5] and found.masks["train"] == [1, 0]
    with pytest.raises(UnknownNameError, match="valid names: none, train"):
        read_demos(tmp_path / f"a{suffix}", options(robot, filter_key="test"))
    with pytest.raises(DataError, match="'none' is empty"):
        read_demos(tmp_path / f"a{suffix}", options(robot, filter_key="none"))


@pytest.mark.parametrize("suffix", [".zarr", ".hdf5"])
def test_times_of_a_robot_in_lockstep_say_nothing_of_its_rate(
    make_episode: Make, robot: RobotSpec, tmp_path: Path, suffix: str
) -> None:
    quick = replace(make_episode(12), time_ns=np.arange(13) * 1_000_000)
    before = {"clock": "monotonic of the robot's computer"}  # which a log from before it was kept says alone
    for i, info in enumerate(({"lockstep": True}, before)):
        write_demos(tmp_path / f"{i}{suffix}", DemoSet(robot, [replace(quick, info={**quick.info, **info})]))
        assert len(read_demos(tmp_path / f"{i}{suffix}", options(robot)).episodes) == 1
    own_time = replace(quick, info={**quick.info, **before, "lockstep": False})
    write_demos(tmp_path / f"own{suffix}", DemoSet(robot, [own_time]))
    with pytest.raises(DataError, match="1000 Hz apart, and the file says 20 Hz"):
        read_demos(tmp_path / f"own{suffix}", options(robot))
    backwards = replace(quick, time_ns=quick.time_ns[::-1].copy(), info={**quick.info, "lockstep": True})
    write_demos(tmp_path / f"back{suffix}", DemoSet(robot, [backwards]))
    with pytest.raises(DataError, match="runs backwards"):
        read_demos(tmp_path / f"back{suffix}", options(robot))
