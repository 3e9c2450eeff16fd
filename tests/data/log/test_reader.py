import errno
import itertools
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from sacflow_robot.data.log.episode_writer import EpisodeWriter, write_log
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.data.log.repair import verify
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, LogWriteError, UsageError
from sacflow_robot.spec import RobotSpec
from sacflow_robot.utils import atomic_files

MakeEpisode = Callable[..., Episode]


def assert_same(a: Episode, b: Episode) -> None:
    for key, column in a.observations.items():
        assert np.array_equal(column, b.observations[key])
    for name in ("action", "policy_action", "source", "rewards", "terminated", "truncated", "time_ns", "states"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert np.array_equal(a.measured, b.measured, equal_nan=True)
    assert dict(a.info) == dict(b.info)


def test_episodes_come_back_bit_for_bit(make_episode: MakeEpisode, robot: RobotSpec, tmp_path: Path) -> None:
    episodes = [make_episode(n, seed=n, success=n % 2 == 0) for n in (3, 1, 300, 7)]
    path = tmp_path / "log.zarr"
    with EpisodeWriter(path, robot) as log:
        log.append(episodes[0])
        log.extend(episodes[1:3])
    with EpisodeWriter(path, robot) as log:
        log.append(episodes[3])
    log = EpisodeLog.open(path)
    assert len(log) == 4 and log.steps == 311
    for episode, again in zip(episodes, log.episodes(), strict=True):
        assert_same(episode, again)
    assert_same(episodes[3], log.read(-1))
    with pytest.raises(UsageError, match="episodes 0 to 3, there is no episode 4"):
        log.read(4)


def test_layout_is_what_diffusion_policy_reads(make_episode: MakeEpisode, robot: RobotSpec, tmp_path: Path) -> None:
    write_log(tmp_path / "log.zarr", robot, [make_episode(4), make_episode(6)])
    root = zarr.open_group(tmp_path / "log.zarr", mode="r", zarr_format=2)
    ends = np.asarray(root["meta/episode_ends"])
    assert ends.dtype == np.int64 and ends.tolist() == [4, 10]
    data = dict(root["data"].arrays())
    assert {"action", "robot0_eef_pos", "object"} <= data.keys()
    assert all(column.shape[0] == ends[-1] for column in data.values())
    assert all(column.shape[0] == 2 for _, column in root["meta"].arrays())


def test_an_append_that_fails_leaves_the_log_as_it_was(
    make_episode: MakeEpisode, robot: RobotSpec, tmp_path: Path
) -> None:
    """A real write error: the process may not write files beyond a size that the second append exceeds."""
    path = tmp_path / "log.zarr"
    write_log(path, robot, [make_episode(5)])
    code = f"""
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np
from sacflow_robot.data.log.episode_writer import EpisodeWriter
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.errors import LogWriteError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = EpisodeWriter(Path({str(path)!r}), EpisodeLog.open(Path({str(path)!r})).robot)
episode = log.read(0)
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
try:
    log.extend([episode] * 50)
except LogWriteError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "the 1 episodes in" in done.stdout and "are intact" in done.stdout
    assert_same(EpisodeLog.open(path).read(0), make_episode(5))
    with EpisodeWriter(path, robot) as log:
        log.append(make_episode(8))
    assert [len(e) for e in EpisodeLog.open(path).episodes()] == [5, 8]


EVERY = pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])


@EVERY
def test_a_disk_that_fills_at_any_write_costs_no_episode(
    make_episode: MakeEpisode, robot: RobotSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Files that an append writes fail, each in a trial of its own, and stay failing, as on a full disk."""
    real = atomic_files.write_through
    before = [make_episode(3, seed=1), make_episode(4, seed=2)]
    for allowed in range(0, 1000, every):
        path = tmp_path / f"log{allowed}.zarr"
        write_log(path, robot, before)
        writes = itertools.count()

        def put(*args: Any, **options: Any) -> Any:
            if next(writes) >= allowed:  # noqa: B023
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **options)

        with EpisodeWriter(path, robot) as log:
            monkeypatch.setattr(atomic_files, "write_through", put)
            try:
                log.append(make_episode(5, seed=3))
                failed = False
            except LogWriteError as error:
                assert "the 2 episodes in" in str(error)
                failed = True
            monkeypatch.setattr(atomic_files, "write_through", real)
        expected = before if failed else [*before, make_episode(5, seed=3)]
        for episode, again in zip(expected, EpisodeLog.open(path).episodes(), strict=True):
            assert_same(episode, again)
        with EpisodeWriter(path, robot) as log:
            log.append(make_episode(2, seed=4))
        again = list(EpisodeLog.open(path).episodes())
        assert_same(again[0], before[0])
        assert_same(again[-1], make_episode(2, seed=4))
        shutil.rmtree(path)
        if not failed:
            break
    assert allowed > 20


def test_episodes_with_and_without_states_do_not_mix(
    make_episode: MakeEpisode, robot: RobotSpec, tmp_path: Path
) -> None:
    path = tmp_path / "log.zarr"
    with EpisodeWriter(path, robot) as log:
        log.append(make_episode(3))
        with pytest.raises(DataError, match=r"differ from those in .* in state; log them to another path"):
            log.append(make_episode(3, states=False))
        assert_same(log.read(0), make_episode(3))
        log.truncate(0)
        log.append(make_episode(3, states=False))
    assert EpisodeLog.open(path).read(0).states is None


def test_a_killed_writer_loses_no_finished_episode(make_episode: MakeEpisode, robot: RobotSpec, tmp_path: Path) -> None:
    path = tmp_path / "log.zarr"
    write_log(path, robot, [make_episode(20)])
    code = f"""
from pathlib import Path
from sacflow_robot.data.log.episode_writer import EpisodeWriter
from sacflow_robot.data.log.reader import EpisodeLog
path = Path({str(path)!r})
log = EpisodeWriter(path, EpisodeLog.open(path).robot)
episode = log.read(0)
while True:
    log.append(episode)
    print(len(log), flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(5):
        acknowledged = int(process.stdout.readline())
    time.sleep(0.03)
    process.send_signal(signal.SIGKILL)
    acknowledged = max([acknowledged, *(int(line) for line in process.stdout)])
    process.wait()
    process.stdout.close()
    log = EpisodeLog.open(path)
    assert len(log) in (acknowledged, acknowledged + 1)
    for episode in log.episodes():
        assert_same(episode, make_episode(20))
    with EpisodeWriter(path, robot) as writer:
        writer.append(make_episode(3, seed=1))
    assert_same(EpisodeLog.open(path).read(-1), make_episode(3, seed=1))


def test_rows_past_the_last_end_are_ignored_and_overwritten(
    make_episode: MakeEpisode, robot: RobotSpec, tmp_path: Path
) -> None:
    path = tmp_path / "log.zarr"
    write_log(path, robot, [make_episode(5)])
    column = zarr.open_group(path, mode="r+", zarr_format=2)["data/action"]
    column.resize((9, 7))
    column[5:] = 9.0
    with EpisodeWriter(path, robot) as log:
        assert_same(log.read(0), make_episode(5))
        log.append(make_episode(2, seed=1))
    assert_same(EpisodeLog.open(path).read(1), make_episode(2, seed=1))


def test_a_log_whose_ends_are_damaged_is_not_written_to(
    make_episode: MakeEpisode, robot: RobotSpec, tmp_path: Path
) -> None:
    for damage in ([0, 9, 12], [5, 0, 12], [-5, 9, 12], [5, 5, 12], [0, 0, 0], None):
        path = tmp_path / "log.zarr"
        write_log(path, robot, [make_episode(n) for n in (5, 4, 3)])
        before = sorted((p, p.read_bytes()) for p in (path / "data").rglob("*") if p.is_file())
        if damage is None:
            next(p for p in (path / "meta" / "episode_ends").iterdir() if not p.name.startswith(".")).unlink()
        else:
            zarr.open_group(path, mode="r+", zarr_format=2)["meta/episode_ends"][:] = damage
        with pytest.raises(DataError, match="damaged"):
            EpisodeWriter(path, robot)
        assert before == sorted((p, p.read_bytes()) for p in (path / "data").rglob("*") if p.is_file())
        shutil.rmtree(path)


def test_truncate_keeps_the_first_episodes(make_episode: MakeEpisode, robot: RobotSpec, tmp_path: Path) -> None:
    path = tmp_path / "log.zarr"
    with EpisodeWriter(path, robot) as log:
        log.extend([make_episode(n) for n in (3, 4, 5)])
        log.truncate(1)
        log.append(make_episode(6))
    assert [len(e) for e in EpisodeLog.open(path).episodes()] == [3, 6]


def test_logs_of_version_1_are_read_and_gain_the_new_columns(
    make_episode: MakeEpisode, robot: RobotSpec, tmp_path: Path
) -> None:
    path = tmp_path / "log.zarr"
    write_log(path, robot, [make_episode(5), make_episode(3)])
    for key in ("received_ns", "inferred_ns", "sent_ns", "flags"):
        shutil.rmtree(path / "data" / key)
    attributes = (path / ".zattrs").read_text()
    (path / ".zattrs").write_text(attributes.replace('"version": 2', '"version": 1'))
    assert_same(EpisodeLog.open(path).read(0), make_episode(5))
    assert EpisodeLog.open(path).read(0).sent_ns is None and verify(path) == []
    timed = replace(make_episode(4), sent_ns=np.arange(4), flags=np.array([1, 2, 0, 8], np.uint8))
    with EpisodeWriter(path, robot) as log:
        log.append(timed)
    assert verify(path) == [] and EpisodeLog.open(path).version == 2
    first, second, third = EpisodeLog.open(path).episodes()
    assert_same(first, make_episode(5))
    assert second.flags is None and second.sent_ns is None
    assert third.sent_ns.tolist() == [0, 1, 2, 3] and third.flags.tolist() == [1, 2, 0, 8]
    assert third.received_ns is None


def test_bad_places_are_one_clear_line(make_episode: MakeEpisode, robot: RobotSpec, tmp_path: Path) -> None:
    path = tmp_path / "log.zarr"
    with pytest.raises(DataError, match="no episode log at"):
        EpisodeLog.open(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="not an episode log"):
        EpisodeLog.open(tmp_path / "folder")
    zarr.open_group(tmp_path / "other.zarr", mode="w", zarr_format=2)
    with pytest.raises(DataError, match="not an episode log"):
        EpisodeLog.open(tmp_path / "other.zarr")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="not an episode log"):
        EpisodeWriter(tmp_path / "file", robot)
    with EpisodeWriter(path, robot), pytest.raises(LogWriteError, match="another process"):
        EpisodeWriter(path, robot)
    with pytest.raises(DataError, match="robot: Panda, UR5e"):
        EpisodeWriter(path, replace(robot, robot="UR5e"))
    with pytest.raises(UsageError, match="exists already"):
        write_log(path, robot, [make_episode(2)])
    assert [p.name for p in tmp_path.glob("*partial*")] == []


def test_damage_is_reported(make_episode: MakeEpisode, robot: RobotSpec, tmp_path: Path) -> None:
    path = tmp_path / "log.zarr"
    write_log(path, robot, [make_episode(5)])
    chunk = next(p for p in (path / "data" / "action").iterdir() if not p.name.startswith("."))
    chunk.write_bytes(chunk.read_bytes()[:10])
    with pytest.raises(DataError, match="damaged"):
        EpisodeLog.open(path).read(0)
    chunk.unlink()
    with pytest.raises(DataError, match=r"data/action lacks its chunk 0\.0"):
        EpisodeLog.open(path).read(0)
    (path / "meta" / "episode_ends" / ".zarray").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        EpisodeLog.open(path)
    for junk in (b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"format": 3}'):
        (path / ".zattrs").write_bytes(junk)
        with pytest.raises(DataError, match=r"^[^\n]+$"):
            EpisodeLog.open(path)


@EVERY
def test_a_disk_that_fills_while_a_log_is_shortened_leaves_it_whole(
    make_episode: MakeEpisode, robot: RobotSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    real, episodes = atomic_files.write_through, [make_episode(3, seed=seed) for seed in range(3)]
    for allowed in range(0, 1000, every):
        path = tmp_path / f"log{allowed}.zarr"
        write_log(path, robot, episodes)
        writes = itertools.count()

        def put(*args: Any, **options: Any) -> Any:
            if next(writes) >= allowed:  # noqa: B023
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **options)

        with EpisodeWriter(path, robot) as log:
            monkeypatch.setattr(atomic_files, "write_through", put)
            failed = False
            try:
                log.truncate(1)
            except LogWriteError as error:
                assert "it is as it was" in str(error)
                failed = True
            monkeypatch.setattr(atomic_files, "write_through", real)
            assert len(log) == (3 if failed else 1)
            log.append(make_episode(2, seed=4))
        lengths = [len(e) for e in EpisodeLog.open(path).episodes()]
        assert lengths == ([3, 3, 3, 2] if failed else [3, 2])
        assert not verify(path)
        if not failed:
            assert allowed > 1
            return
    raise AssertionError("never succeeded")
