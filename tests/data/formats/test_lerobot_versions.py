"""Datasets from elsewhere, of v2.0, v2.1 and v3.0 and of any robot: what is read, what is refused, and how it is said."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sacflow_robot.data.formats.agreement import AgreementOptions
from sacflow_robot.data.formats.demonstrations import DemoOptions, DemoSet
from sacflow_robot.data.formats.sources import demo_spec, kind_of, read_demos, write_demos
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, SpecMismatchError
from sacflow_robot.spec import RobotSpec
from tests.data.formats.lerobot_data import JOINTS, Recorded, edit_frames, edit_info, write_frames

VERSIONS = ("v2.0", "v2.1", "v3.0")


def read(path: Path, **agreement: Any) -> DemoSet:
    """Everything, of the robot that the dataset itself is of."""
    return read_demos(path, DemoOptions(demo_spec(path), "", agreement=AgreementOptions(**agreement)))


def refusal(path: Path) -> str:
    """The one line that a dataset is refused with."""
    with pytest.raises(DataError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def data_file(path: Path, episode: int = 0) -> Path:
    """The file that holds an episode, in either layout."""
    own = path / f"data/chunk-000/episode_{episode:06d}.parquet"
    return own if own.exists() else path / "data/chunk-000/file-000.parquet"


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


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("column", "change", "said"),
    [
        ("timestamp", lambda t: t * 0.6, "50 Hz apart, and the file says 30 Hz"),
        ("timestamp", lambda t: np.concatenate([t[:2], t[2:4][::-1], t[4:]]), "step 3: its timestamp runs backwards"),
        ("timestamp", lambda t: t * 0, "its timestamps are all 0"),
        ("timestamp", lambda t: np.where(np.arange(len(t)) == 2, np.nan, t), "step 2: its timestamp is nan"),
        (
            "timestamp",
            lambda t: np.where(np.arange(len(t)) > 2, t + 0.1, t),
            "frame 3: its timestamp is 0.1333 s after",
        ),
        ("timestamp", lambda t: t + 1.7e9, "timestamps are all 1.7e+09"),  # wall-clock time in float32
        ("frame_index", lambda t: np.concatenate([t[:1], t[2:0:-1], t[3:]]), "frame 1: frame_index is 2, expected 1"),
        ("index", lambda t: np.concatenate([t[:3], t[3:5][::-1], t[5:]]), "frame 3: index is 4, expected 3"),
        ("episode_index", lambda t: t + 1, "frame 0: episode_index is 1, expected 0"),
    ],
)
def test_bookkeeping_that_does_not_agree(
    version: str, column: str, change: Callable[[Any], Any], said: str, tmp_path: Path
) -> None:
    path = Recorded(version).write(tmp_path / "a")
    edit_frames(data_file(path), **{column: lambda t: change(t).astype(t.dtype)})  # float32 again, as it was
    message = refusal(path)
    assert said in message and "episode" in message and str(path / "data/chunk-000") in message


def test_an_index_beside_the_episodes_table(tmp_path: Path) -> None:
    """The table of v3.0 names the first index of each episode; before, only overlaps tell."""
    path = Recorded("v3.0").write(tmp_path / "a")
    edit_frames(data_file(path), index=lambda t: t + 7)
    assert "frame 0: index is 7, expected 0" in refusal(path)
    path = Recorded("v2.1").write(tmp_path / "b")
    edit_frames(data_file(path, 1), index=lambda t: t - 5)
    assert "episode_000001.parquet, episode 1, frame 0: index is 0, expected 5" in refusal(path)
    edit_frames(data_file(path, 1), index=lambda t: t + 100)  # episodes between them were deleted
    assert len(read(path).episodes) == 2


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: [*rows[:2], rows[2][:5], *rows[3:]], "frame 2: observation.state has 5 values, expected 6"),
        (lambda rows: [rows[0] * 2, *rows[1:]], "frame 0: observation.state has 12 values, expected 6"),
        # As many values in all as there should be: nothing but the rows themselves tells.
        (lambda rows: [rows[0], rows[1][:4], rows[2] + rows[1][4:], *rows[3:]], "frame 1: observation.state has 4"),
        (
            lambda rows: [row[:5] for row in rows],
            "frame 0: observation.state has 5 values, expected 6 as meta/info.json",
        ),
        (lambda rows: [*rows[:3], None, *rows[4:]], "frame 3: observation.state has no value"),
        (
            lambda rows: [[*row[:5], None] if i == 4 else row for i, row in enumerate(rows)],
            "frame 4: observation.state has",
        ),
        (lambda rows: [[*row[:5], np.nan] if i == 4 else row for i, row in enumerate(rows)], "step 4: NaN or infinity"),
        (lambda rows: [["a"] * 6 for _ in rows], "observation.state holds string"),
    ],
)
def test_ragged_rows(version: str, change: Callable[[Any], Any], said: str, tmp_path: Path) -> None:
    path = Recorded(version).write(tmp_path / "a")
    edit_frames(data_file(path), observation__state=change)
    message = refusal(path)
    assert said in message and "episode 0" in message


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


def observed(robot: RobotSpec) -> dict[str, Any]:
    """Observations of 8 frames: zeros, with orientations that are the identity."""
    columns: dict[str, Any] = {f"observation.{a.key}": np.zeros((8, *a.shape), np.float32) for a in robot.observations}
    for a in robot.observations:
        for start in a.quaternions:
            columns[f"observation.{a.key}"][:, start + 3] = 1
    return columns


@pytest.mark.parametrize("fps", [10, 30, 40])
@pytest.mark.parametrize("version", VERSIONS)
def test_another_rate_than_the_tasks(version: str, fps: int, robot: RobotSpec, tmp_path: Path) -> None:
    columns = observed(robot)
    recorded = Recorded(
        version, fps=fps, robot_type="panda", columns={**columns, "action": np.zeros((8, 7), np.float32)}
    )
    path = recorded.write(tmp_path / "a")
    with pytest.raises(SpecMismatchError, match=rf"{fps} Hz, the task expects 20 Hz .*--resample"):
        read_demos(path, DemoOptions(robot, "Lift"))
    demos = read_demos(path, DemoOptions(robot, "Lift", agreement=AgreementOptions(resample=True)))
    assert [len(e) for e in demos.episodes] == [-(-n * 20 // fps) for n in (5, 3)]
    assert demos.episodes[0].time_ns[1] == 50_000_000 and f"resampled from {fps} to 20 Hz" in str(demos.losses)


def test_another_robot_than_the_tasks(robot: RobotSpec, tmp_path: Path) -> None:
    columns = observed(robot)
    path = Recorded(fps=20, columns={**columns, "action": np.zeros((8, 7), np.float32)}).write(tmp_path / "a")
    wrong = Recorded().write(tmp_path / "b")  # other features too, of which the robot is the reason
    with pytest.raises(SpecMismatchError, match=r"robot so101_follower, the task expects Panda .*30 Hz, the task"):
        read_demos(wrong, DemoOptions(robot, "Lift"))
    with pytest.raises(SpecMismatchError, match=r"robot so101_follower, the task expects Panda .*--as-robot Panda"):
        read_demos(path, DemoOptions(robot, "Lift"))
    options = DemoOptions(robot, "Lift", agreement=AgreementOptions(as_robot="Panda"))
    assert len(read_demos(path, options).episodes) == 2


def test_what_is_missing_or_damaged(tmp_path: Path) -> None:
    for number, (version, change, said) in enumerate(
        [
            (
                "v2.1",
                lambda path: data_file(path, 1).unlink(),
                "episode_000001.parquet is missing, which holds episode 1",
            ),
            ("v3.0", lambda path: data_file(path).unlink(), "file-000.parquet is missing, which holds episode 0"),
            ("v2.1", lambda path: truncate(data_file(path, 1)), "episode_000001.parquet cannot be read"),
            ("v3.0", lambda path: truncate(data_file(path)), "file-000.parquet cannot be read"),
            ("v2.1", lambda path: truncate(path / "meta/episodes.jsonl"), "episodes.jsonl, line 2 is damaged"),
            (
                "v2.1",
                lambda path: (path / "meta/episodes.jsonl").unlink(),
                "has no meta/episodes.jsonl, which v2.1 has",
            ),
            ("v3.0", lambda path: truncate(path / "meta/episodes/chunk-000/file-000.parquet"), "is it complete"),
            ("v3.0", lambda path: (path / "meta/episodes/chunk-000/file-000.parquet").unlink(), "holds no chunk-"),
            ("v2.1", lambda path: edit_info(path, total_episodes=3), "says 3 episodes, the episodes table has 2"),
            ("v2.1", lambda path: truncate(path / "meta/info.json"), "info.json cannot be read"),
            (
                "v2.1",
                lambda path: edit_info(path, fps=0),
                "info.json cannot be read as part of a LeRobotDataset (fps 0)",
            ),
            ("v2.1", lambda path: edit_info(path, features=None), "info.json cannot be read"),
            ("v2.1", lambda path: edit_info(path, codebase_version="v1.6"), "v1.6; supported are v2.0, v2.1 and v3.0"),
            ("v3.0", lambda path: edit_info(path, codebase_version="v4.0"), "v4.0; supported are v2.0, v2.1 and v3.0"),
            ("v2.1", drop_column, "episode_000000.parquet has no column action"),
            ("v2.1", shorten, "episode 0 has 4 frames, expected 5"),
            ("v3.0", shorten, "episode 1 has 2 frames, expected 3"),
        ]
    ):
        path = Recorded(version).write(tmp_path / str(number))
        change(path)
        message = refusal(path)
        assert said in message and str(path) in message


def truncate(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) - len(whole) // 3])


def drop_column(path: Path) -> None:
    table = pq.read_table(data_file(path))
    pq.write_table(table.drop_columns("action"), data_file(path))


def shorten(path: Path) -> None:
    table = pq.read_table(data_file(path))
    pq.write_table(table.slice(0, len(table) - 1), data_file(path))


def test_frames_that_no_episode_names(tmp_path: Path) -> None:
    path = Recorded("v3.0").write(tmp_path / "a")
    frames = Recorded("v3.0", lengths=(5, 3, 2)).frames()
    write_frames(data_file(path), frames)
    assert "file-000.parquet has 10 frames, the episodes table names 8" in refusal(path)


def test_images_alone_are_not_enough(tmp_path: Path) -> None:
    recorded = Recorded()
    frames = {k: v for k, v in recorded.frames().items() if k != "observation.state"}
    recorded.frames = lambda: frames  # type: ignore[method-assign]
    assert "no low-dimensional observations" in refusal(recorded.write(tmp_path / "a"))


def test_before_version_2(tmp_path: Path) -> None:
    """Version 1.6 kept its info elsewhere."""
    (tmp_path / "meta_data").mkdir()
    (tmp_path / "meta_data/info.json").write_text(json.dumps({"codebase_version": "v1.6", "fps": 50}))
    assert kind_of(tmp_path) == "lerobot"
    assert "v1.6; supported are v2.0, v2.1 and v3.0: convert it with LeRobot's own scripts" in refusal(tmp_path)


def test_a_folder_that_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not an episode log, a LeRobotDataset or .* looked for .*meta/info\.json"):
        kind_of(tmp_path)


def test_absolute_poses_are_no_deltas(robot: RobotSpec, tmp_path: Path) -> None:
    """Actions that are the poses to go to, under the names and in the shape of deltas."""
    rng = np.random.default_rng(0)
    columns = observed(robot)
    columns["observation.robot0_eef_pos"] = (0.5 + 0.01 * rng.standard_normal((8, 3))).astype(np.float32)
    columns["observation.robot0_eef_quat"] = np.tile(np.float32([1, 0, 0, 0]), (8, 1))
    turn = np.tile(np.float32([np.pi, 0, 0, 1]), (8, 1))
    columns["action"] = np.concatenate([columns["observation.robot0_eef_pos"] + 0.02, turn], axis=1)
    path = Recorded(fps=20, robot_type="panda", columns=columns).write(tmp_path / "a")
    with pytest.raises(SpecMismatchError, match=r"absolute poses, the task expects OSC_POSE delta .*--controller-map"):
        read_demos(path, DemoOptions(robot, "Lift"))
    demos = read_demos(path, DemoOptions(robot, "Lift", agreement=AgreementOptions(controller_map=True)))
    assert np.abs(demos.episodes[0].action[:, :3] - 0.02 / 0.05).max() < 1e-5


def test_rewards_that_do_not_say_success(robot: RobotSpec, tmp_path: Path) -> None:
    """Shaped rewards are no successes; the user says what is."""
    columns = observed(robot)
    columns |= {"action": np.zeros((8, 7), np.float32), "next.reward": np.linspace(0.1, 0.8, 8, dtype=np.float32)}
    path = Recorded(fps=20, robot_type="panda", columns=columns).write(tmp_path / "a")
    with pytest.raises(DataError, match="dense rewards, which do not tell when the task was solved; give --reward"):
        read_demos(path, DemoOptions(robot, "Lift"))
    options = AgreementOptions(reward="dense", success_above=0.65)
    demos = read_demos(path, DemoOptions(robot, "Lift", agreement=options))
    assert [e.success for e in demos.episodes] == [False, True]


def test_actions_beyond_the_robots_range_are_named(robot: RobotSpec, tmp_path: Path) -> None:
    columns = observed(robot)
    columns["action"] = np.float32(np.where(np.arange(8) % 2, 3, 0.5))[:, None].repeat(7, 1)
    path = Recorded(fps=20, robot_type="panda", columns=columns).write(tmp_path / "a")
    demos = read_demos(path, DemoOptions(robot, "Lift"))
    assert "50% of the actions are beyond the robot's range and are clipped" in str(demos.losses)
