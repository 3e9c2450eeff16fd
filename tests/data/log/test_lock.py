"""One writer for a log, by whatever name the log is reached."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.data.log.episode_writer import EpisodeWriter
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.data.log.recorder import StepRecorder
from sacflow_robot.data.log.repair import is_being_written
from sacflow_robot.episode import Episode, Step
from sacflow_robot.errors import LogWriteError
from sacflow_robot.spec import RobotSpec
from tests.data.log.forked_writer import ONE, ROBOT, Forked, result

NAMES = ["symlink", "relative", "up", "linked folder", "missing symlink"]


def other_name(kind: str, log: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another name of the log, which lies in a folder of its own."""
    if kind in ("symlink", "missing symlink"):
        name = log.parents[1] / "elsewhere" / "other.zarr"
        name.parent.mkdir()
        name.symlink_to(log)
        return name
    if kind == "linked folder":
        (log.parents[1] / "linked").symlink_to(log.parent)
        return log.parents[1] / "linked" / log.name
    if kind == "up":
        return log.parent / ".." / log.parent.name / log.name
    monkeypatch.chdir(log.parent)
    return Path(log.name)


@pytest.mark.parametrize("kind", NAMES)
def test_a_log_has_one_writer_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    log = tmp_path / "logs" / "a.zarr"
    log.parent.mkdir()
    if kind == "missing symlink":  # the log is made through it
        other, log = other_name(kind, log, monkeypatch), log
        first, second = other, log
    else:
        EpisodeWriter(log, ROBOT).close()
        first, second = log, other_name(kind, log, monkeypatch)
    with StepRecorder(first, ROBOT, Forked) as recorder:
        recorder.begin(result(0, 0), 1000, {})
        recorder.append(Step(result(0, 1), ONE, 1001))
        for name in (first, second):
            assert is_being_written(name)
            with pytest.raises(LogWriteError, match="is being written by another process; give another path"):
                EpisodeWriter(name, ROBOT)
        EpisodeLog.open(second)  # a reader does not take the living writer for a dead one
        recorder.append(Step(result(0, 2), ONE, 1002))
    assert [len(e) for e in EpisodeLog.open(second).episodes()] == [2]
    with StepRecorder(second, ROBOT, Forked), pytest.raises(LogWriteError, match="is being written"):
        EpisodeWriter(first, ROBOT)


def test_the_folder_that_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EpisodeWriter(tmp_path / "a.zarr", ROBOT).close()
    monkeypatch.chdir(tmp_path / "a.zarr")
    with EpisodeWriter(Path(), ROBOT), pytest.raises(LogWriteError, match="is being written"):
        EpisodeWriter(tmp_path / "a.zarr", ROBOT)


@pytest.mark.parametrize("new", [False, True])
def test_a_mount_of_the_log_elsewhere(tmp_path: Path, new: bool) -> None:
    log, mounted = tmp_path / "a.zarr", tmp_path / "mounts" / "b.zarr"
    mounted.mkdir(parents=True)
    if not new:
        EpisodeWriter(log, ROBOT).close()
    with EpisodeWriter(log, ROBOT):
        if os.geteuid() != 0 or subprocess.run(["mount", "--bind", log, mounted], check=False).returncode:
            pytest.skip("root alone can mount")
        try:
            with pytest.raises(LogWriteError, match="is being written"):
                EpisodeWriter(mounted, ROBOT)
        finally:
            subprocess.run(["umount", mounted], check=True)


def test_a_killed_writer_locks_nobody_out(
    tmp_path: Path, robot: RobotSpec, make_episode: Callable[..., Episode]
) -> None:
    (tmp_path / "link.zarr").symlink_to(tmp_path / "a.zarr")
    pid = os.fork()
    if pid == 0:
        EpisodeWriter(tmp_path / "a.zarr", robot)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    with EpisodeWriter(tmp_path / "link.zarr", robot) as log:
        log.append(make_episode(5))
    assert np.array_equal(EpisodeLog.open(tmp_path / "a.zarr").ends, [5])
