"""Record steps to an episode log, at the cost of a copy per step.

``StepRecorder.append`` puts the step into a ring in shared memory and returns: from then on the step survives the
death of this process. The log writer
(:mod:`sacflow_robot.data.log.log_writer`), a process of its own, takes it to the disk.
"""

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic_ns
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from sacflow_robot.data.log.columns import info_row
from sacflow_robot.data.log.episode_writer import lock_for_writing
from sacflow_robot.data.log.ring import BEAT, PUBLISHED, QUIET_NS, Kind, Layout, Ring
from sacflow_robot.data.log.store import WRITING
from sacflow_robot.data.log.write_ahead_log import Session, recover
from sacflow_robot.episode import Step, StepResult
from sacflow_robot.errors import DataError, LogWriteError, UsageError, one_line
from sacflow_robot.spec import RobotSpec

LONGEST_CLOSE_S = 120.0
_WAIT_S = 0.002
_EXIT_S = 1.0
_SPARE_BYTES = 1 << 16  # of a commit's small files
_LEAVE_S = 3.0  # wait for the log writer after an error; it finishes by itself
_STEP = int(Kind.STEP)


class Process(Protocol):
    """Process of the log writer, as far as the recorder needs it."""

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


WriterStarter = Callable[[Path, str], Process]
"""How to start the log writer, given the log and the session's token."""


def start_writer(log: Path, token: str) -> Process:
    """Start the log writer in a session of its own, so that a Ctrl-C meant for the control loop does not reach it."""
    command = [sys.executable, "-P", "-m", "sacflow_robot.data.log.log_writer", str(log), token, str(os.getpid())]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)


class StepRecorder:
    """A log that is open for steps; a :class:`~sacflow_robot.spec.Recorder`. Close it, or use it as a context manager.

    Args:
        path: The log, made if absent.
        robot: The robot whose steps it will get.
        start_writer: How to start the log writer.
        patience_s: Longest that a step waits for a disk that is behind (s). 0 for a robot that moves on its own; a simulated
            robot in lockstep outruns any disk, and can wait.

    Raises:
        DataError: The path holds something else, or episodes of a different robot.
        LogWriteError: The log cannot be made there, or another process is writing to it.
    """

    def __init__(
        self,
        path: Path,
        robot: RobotSpec,
        start_writer: WriterStarter = start_writer,
        patience_s: float = 0.0,
    ) -> None:
        self.path = path
        self._robot = robot
        self._start_writer = start_writer
        self._patience_s = patience_s
        self._lock, self._log = lock_for_writing(path, robot)
        self._ring: Ring | None = None
        self._writer: Process | None = None
        self._info: dict[str, Any] | None = None  # of the episode in progress
        self._ended = False
        self._solved = False
        self._count = 0  # records written
        self._room_until = 0  # number of the first record that needs to wait for room

    def begin(self, start: StepResult, time_ns: int, info: Mapping[str, Any]) -> None:
        """Start an episode.

        Raises:
            DataError: The start does not fit the log, or the info is too long.
            LogWriteError: There is no room, or the log writer has failed.
        """
        if self._info is not None:
            raise UsageError("an episode is in progress; end it first")
        state_size = 0 if start.state is None else len(start.state)
        if self._ring is None:
            self._open(state_size)
        elif state_size != self._ring.layout.state_size:
            raise DataError("episodes with and without simulator states cannot share a log; give another path")
        ring = self._make_room(2)
        interrupted = info_row({**info, "success": False, "interrupted": True})
        ring.write_info(Kind.BEGIN, interrupted, self._count)
        standstill = np.zeros(self._robot.action_dim, np.float32)
        ring.write_step(Kind.START, Step(start, standstill, time_ns), self._count + 1)
        self._count += 2
        ring.published = self._count
        self._info = dict(info)
        self._ended = False
        self._solved = False

    def append(self, step: Step) -> None:
        """Keep one step. It survives the death of this process from now on, and a power cut within half a second.

        Raises:
            DataError: The step does not fit the log or holds a NaN; it was not kept.
            LogWriteError: The disk is full or failing, or the log writer is dead or too slow. All steps before are kept.
        """
        ring = self._in_episode()
        if monotonic_ns() - ring.words[BEAT] > QUIET_NS or self._count >= self._room_until:
            self._make_room(1)
        self._take(ring, step)

    def keep(self, step: Step) -> bool:
        """Put a step into the ring whether or not the log writer is well; return False when the ring has no place left.

        Raises:
            DataError: The step does not fit the log or holds a NaN; it was not kept.
        """
        ring = self._in_episode()
        if not self._free(ring, 1):
            return False
        self._take(ring, step)
        return True

    def end(self, info: Mapping[str, Any]) -> None:
        """End the episode; the log writer commits it in the background.

        Raises:
            DataError: The info is too long; the episode will count as interrupted.
            LogWriteError: The log writer has failed; the steps and the end are kept.
        """
        if self._info is None or self._ring is None:
            raise UsageError("no episode is in progress; begin one first")
        whole = {**self._info, "success": self._solved, **info}
        self._info = None
        self._ring.write_info(Kind.END, info_row(whole), self._count)
        self._count += 1
        self._ring.published = self._count
        self.check()

    @property
    def capacity(self) -> int:
        """Steps that shared memory has places for; 0 before the first episode."""
        return 0 if self._ring is None else self._ring.capacity

    def check(self) -> None:
        """Raise LogWriteError if the log writer has failed."""
        ring, writer = self._ring, self._writer
        assert ring is not None and writer is not None
        if ring.quiet and (ring.error or writer.poll() is not None):
            reason = f"{ring.error}, free some space" if ring.error else "the process that writes the log has died"
            raise LogWriteError(f"step not logged: {reason}; what was logged to {self.path} before is kept")

    def restart(self, waiting: int = 0) -> bool:
        """Start the log writer again if it has failed, which is returned; it goes on with the episode where it failed.

        The disk has to have room for all that waits in the ring, and for the steps that the caller says it will append.

        Raises:
            LogWriteError: The disk has no room for what waits; nothing is lost.
        """
        ring, writer = self._ring, self._writer
        if ring is None or writer is None or (not ring.error and writer.poll() is None):
            return False
        try:
            writer.wait(_EXIT_S)
            self._check_disk((waiting + self._count - ring.drained) * ring.layout.bytes)
            ring.error = ""
            ring.beat()
            self._writer = self._start_writer(self.path, self._token)
        except subprocess.TimeoutExpired:
            raise LogWriteError(f"the process that writes {self.path} hangs; what was logged is kept") from None
        except OSError as error:
            raise LogWriteError(
                f"the log is not mended: {one_line(error)}; what was logged to {self.path} is kept, free some space"
            ) from None
        return True

    def _check_disk(self, size: int) -> None:
        """Raise OSError unless the disk takes that many bytes in the journal, and as many in the arrays."""
        trial = self.path / WRITING / "trial"
        descriptor = os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, 2 * size + _SPARE_BYTES)
        finally:
            os.close(descriptor)
            trial.unlink()

    def close(self, within_s: float = LONGEST_CLOSE_S) -> None:
        """Wait until everything is in the log, and let others write to it.

        Args:
            within_s: Longest wait (s). A log writer that is not done by then goes on, and ends by itself; until then the log
                cannot be opened for writing.

        Raises:
            LogWriteError: The disk is full or failing, or too slow. What was appended is kept until the log is next opened.
        """
        try:
            if self._info is not None:
                with contextlib.suppress(DataError):
                    StepRecorder.end(self, {"interrupted": True})
            if self._ring is not None and self._writer is not None:
                self._ring.closed = True
                self._wait_for(self._writer, self._ring, within_s)
        finally:
            if self._ring is not None:
                self._ring.close()
            self._ring = self._writer = self._info = None
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(LogWriteError):  # what went wrong first is what the user must hear
            self.close(_LEAVE_S)

    def _in_episode(self) -> Ring:
        if self._info is None or self._ended or self._ring is None:
            raise UsageError("no episode is in progress; begin one first")
        return self._ring

    def _take(self, ring: Ring, step: Step) -> None:
        """Put a step into the ring, which has a place for it."""
        ring.write_step(_STEP, step, self._count)
        self._count += 1
        ring.words[PUBLISHED] = self._count
        result = step.result
        self._ended = result.terminated or result.truncated
        self._solved |= result.terminated if result.success is None else result.success

    def _free(self, ring: Ring, count: int) -> bool:
        """Return True if the ring has places for that many records, besides one for the episode's end."""
        if self._count + count > self._room_until:
            self._room_until = ring.drained + ring.capacity - 1
        return self._count + count <= self._room_until

    def _open(self, state_size: int) -> None:
        """Make the ring, say where it is, and start the log writer."""
        held = self._log.state_size
        if held is not None and held != state_size:
            raise DataError(f"the episodes differ from those in {self.path} in state; log them to another path")
        self._token = uuid.uuid4().hex
        ring: Ring | None = None
        try:
            (self.path / WRITING).mkdir(exist_ok=True)
            ring = Ring.create(self.path, self._token, Layout(self._robot, state_size))
            Session(self._token, str(ring.path), state_size).write(self.path)
            self._writer = self._start_writer(self.path, self._token)
        except OSError as error:
            if ring is not None:
                ring.close(remove=True)
            raise LogWriteError(f"cannot log to {self.path}: {one_line(error)}") from None
        self._ring = ring
        self._count = 0
        self._room_until = ring.capacity - 1

    def _make_room(self, count: int) -> Ring:
        """The ring, once the log writer is alive and there is, within the patience, room for that many records."""
        assert self._ring is not None
        until = monotonic_ns() + 1e9 * self._patience_s
        while True:
            self.check()
            if self._free(self._ring, count):
                return self._ring
            if monotonic_ns() >= until:
                raise LogWriteError(
                    f"step not logged: the disk of {self.path} is {self.capacity} steps behind; log to a faster one"
                )
            time.sleep(_WAIT_S)

    def _wait_for(self, writer: Process, ring: Ring, within_s: float) -> None:
        try:
            status = writer.wait(within_s)
        except subprocess.TimeoutExpired:
            raise LogWriteError(f"{self.path} is still being written; what was logged is kept") from None
        if status == 0:
            return
        reason = ring.error or "the process that writes the log has died"
        try:
            recover(self.path, self._robot)  # a log writer that was killed did not finish; this process can
        except (OSError, DataError) as error:
            raise LogWriteError(
                f"episode not logged: {reason}, {one_line(error)}; what was logged to {self.path} before is intact, "
                "the rest is kept in memory until the log is opened again, free some space"
            ) from None
