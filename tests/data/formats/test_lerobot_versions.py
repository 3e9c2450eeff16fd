"""Datasets from elsewhere, of v2.0, v2.1 and v3.0 and of any robot: what is read of them."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sacflow_robot.data.formats.sources import demo_spec, kind_of, write_demos
from sacflow_robot.episode import Episode
from tests.data.formats.lerobot_data import JOINTS, VERSIONS, Recorded, data_file, edit_frames, read, refusal


@pytest.mark.parametrize("version", VERSIONS)
def test_any_robots_dataset(version: str, tmp_path: Path) -> None:
    recorded = Recorded(version, lengths=(5, 3, 4), tasks=("Pick up the cube", "Stack the cubes"))
    demos, frames = read(recorded.write(tmp_path / "a")), recorded.frames()
    robot, ends = demos.robot, [0, 5, 8, 12]
    assert (robot.robot, robot.task, robot.controller) == ("so101_follower", "2 tasks", "unknown")
    assert (
        robot.control_rate_hz == 30 and robot.action_names == tuple(JOINTS) and robot.action_units == ("unknown",) * 6
    )
    assert [(a.key, a.shape, a.unit) for a in robot.observations] == [("observation.state", (6,), "unknown")]
    for i, episode in enumerate(demos.episodes):
        rows = slice(ends[i], ends[i + 1])
        assert np.array_equal(episode.action, frames["action"][rows]), "bit for bit, nothing clipped"
        assert np.array_equal(episode.observations["observation.state"][:-1], frames["observation.state"][rows])
        assert episode.info["task"] == recorded.task(i)
        assert np.array_equal(episode.time_ns, np.round(np.arange(len(episode) + 1) * 1e9 / 30))
    said = str(demos.losses)
    assert "images are left out: observation.images.front" in said and "no success is recorded" in said


def test_bounds_are_those_of_the_recorded_actions_with_a_margin(tmp_path: Path) -> None:
    action = np.zeros((8, 4), np.float32)
    action[:, 0] = np.linspace(-80, 120, 8)
    action[:, 1] = np.linspace(-1, 0.3, 8)  # normalized: it ends at -1
    action[:, 2] = [0, 1] * 4  # a gripper, open or closed
    action[:, 3] = 5  # never moved
    robot = demo_spec(Recorded(columns={"action": action}).write(tmp_path / "a"))
    assert robot.action_names == ("action_0", "action_1", "action_2", "action_3"), (
        "6 names are not those of 4 dimensions"
    )
    assert robot.action_low == pytest.approx((-90, -1, 0, 4.75)) and robot.action_high == pytest.approx(
        (130, 1, 1, 5.25)
    )


def test_other_names_and_shapes(tmp_path: Path) -> None:
    """As openpi's and GR00T's datasets have them: no prefix, names in groups, scalars, matrices, float64."""
    columns = {
        "actions": np.linspace(0, 1, 16).reshape(8, 2),
        "state": np.linspace(0, 3, 24).reshape(8, 3).astype(np.float32),
        "marker": np.arange(32, dtype=np.float32).reshape(8, 2, 2),
        "gripper": np.arange(8, dtype=np.int64),
        "next.done": np.arange(8) == 7,
    }
    recorded = Recorded(columns=columns, names={"actions": {"motors": ["x", "y"]}}, robot_type=None)
    frames = recorded.frames()
    recorded.frames = lambda: {k: v for k, v in frames.items() if k not in ("action", "observation.state")}  # type: ignore[method-assign]
    demos = read(recorded.write(tmp_path / "a"))
    assert demos.robot.robot == "unknown" and demos.robot.action_names == ("x", "y")
    shapes = {a.key: a.shape for a in demos.robot.observations}
    assert shapes == {"observation.state": (3,), "marker": (2, 2), "gripper": (1,)}, "a log has a column 'state'"
    assert np.array_equal(demos.episodes[1].observations["marker"][:-1], columns["marker"][5:])
    assert np.array_equal(demos.episodes[0].observations["gripper"][:5, 0], np.arange(5))
    assert "rounded to float32: actions" in str(demos.losses)


def test_rewards_and_success_of_the_dataset(tmp_path: Path) -> None:
    columns = {"next.reward": np.eye(8, dtype=np.float32)[4], "next.done": np.isin(np.arange(8), (4, 7))}
    demos = read(Recorded(columns=columns).write(tmp_path / "a"))
    assert [e.success for e in demos.episodes] == [True, False]
    assert [bool(e.terminated[-1]) for e in demos.episodes] == [True, False]


@pytest.mark.parametrize("version", VERSIONS)
def test_round_trip_bit_for_bit(version: str, tmp_path: Path) -> None:
    """From each version to our log, to LeRobot v3.0, and to our log again; and by robomimic's layout."""
    recorded = Recorded(version, fps=29.97, tasks=("Pick", "Place"), columns={"observation.effort": np.arange(8.0)})
    found = read(recorded.write(tmp_path / "a"))
    first = write_demos(tmp_path / "b.zarr", found)
    for name in ("c.lerobot", "d.zarr", "e.hdf5", "f.lerobot"):
        write_demos(tmp_path / name, found)
        found = read(tmp_path / name)
        assert found.robot == first.robot
        for one, other in zip(first.episodes, found.episodes, strict=True):
            assert_same(one, other)
    info = json.loads((tmp_path / "f.lerobot/meta/info.json").read_text())
    assert info["robot_type"] == "so101_follower" and info["total_tasks"] == 2 and info["fps"] == 29.97
    assert info["features"]["observation.state"]["names"] == JOINTS == info["features"]["action"]["names"]
    rows = pq.read_table(tmp_path / "f.lerobot/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["tasks"] for row in rows] == [["Pick"], ["Place"]]
    assert pq.read_table(tmp_path / "f.lerobot/data")["task_index"].to_pylist() == [0] * 5 + [1] * 3


def assert_same(one: Episode, other: Episode) -> None:
    mine, theirs = asdict(one), asdict(other)
    observations = mine.pop("observations"), theirs.pop("observations")
    assert observations[0].keys() == observations[1].keys()
    for key, rows in observations[0].items():
        assert rows.tobytes() == observations[1][key].tobytes(), key
    for name, value in mine.items():
        same = value.tobytes() == theirs[name].tobytes() if isinstance(value, np.ndarray) else value == theirs[name]
        assert same, name


def test_an_older_writers_lists(tmp_path: Path) -> None:
    """Lists without a fixed size, as pandas writes them."""
    path = Recorded().write(tmp_path / "a")
    whole = read(path)
    edit_frames(data_file(path), observation__state=lambda rows: rows, action=lambda rows: rows)
    assert pa.types.is_list(pq.read_schema(data_file(path)).field("action").type)
    for one, other in zip(whole.episodes, read(path).episodes, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("version", VERSIONS)
def test_times_beside_the_grid_are_kept(version: str, tmp_path: Path) -> None:
    """A clock that jitters contradicts nothing; the dataset's own times come along."""
    path = Recorded(version).write(tmp_path / "a")
    jitter = np.float32([0, 0.004, -0.003, 0.002, 0])
    edit_frames(data_file(path), timestamp=lambda t: t + np.pad(jitter, (0, len(t) - 5)))
    first, second = read(path).episodes
    expected = np.append(np.arange(5) / 30 + jitter, 5 / 30) * 1e9
    assert np.abs(first.time_ns - expected).max() < 1e3 and first.info["clock"].startswith("timestamps of the dataset")
    assert second.info["clock"].startswith("nominal")


def test_before_version_2(tmp_path: Path) -> None:
    """Version 1.6 kept its info elsewhere."""
    (tmp_path / "meta_data").mkdir()
    (tmp_path / "meta_data/info.json").write_text(json.dumps({"codebase_version": "v1.6", "fps": 50}))
    assert kind_of(tmp_path) == "lerobot"
    assert "v1.6; supported are v2.0, v2.1 and v3.0: convert it with LeRobot's own scripts" in refusal(tmp_path)
