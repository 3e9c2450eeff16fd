"""A recorder whose disk fills up and whose writer dies, again and again: nothing that it took is lost, and the order is kept."""

import contextlib
import errno
import mmap
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from sacflow_robot.data.log import recorder, ring
from sacflow_robot.data.log import write_ahead_log as journal
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.data.log.recorder import StepRecorder
from sacflow_robot.data.log.resilient_recorder import ResilientRecorder
from sacflow_robot.episode import Step, StepResult
from sacflow_robot.errors import LogWriteError
from sacflow_robot.spec import ArraySpec, RobotSpec
from sacflow_robot.utils import atomic_files
from tests.data.log.forked_writer import Forked, send

ROBOT = RobotSpec(
    *("Panda", "made up", "OSC_POSE delta", 4.0),
    observations=(ArraySpec("pos", (2,), "m"),),
    action_names=("x",),
    action_units=("m",),
    action_low=(-1,),
    action_high=(1,),
)
RING = 16  # records that fit into shared memory


def result(episode: int, step: int) -> StepResult:
    return StepResult({"pos": np.array([episode, step], np.float32)})


def step(episode: int, number: int) -> Step:
    return Step(result(episode, number), np.array([number / 1000], np.float32), 1000 + number)


class Disk:
    """A disk that can be full, for this process and for its forks."""

    def __init__(self) -> None:
        self._full = mmap.mmap(-1, 1)

    full = property(lambda self: bool(self._full[0]), lambda self, value: self._full.__setitem__(0, value))

    def checked(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        return call


@contextlib.contextmanager
def disk_that_may_be_full() -> Iterator[Disk]:
    disk = Disk()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic_files, "write_through", disk.checked(atomic_files.write_through))
        patch.setattr(journal.WriteAheadLog, "write", disk.checked(journal.WriteAheadLog.write))
        patch.setattr(StepRecorder, "_check_disk", disk.checked(StepRecorder._check_disk))
        patch.setattr(ring, "_LEAST_BYTES", 1)
        for module in (ring, recorder):
            patch.setattr(module, "QUIET_NS", 20_000_000)
        yield disk


class Cell(RuleBasedStateMachine):
    """Episodes on a disk that fills up, with a writer that is killed, and a person who frees space and mends."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.disk = self.stack.enter_context(disk_that_may_be_full())
        shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.path = Path(self.stack.enter_context(tempfile.TemporaryDirectory(dir=shared))) / "log.zarr"
        self.expected: list[tuple[int, bool]] = []  # steps of each episode, and whether it was ended
        self.running = False
        self.keepers: list[Forked] = []
        self.open()

    def open(self) -> None:
        self.log = ResilientRecorder(self.path, ROBOT, self.start)

    def start(self, log: Path, token: str) -> Forked:
        self.keepers.append(Forked(log, token))
        return self.keepers[-1]

    @rule()
    def fill(self) -> None:
        self.disk.full = True

    @rule()
    def free(self) -> None:
        self.disk.full = False

    @rule()
    def pause(self) -> None:
        time.sleep(0.03)

    @precondition(lambda self: self.keepers)
    @rule()
    def kill(self) -> None:
        if self.keepers[-1].poll() is None:
            send(self.keepers[-1].pid, signal.SIGKILL)

    @precondition(lambda self: not self.running)
    @rule()
    def begin(self) -> None:
        with contextlib.suppress(LogWriteError):
            self.log.begin(result(len(self.expected), 0), 1000, {"number": len(self.expected)})
            self.expected.append((0, False))
            self.running = True

    @precondition(lambda self: self.running)
    @rule(count=st.integers(1, 2 * RING))
    def append(self, count: int) -> None:
        for _ in range(count):
            episode, (taken, _) = len(self.expected) - 1, self.expected[-1]
            with contextlib.suppress(LogWriteError):  # "not logged": it is kept
                self.log.append(step(episode, taken + 1))
            self.expected[-1] = taken + 1, False

    @precondition(lambda self: self.running)
    @rule()
    def end(self) -> None:
        with contextlib.suppress(LogWriteError):
            self.log.end({"ended": True})
        self.expected[-1] = self.expected[-1][0], True
        self.running = False

    @rule(times=st.integers(1, 3))
    def mend(self, times: int) -> None:
        for _ in range(times):
            began = time.monotonic()
            with contextlib.suppress(LogWriteError):
                self.log.mend()
            assert time.monotonic() - began < 2, "a person waits for the robot, and the loop for this"

    @rule()
    def close(self) -> None:
        try:
            self.log.close(20.0)
        except LogWriteError as error:
            self.disk.full = False
            if "in memory only" in str(error):
                self.log.close(20.0)
        self.running = False
        self.disk.full = False
        self.open()

    def teardown(self) -> None:
        with self.stack:
            self.close()
            self.log.close()
            episodes = {e.info["number"]: e for e in EpisodeLog.open(self.path).episodes()}
            assert list(episodes) == [i for i, (steps, _) in enumerate(self.expected) if steps]
            for number, episode in episodes.items():
                steps, ended = self.expected[number]
                assert episode.observations["pos"].tolist() == [[number, i] for i in range(steps + 1)]
                assert np.array_equal(episode.action[:, 0] * 1000, np.arange(1, steps + 1))
                assert bool(episode.info.get("ended")) == ended


TestCell = Cell.TestCase
TestCell.settings = settings(
    deadline=None, max_examples=int(os.environ.get("SACFLOW_MENDING_EXAMPLES", "5")), stateful_step_count=20
)


def written(path: Path) -> list[int]:
    return [len(episode) for episode in EpisodeLog.open(path).episodes()]


@pytest.mark.parametrize("then", ["mend", "end", "close"])
def test_a_try_at_mending_on_a_full_disk_holds_no_lock_and_loses_nothing(tmp_path: Path, then: str) -> None:
    path = tmp_path / "log.zarr"
    with disk_that_may_be_full() as disk:
        log = ResilientRecorder(path, ROBOT, Forked)
        log.begin(result(0, 0), 1000, {})
        disk.full = True
        told = []
        for number in range(1, 3 * RING):  # more than shared memory holds
            try:
                log.append(step(0, number))
            except LogWriteError as error:
                told.append(str(error))
            time.sleep(0.01)
        assert len(told) == 1 and "No space left" in told[0] and log._unlogged
        for _ in range(3):
            with pytest.raises(
                LogWriteError, match=r"^the log is not mended: .*No space left.* is kept, free some space$"
            ):
                log.mend()
        with pytest.raises(LogWriteError, match="steps are in memory only"):
            log.close(1.0)
        began, disk.full = time.monotonic(), False
        if then == "mend":
            log.mend()
            log.append(step(0, 3 * RING))
        elif then == "end":
            log.end({})
        log.close(20.0)
        assert time.monotonic() - began < 5
    assert written(path) == [3 * RING - (then != "mend")]


def test_what_shared_memory_holds_outlives_a_process_that_ends_on_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "log.zarr"
    with disk_that_may_be_full() as disk:
        log = ResilientRecorder(path, ROBOT, Forked)
        log.begin(result(0, 0), 1000, {})
        disk.full = True
        for number in range(1, RING - 2):
            with contextlib.suppress(LogWriteError):
                log.append(step(0, number))
            time.sleep(0.01)
        with pytest.raises(LogWriteError):
            log.end({"note": "whole"})
        with pytest.raises(LogWriteError, match="No space left"):
            log.close(1.0)
    (episode,) = EpisodeLog.open(path).episodes()
    assert len(episode) == RING - 3 and episode.info["note"] == "whole"


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path]).returncode:
        pytest.skip("a small disk can be mounted by root alone")
    try:
        path, filler = tmp_path / "log.zarr", tmp_path / "filler"
        log = ResilientRecorder(path, ROBOT, Forked)
        log.begin(result(0, 0), 1000, {})
        filler.write_bytes(bytes(shutil.disk_usage(tmp_path).free - 4096))
        for number in range(1, 201):
            with contextlib.suppress(LogWriteError):
                log.append(step(0, number))
            time.sleep(0.002)
        with pytest.raises(LogWriteError, match="No space left on device"):
            log.mend()
        filler.unlink()
        log.mend()
        log.append(step(0, 201))
        log.close()
        assert written(path) == [201]
    finally:
        subprocess.run(["umount", tmp_path], check=True)
