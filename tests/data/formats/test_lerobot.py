"""Datasets written here against LeRobotDataset v3.0's published rules, field by field, and reading of others' datasets."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sacflow_robot.data.formats.demonstrations import DemoOptions, DemoSet
from sacflow_robot.data.formats.sources import kind_of, load_demos, read_demos, write_demos
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError
from sacflow_robot.spec import RobotSpec


def load_episodes(path: Path, options: DemoOptions) -> list[Episode]:
    return load_demos(path, options).episodes


BOOKKEEPING = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


@pytest.fixture
def options(robot: RobotSpec) -> DemoOptions:
    return DemoOptions(robot, "Lift")


@pytest.fixture
def episodes(make_episode: Callable[..., Episode]) -> list[Episode]:
    made = [make_episode(4, seed=0), make_episode(3, seed=1, success=False), make_episode(5, seed=2)]
    measured = np.full((3, 7), 0.5, np.float32)
    return [made[0], replace(made[1], measured=measured), made[2]]


@pytest.fixture
def dataset(episodes: list[Episode], robot: RobotSpec, tmp_path: Path) -> Path:
    path = tmp_path / "demos.lerobot"
    write_demos(path, DemoSet(robot, episodes))
    return path


def read_json(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def frames(dataset: Path) -> pa.Table:
    return pq.read_table(dataset / "data" / "chunk-000" / "file-000.parquet")


def test_files(dataset: Path) -> None:
    found = {str(path.relative_to(dataset)) for path in dataset.rglob("*") if path.is_file()}
    assert found == {
        "meta/info.json",
        "meta/stats.json",
        "meta/tasks.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "data/chunk-000/file-000.parquet",
        "meta/sacflow_robot.json",
    }
    assert kind_of(dataset) == "lerobot"


def test_info(dataset: Path, robot: RobotSpec) -> None:
    info = read_json(dataset / "meta" / "info.json")
    features = info.pop("features")
    assert info == {
        "codebase_version": "v3.0",
        "robot_type": "Panda",
        "total_episodes": 3,
        "total_frames": 12,
        "total_tasks": 1,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": 20,
        "splits": {"train": "0:3"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
    }
    assert type(info["fps"]) is int
    for key, dtype in BOOKKEEPING.items():
        assert features[key] == {"dtype": dtype, "shape": [1], "names": None}
    assert features["action"] == {"dtype": "float32", "shape": [7], "names": list(robot.action_names)}
    state, environment = features["observation.state"], features["observation.environment_state"]
    assert (state["dtype"], state["shape"], state["names"][:4]) == (
        "float32",
        [9],
        ["robot0_eef_pos_0", "robot0_eef_pos_1", "robot0_eef_pos_2", "robot0_eef_quat_0"],
    )
    assert (environment["shape"], len(environment["names"])) == ([10], 10)
    assert features["next.done"]["dtype"] == features["next.success"]["dtype"] == "bool"
    assert features["sim_state"]["dtype"] == "float64" and features["time_ns"]["dtype"] == "int64"
    for name, feature in features.items():
        assert "/" not in name, "LeRobot refuses such names"
        assert feature["names"] is None or len(feature["names"]) == feature["shape"][0]
        policy_feature = name.startswith(("action", "observation"))  # LeRobot hands these to policies
        assert policy_feature == (name in ("action", "observation.state", "observation.environment_state"))


def test_frames(dataset: Path, episodes: list[Episode]) -> None:
    table, features = frames(dataset), read_json(dataset / "meta" / "info.json")["features"]
    assert table.column_names == list(features), "a column that info.json does not name breaks LeRobot's loader"
    for field in table.schema:
        feature = features[field.name]
        scalar = pa.bool_() if feature["dtype"] == "bool" else pa.from_numpy_dtype(feature["dtype"])
        shape = feature["shape"]
        assert field.type == (scalar if shape == [1] else pa.list_(scalar, shape[0])), field.name
    lengths = [len(e) for e in episodes]
    assert table["index"].to_pylist() == list(range(12))
    assert table["episode_index"].to_pylist() == np.repeat([0, 1, 2], lengths).tolist()
    assert table["frame_index"].to_pylist() == [t for n in lengths for t in range(n)]
    assert table["task_index"].to_pylist() == [0] * 12
    assert np.array_equal(table["timestamp"].to_numpy(), (table["frame_index"].to_numpy() / 20).astype(np.float32))
    assert table["next.done"].to_pylist() == [t == n - 1 for n in lengths for t in range(n)]
    assert np.flatnonzero(table["next.success"].to_numpy()).tolist() == [3, 11]
    actions = np.array(table["action"].to_pylist(), np.float32)
    assert np.array_equal(actions, np.concatenate([e.action for e in episodes]))
    keys = "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"
    state = np.concatenate([np.concatenate([e.observations[key][:-1] for key in keys], axis=1) for e in episodes])
    assert np.array_equal(np.array(table["observation.state"].to_pylist(), np.float32), state)
    groups = pq.ParquetFile(dataset / "data" / "chunk-000" / "file-000.parquet").metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == lengths


def test_episodes(dataset: Path, episodes: list[Episode]) -> None:
    rows = pq.read_table(dataset / "meta" / "episodes" / "chunk-000" / "file-000.parquet").to_pylist()
    ends = np.cumsum([len(e) for e in episodes]).tolist()
    for i, row in enumerate(rows):
        expected = {
            "episode_index": i,
            "tasks": ["lift"],
            "length": len(episodes[i]),
            "data/chunk_index": 0,
            "data/file_index": 0,
            "dataset_from_index": [0, *ends][i],
            "dataset_to_index": ends[i],
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        assert {key: row[key] for key in expected} == expected
        assert np.allclose(row["stats/action/mean"], episodes[i].action.mean(0, dtype=np.float64))
        assert row["stats/action/count"] == [len(episodes[i])]
        assert row["stats/index/min"] == [expected["dataset_from_index"]]


def test_tasks(dataset: Path) -> None:
    table = pq.read_table(dataset / "meta" / "tasks.parquet")
    assert table.to_pydict() == {"task_index": [0], "task": ["lift"]}
    about = json.loads(table.schema.metadata[b"pandas"])
    assert about["index_columns"] == ["task"], "LeRobot looks a task up in the index"


def test_stats(dataset: Path, episodes: list[Episode]) -> None:
    stats = read_json(dataset / "meta" / "stats.json")
    actions = np.concatenate([e.action for e in episodes]).astype(np.float64)
    names = {"min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99"}
    assert all(each.keys() == names for each in stats.values())
    expected = {"min": actions.min(0), "max": actions.max(0), "mean": actions.mean(0), "std": actions.std(0)}
    expected["q90"] = np.quantile(actions, 0.9, axis=0)
    for name, values in expected.items():
        assert np.allclose(stats["action"][name], values, atol=1e-12), name
    assert stats["action"]["count"] == [12] and stats["timestamp"]["max"] == [np.float32(0.2)]
    assert stats["next.done"]["min"] == [False]
    assert "measured" not in stats, "a robot that cannot always tell has no statistics of what it did"


def foreign(path: Path, columns: dict[str, Any], names: dict[str, Any], lengths: list[int], **info: Any) -> Path:
    """A dataset as others write it: published columns only."""
    index = np.arange(sum(lengths))
    columns = {**columns, "index": index, "episode_index": np.repeat(np.arange(len(lengths)), lengths)}
    features = {
        key: {"dtype": np.asarray(v).dtype.name, "shape": list(np.shape(v)[1:]) or [1], "names": names.get(key)}
        for key, v in columns.items()
    }
    ends = np.cumsum(lengths).tolist()
    (path / "data" / "chunk-000").mkdir(parents=True)
    (path / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    table = pa.table({key: np.asarray(v).tolist() for key, v in columns.items()})
    pq.write_table(table, path / "data" / "chunk-000" / "file-000.parquet")
    rows = {
        "episode_index": list(range(len(lengths))),
        "length": lengths,
        "dataset_from_index": [0, *ends[:-1]],
        "dataset_to_index": ends,
        "data/chunk_index": [0] * len(lengths),
        "data/file_index": [0] * len(lengths),
    }
    pq.write_table(pa.table(rows), path / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    about = {"codebase_version": "v3.0", "fps": 20, "features": features}
    about["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    (path / "meta" / "info.json").write_text(json.dumps(about | info))
    return path


def columns_of(robot: RobotSpec, steps: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    columns = {
        f"observation.{a.key}": rng.standard_normal((steps, *a.shape)).astype(np.float32) for a in robot.observations
    }
    for a in robot.observations:
        for start in a.quaternions:
            part = columns[f"observation.{a.key}"][:, start : start + 4]
            part /= np.linalg.norm(part, axis=1, keepdims=True)
    return {**columns, "action": rng.uniform(-2, 2, (steps, 7)).astype(np.float32)}


def test_a_dataset_from_elsewhere(robot: RobotSpec, options: DemoOptions, tmp_path: Path) -> None:
    columns = columns_of(robot, 9)
    columns["next.reward"] = np.array([0, 0, 1, 1, 0, 0, 0, 0, 0], np.float32)
    columns["battery"] = np.arange(9.0)
    path = foreign(tmp_path / "a", columns, {}, [4, 5])
    demos = read_demos(path, options)
    assert [len(e) for e in demos.episodes] == [4, 5] and [e.success for e in demos.episodes] == [True, False]
    assert "left out: battery" in str(demos.losses) and "repeats the one before" in str(demos.losses)
    second = demos.episodes[1]
    assert np.array_equal(second.policy_action, columns["action"][4:]) and np.abs(second.action).max() <= 1
    assert np.array_equal(second.observations["object"], columns["observation.object"][[4, 5, 6, 7, 8, 8]])
    assert [len(e) for e in load_episodes(path, options)] == [3, 5], "learning ends at the first success"


def test_observations_are_found_by_the_names_of_dimensions(
    robot: RobotSpec, options: DemoOptions, tmp_path: Path
) -> None:
    """Joined in another order, with names grouped as some datasets have them."""
    columns = columns_of(robot, 3)
    specs = robot.observations[::-1]
    joined = np.concatenate([columns.pop(f"observation.{a.key}") for a in specs], axis=1)
    names = {"observation.state": {a.key: [f"{a.key}_{i}" for i in range(a.size)] for a in specs}}
    path = foreign(tmp_path / "a", {**columns, "observation.state": joined}, names, [3])
    found = read_demos(path, options).episodes[0].observations
    whole = np.concatenate([found[a.key] for a in specs], axis=1)
    assert np.array_equal(whole[:-1], joined)


@pytest.mark.parametrize(
    ("changes", "info", "message"),
    [
        ({"observation.object": None}, {}, "no observation 'object'.* it has .*observation.robot0_eef_pos"),
        ({"action": np.zeros((3, 6), np.float32)}, {}, r"feature 'action' is \[6\]; task 'lift' takes \(7,\)"),
        (
            {"observation.robot0_eef_quat": np.full((3, 4), 3, np.float32)},
            {},
            "episode 0, step 0: the quaternion in .* norm 6",
        ),
        ({"action": np.full((3, 7), np.nan, np.float32)}, {}, "episode 0, step 0: NaN or infinity among its actions"),
        ({}, {"codebase_version": "v2.1"}, "has no meta/episodes.jsonl, which v2.1 has; is it complete"),
        ({}, {"codebase_version": "v1.6"}, r"LeRobotDataset v1.6; supported are v2.0, v2.1 and v3.0: convert it"),
        ({}, {"codebase_version": "v4.0"}, r"LeRobotDataset v4.0; supported are v2.0, v2.1 and v3.0: install a later"),
        ({}, {"data_path": "elsewhere/{chunk_index}/{file_index}"}, "is it complete"),
    ],
)
def test_datasets_that_do_not_fit(
    robot: RobotSpec, options: DemoOptions, tmp_path: Path, changes: dict[str, Any], info: dict[str, Any], message: str
) -> None:
    columns = {k: v for k, v in {**columns_of(robot, 3), **changes}.items() if v is not None}
    path = foreign(tmp_path / "a", columns, {}, [3], **info)
    with pytest.raises(DataError, match=message) as caught:
        read_demos(path, options)
    assert "\n" not in str(caught.value)


def test_damaged_datasets(dataset: Path, options: DemoOptions) -> None:
    for name in ("data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet", "meta/info.json"):
        whole = (dataset / name).read_bytes()
        (dataset / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match="is it complete"):
            read_demos(dataset, options)
        (dataset / name).write_bytes(whole)
    table = frames(dataset)
    pq.write_table(table.slice(0, 10), dataset / "data" / "chunk-000" / "file-000.parquet")
    with pytest.raises(DataError, match="episode 2 has 3 frames, expected 5"):
        read_demos(dataset, options)
