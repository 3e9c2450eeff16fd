"""Step by step into a log: what is kept of a step, and what is refused."""

import contextlib
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.data.log.recorder import StepRecorder
from sacflow_robot.episode import Source, Step, StepFlag, StepResult
from sacflow_robot.errors import DataError, LogWriteError, UsageError
from tests.data.log.forked_writer import (
    EPISODES,
    ONE,
    ROBOT,
    Forked,
    assert_are_the_written,
    observation,
    result,
    write_episodes,
)

LONG = np.random.default_rng(0).bytes(2000).hex()  # an info that does not fit, deflated or not


def test_readers_read_while_it_is_written(tmp_path: Path) -> None:
    path, seen = tmp_path / "log.zarr", []
    with StepRecorder(path, ROBOT, Forked) as log:

        def look() -> None:
            time.sleep(0.02)
            reader = EpisodeLog.open(path)
            assert_are_the_written(list(reader.episodes()), 0)
            seen.append(len(reader))

        write_episodes(log, look)
        with pytest.raises(LogWriteError, match="being written by another process"):
            StepRecorder(path, ROBOT)
    assert seen == sorted(seen) and 1 in seen
    assert len(EpisodeLog.open(path)) == EPISODES
    assert sorted(p.name for p in path.iterdir()) == [".zattrs", ".zgroup", "data", "meta"]
    assert not any(p.is_symlink() for p in path.rglob("*"))


def test_what_does_not_fit_is_refused_and_not_kept(tmp_path: Path) -> None:
    path, zeros = tmp_path / "log.zarr", np.zeros(2, np.float32)
    with StepRecorder(path, ROBOT, Forked) as log:
        with pytest.raises(UsageError, match="begin one first"):
            log.append(Step(result(0, 1), zeros, 1))
        with pytest.raises(DataError, match="shorten it"):
            log.begin(result(0, 0), 0, {"note": LONG})
        log.begin(result(0, 0), 0, {})
        with pytest.raises(UsageError, match="in progress"):
            log.begin(result(0, 0), 0, {})
        with pytest.raises(DataError, match="NaN or infinity"):
            log.append(Step(result(0, 1), np.array([np.nan, 0], np.float32), 1))
        blind = result(0, 1)
        blind.observation["pos"][2] = np.inf
        with pytest.raises(DataError, match="NaN or infinity"):
            log.append(Step(blind, zeros, 1))
        with pytest.raises(DataError, match="pos has shape"):
            log.append(Step(StepResult({**observation(0, 1), "pos": zeros}, state=np.zeros(2)), zeros, 1))
        with pytest.raises(DataError, match="state is missing"):
            log.append(Step(StepResult(observation(0, 1)), zeros, 1))
        huge = result(0, 1)
        huge.observation["pos"][2] = 3e38
        log.append(Step(huge, zeros, 1, flags=StepFlag.LATE | StepFlag.CLIPPED, source=Source.HUMAN))
        log.end({})
    (episode,) = EpisodeLog.open(path).episodes()
    assert episode.flags.tolist() == [3] and episode.source.tolist() == [Source.HUMAN]
    assert episode.received_ns is None and episode.observations["pos"][1, 2] == np.float32(3e38)
    assert np.isnan(episode.measured).all() and episode.truncated[-1]
    with StepRecorder(path, ROBOT, Forked) as log, pytest.raises(DataError, match="in state"):
        log.begin(StepResult(observation(0, 0)), 0, {})


def test_arrays_of_another_layout_or_type_are_kept_as_what_the_log_declares(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with StepRecorder(tmp_path / "log.zarr", ROBOT, Forked) as log:
        log.begin(result(0, 0), 0, {})
        flipped = StepResult({"pos": np.arange(3), "image": image[::-1]}, state=np.array([1, 2]))
        log.append(Step(flipped, np.array([0.5, -0.5]), 1))
        log.append(Step(StepResult({**observation(0, 0), "image": image.transpose(1, 0, 2)}, state=np.ones(2)), ONE, 2))
        log.end({})
    (episode,) = EpisodeLog.open(tmp_path / "log.zarr").episodes()
    assert np.array_equal(episode.observations["image"][1], image[::-1])
    assert np.array_equal(episode.observations["image"][2], image.transpose(1, 0, 2))
    assert episode.observations["pos"][1].tolist() == [0, 1, 2] and episode.action.tolist() == [[0.5, -0.5], [1, 1]]


def test_success_is_what_the_arm_reports(tmp_path: Path) -> None:
    path = tmp_path / "log.zarr"
    with StepRecorder(path, ROBOT, Forked) as log:
        for success in (True, False):
            log.begin(result(0, 0), 1000, {})
            fallen = replace(result(0, 1, last=True), success=success)
            log.append(Step(fallen, np.zeros(2, np.float32), 1001))
            log.end({})
    assert [e.success for e in EpisodeLog.open(path).episodes()] == [True, False]


def test_an_info_that_is_too_long_interrupts_its_episode_only(tmp_path: Path) -> None:
    path = tmp_path / "log.zarr"
    with StepRecorder(path, ROBOT, Forked) as log:
        for info in ({"note": LONG}, {"note": "short"}):
            log.begin(result(0, 0), 1000, {})
            log.append(Step(result(0, 1), np.zeros(2, np.float32), 1001))
            with contextlib.suppress(DataError):
                log.end(info)
    assert [e.info.get("interrupted", False) for e in EpisodeLog.open(path).episodes()] == [True, False]
