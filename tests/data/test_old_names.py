"""Files of version 0.1 call policy_action ``proposed`` and intervention_action ``human``."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from sacflow_robot.data.formats.demonstrations import DemoOptions, DemoSet
from sacflow_robot.data.formats.sources import load_demos, write_demos
from sacflow_robot.data.log.episode_writer import EpisodeWriter, write_log
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.data.log.recorder import StepRecorder
from sacflow_robot.data.log.repair import repair, verify
from sacflow_robot.episode import Episode, Step, StepResult
from sacflow_robot.spec import RobotSpec

OLD = {"policy_action": "proposed", "intervention_action": "human"}


@pytest.fixture
def episode(make_episode: Callable[..., Episode]) -> Episode:
    made = make_episode(4)
    by_hand = np.full_like(made.action, np.nan)
    by_hand[2:] = 0.25
    return replace(made, policy_action=made.action / 2, intervention_action=by_hand)


def assert_same(found: Episode, expected: Episode) -> None:
    for name in ("action", *OLD):
        assert np.array_equal(getattr(found, name), getattr(expected, name), equal_nan=True), name


@pytest.fixture
def old_log(episode: Episode, robot: RobotSpec, tmp_path: Path) -> Path:
    path = tmp_path / "old.zarr"
    write_log(path, robot, [episode])
    for new, old in OLD.items():
        (path / "data" / new).rename(path / "data" / old)
    return path


def test_an_old_log_is_read_checked_repaired_and_copied(
    old_log: Path, episode: Episode, robot: RobotSpec, tmp_path: Path
) -> None:
    assert_same(EpisodeLog.open(old_log).read(0), episode)
    assert verify(old_log) == []
    assert repair(old_log, tmp_path / "mended.zarr") == (1, [])
    assert sorted(OLD) == sorted(set(OLD) & set(zarr.open_group(tmp_path / "mended.zarr", mode="r")["data"]))
    demos = load_demos(old_log, DemoOptions(robot, "Lift"))
    assert_same(demos.episodes[0], episode)
    assert not str(demos.losses)


def test_an_old_log_is_appended_to(old_log: Path, episode: Episode, robot: RobotSpec) -> None:
    with EpisodeWriter(old_log, robot) as log:
        log.append(episode)
    start = StepResult({key: rows[0] for key, rows in episode.observations.items()}, state=episode.states[0])
    with StepRecorder(old_log, robot) as recorder:
        recorder.begin(start, 0, {})
        recorder.append(
            Step(start, episode.action[0], 1, episode.policy_action[0], intervention_action=episode.action[1])
        )
        recorder.end({})
    log = EpisodeLog.open(old_log)
    assert_same(log.read(1), episode)
    last = log.read(2)
    assert np.array_equal(last.policy_action[0], episode.policy_action[0])
    assert last.intervention_action is not None and np.array_equal(last.intervention_action[0], episode.action[1])
    assert set(OLD.values()) <= {folder.name for folder in (old_log / "data").iterdir()}
    assert not set(OLD) & {folder.name for folder in (old_log / "data").iterdir()}, "it stays what it is"
    assert verify(old_log) == []


def test_an_old_hdf5_file_is_read(episode: Episode, robot: RobotSpec, tmp_path: Path) -> None:
    path = tmp_path / "old.hdf5"
    write_demos(path, DemoSet(robot, [episode]))
    with h5py.File(path, "r+") as file:
        for new, old in OLD.items():
            file.move(f"data/demo_0/{new}", f"data/demo_0/{old}")
    assert_same(load_demos(path, DemoOptions(robot, "Lift")).episodes[0], episode)


def test_an_old_lerobot_dataset_is_read(episode: Episode, robot: RobotSpec, tmp_path: Path) -> None:
    path = tmp_path / "old.lerobot"
    write_demos(path, DemoSet(robot, [episode]))
    for file in path.glob("data/*/*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.rename_columns([OLD.get(name, name) for name in table.column_names]), file)
    info = json.loads((path / "meta/info.json").read_text())
    info["features"] = {OLD.get(name, name): feature for name, feature in info["features"].items()}
    (path / "meta/info.json").write_text(json.dumps(info))
    assert_same(load_demos(path, DemoOptions(robot, "Lift")).episodes[0], episode)
