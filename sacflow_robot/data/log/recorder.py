"""Step by step into an episode log, at the cost of a copy per step.

``StepRecorder.append`` puts the step into a ring in shared memory and returns: from then on the step survives the
death of this process. The keeper (:mod:`sacflow_robot.data.log.log_writer`), a process of its own, takes it to the disk.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from mmap import mmap
from pathlib import Path
from time import monotonic_ns
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sacflow_robot.data.log.columns import info_row
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.data.log.ring import BEAT, HEAD, HEADER_BYTES, PUBLISHED, QUIET_NS, Kind, Layout, Ring
from sacflow_robot.data.log.store import WRITING
from sacflow_robot.data.log.write_ahead_log import Session, recover
from sacflow_robot.episode import Step, StepResult
from sacflow_robot.errors import DataError, LogWriteError, UsageError, one_line
from sacflow_robot.spec import RobotSpec

_LONGEST_CLOSE_S, _WAIT_S, _EXIT_S = 120.0, 0.002, 1.0
_SPARE_BYTES = 1 << 16  # of a commit's small files
LEAVE_S = 3.0  # how long whoever was interrupted waits for the keeper, which needs nobody to finish
_STEP = int(Kind.STEP)
# Found once: append has no time to look things up.
_pack_head, _isfinite = struct.Struct(HEAD).pack_into, np.isfinite


class Process(Protocol):
    """What is needed of the keeper's process."""

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


_Place = tuple[str, np.dtype[Any], tuple[int, ...], int, int]
"""Name, dtype, shape and byte range of an array in a record."""


def _copy(memory: mmap, base: int, array: npt.NDArray[Any], place: _Place) -> None:
    """Copy an array to its place in the record that begins at ``base``."""
    name, dtype, shape, start, stop = place
    if array.shape != shape:
        raise DataError(f"{name} has shape {array.shape}, expected {shape}; the step was not logged")
    content: Any = array if array.dtype is dtype else np.ascontiguousarray(array, dtype)
    try:
        memory[base + start : base + stop] = content
    except (BufferError, ValueError):  # it does not lie in one piece
        content = np.ascontiguousarray(array)
        memory[base + start : base + stop] = content


def start_keeper(log: Path, token: str) -> Process:
    """Start the keeper in a session of its own, so that a Ctrl-C meant for the control loop does not reach it."""
    command = [sys.executable, "-P", "-m", "sacflow_robot.data.log.log_writer", str(log), token, str(os.getpid())]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)


class StepRecorder:
    """A log that is open for steps; a :class:`~sacflow_robot.spec.Recorder`. Close it, or use it as a context manager.

    Args:
        path: The log, made if absent.
        robot: The robot whose steps it will get.
        keeper: How to start the keeper.
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
        keeper: Callable[[Path, str], Process] = start_keeper,
        patience_s: float = 0.0,
    ) -> None:
        self.path, self._robot, self._start_keeper, self._patience_s = path, robot, keeper, patience_s
        self._log = EpisodeLog.writer(path, robot)
        self._log.hand_over()  # the keeper writes: closing here must not undo what it commits
        self._ring: Ring | None = None
        self._keeper: Process | None = None
        self._info: dict[str, Any] | None = None  # of the episode in progress
        self._ended = self._solved = False
        self._count = self._room_until = 0  # records written; number of the first that needs to wait for room

    def begin(self, start: StepResult, time_ns: int, info: Mapping[str, Any]) -> None:
        """Start an episode.

        Raises:
            DataError: The start does not fit the log, or the info is too long.
            LogWriteError: There is no room, or the keeper has failed.
        """
        if self._info is not None:
            raise UsageError("an episode is in progress; end it first")
        state_size = 0 if start.state is None else len(start.state)
        if self._ring is None:
            self._open(state_size)
        elif state_size != self._state_size:
            raise DataError("episodes with and without simulator states cannot share a log; give another path")
        self._make_room(2)
        self._write_info(Kind.BEGIN, info_row({**info, "success": False, "interrupted": True}))
        self._write_step(Kind.START, Step(start, self._standstill, time_ns), self._count + 1)
        self._publish(2)
        self._info, self._ended, self._solved = dict(info), False, False

    def append(self, step: Step) -> None:
        """Keep one step. It survives the death of this process from now on, and a power cut within half a second.

        Raises:
            DataError: The step does not fit the log or holds a NaN; it was not kept.
            LogWriteError: The disk is full or failing, or the keeper is dead or too slow. All steps before are kept.
        """
        self._require_episode()
        if monotonic_ns() - self._words[BEAT] > QUIET_NS or self._count >= self._room_until:
            self._make_room(1)
        self._take(step)

    def keep(self, step: Step) -> bool:
        """Put a step into the ring whether or not the keeper is well; return False when the ring has no place left.

        Raises:
            DataError: The step does not fit the log or holds a NaN; it was not kept.
        """
        self._require_episode()
        if not self._free(1):
            return False
        self._take(step)
        return True

    def end(self, info: Mapping[str, Any]) -> None:
        """End the episode; the keeper commits it in the background.

        Raises:
            DataError: The info is too long; the episode will count as interrupted.
            LogWriteError: The keeper has failed; the steps and the end are kept.
        """
        if self._info is None:
            raise UsageError("no episode is in progress; begin one first")
        info, self._info = {**self._info, "success": self._solved, **info}, None
        text = info_row(info)
        self._write_info(Kind.END, text)
        self._publish(1)
        self.check()

    @property
    def capacity(self) -> int:
        """Steps that shared memory has places for; 0 before the first episode."""
        return 0 if self._ring is None else self._ring.capacity

    def check(self) -> None:
        """Raise LogWriteError if the keeper has failed."""
        ring, keeper = self._ring, self._keeper
        assert ring is not None and keeper is not None
        if ring.quiet and (ring.error or keeper.poll() is not None):
            reason = f"{ring.error}, free some space" if ring.error else "the process that writes the log has died"
            raise LogWriteError(f"step not logged: {reason}; what was logged to {self.path} before is kept")

    def restart(self, waiting: int = 0) -> bool:
        """Start the keeper again if it has failed; it goes on with the episode where it failed.

        Args:
            waiting: Steps that the caller will append at once.

        Returns:
            Whether there was a keeper that had failed.

        Raises:
            LogWriteError: The disk has no room for what waits; nothing is lost.
        """
        ring, keeper = self._ring, self._keeper
        if ring is None or keeper is None or (not ring.error and keeper.poll() is None):
            return False
        try:
            keeper.wait(_EXIT_S)
            self._check_disk((waiting + self._count - ring.drained) * self._layout.bytes)
            ring.error = ""
            ring.beat()
            self._keeper = self._start_keeper(self.path, self._token)
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

    def close(self, within_s: float = _LONGEST_CLOSE_S) -> None:
        """Wait until everything is in the log, and let others write to it.

        Args:
            within_s: Longest wait (s). A keeper that is not done by then goes on, and ends by itself; until then the log
                cannot be opened for writing.

        Raises:
            LogWriteError: The disk is full or failing, or too slow. What was appended is kept until the log is next opened.
        """
        try:
            if self._info is not None:
                with contextlib.suppress(DataError):
                    self.end({"interrupted": True})
            if self._ring is not None and self._keeper is not None:
                self._ring.closed = True
                self._finish(self._ring, self._keeper, within_s)
        finally:
            if self._ring is not None:
                self._ring.close()
            self._ring = self._keeper = self._info = None
            self._log.close()

    def __enter__(self) -> StepRecorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(LogWriteError):  # what went wrong first is what the user must hear
            self.close(LEAVE_S)

    def _require_episode(self) -> None:
        if self._info is None or self._ended:
            raise UsageError("no episode is in progress; begin one first")

    def _take(self, step: Step) -> None:
        """Put a step into the ring, which has a place for it."""
        count = self._count
        self._write_step(_STEP, step, count)
        self._words[PUBLISHED] = self._count = count + 1
        result = step.result
        self._ended = result.terminated or result.truncated
        self._solved |= result.terminated if result.success is None else result.success

    def _free(self, count: int) -> bool:
        """Whether the ring has places for that many records, besides one for the episode's end."""
        assert self._ring is not None
        if self._count + count > self._room_until:
            self._room_until = self._ring.drained + self._ring.capacity - 1
        return self._count + count <= self._room_until

    def _open(self, state_size: int) -> None:
        """Make the ring, say where it is, and start the keeper."""
        held = self._log.state_size
        if held is not None and held != state_size:
            raise DataError(f"the episodes differ from those in {self.path} in state; log them to another path")
        layout, token = Layout(self._robot, state_size), uuid.uuid4().hex
        ring: Ring | None = None
        try:
            (self.path / WRITING).mkdir(exist_ok=True)
            ring = Ring.create(self.path, token, self._robot, layout)
            Session(token, str(ring.path), state_size).write(self.path)
            self._keeper = self._start_keeper(self.path, token)
        except OSError as error:
            if ring is not None:
                ring.close(remove=True)
            raise LogWriteError(f"cannot log to {self.path}: {one_line(error)}") from None
        self._ring, self._token, self._layout, self._state_size = ring, token, layout, state_size
        self._words = ring.words
        self._count, self._room_until = 0, ring.capacity - 1
        self._standstill = np.zeros(self._robot.action_dim, np.float32)
        self._unmeasured = np.full_like(self._standstill, np.nan)
        fields = layout.step.fields
        assert fields is not None

        def place(name: str) -> _Place:
            dtype, start = fields[name][:2]
            return name, dtype.base, dtype.shape, start, start + dtype.itemsize

        self._places = [place(a.key) for a in self._robot.observations]
        self._actions = [place(name) for name in ("action", "policy_action", "measured", "intervention_action")]
        self._state = place("state") if state_size else None
        self._finite = [self._finite_check("<f4", layout.finite_floats, self._actions[0][3])]
        if self._state is not None:
            self._finite.append(self._finite_check("<f8", state_size, self._state[3]))

    def _finite_check(
        self, dtype: str, count: int, start: int
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_], bytearray]:
        """What must be finite in each record, room for the answer, and that room as bytes, which are quickly searched."""
        assert self._ring is not None
        memory = bytearray(count)
        return self._ring.columns(dtype, count, start), np.frombuffer(memory, np.bool_), memory

    def _make_room(self, count: int) -> None:
        """Raise LogWriteError unless the keeper is alive and there is, within the patience, room for that many records."""
        until = monotonic_ns() + 1e9 * self._patience_s
        while True:
            self.check()
            if self._free(count):
                return
            if monotonic_ns() >= until:
                raise LogWriteError(
                    f"step not logged: the disk of {self.path} is {self.capacity} steps behind; log to a faster one"
                )
            time.sleep(_WAIT_S)

    def _write_info(self, kind: Kind, text: npt.NDArray[np.uint8]) -> None:
        assert self._ring is not None
        record = self._ring.infos[self._count % self._ring.capacity]
        record["index"], record["kind"], record["info"] = self._count, kind, text

    def _write_step(self, kind: int, step: Step, index: int) -> None:
        """Fill the record of that number; it does not count yet.

        This is what the control loop pays, mostly in cache misses: plain copies, and little code on the common path.
        """
        ring = self._ring
        assert ring is not None
        result, action, time_ns, policy_action, source, flags, received_ns, inferred_ns, sent_ns, by_hand = step
        memory, place = ring.map, index % ring.capacity
        base = HEADER_BYTES + place * self._layout.bytes
        # fmt: off
        _pack_head(
            memory, base, index, 0, kind, time_ns, received_ns, inferred_ns, sent_ns,
            result.reward, source, flags, result.terminated, result.truncated,
        )
        # fmt: on
        measured, (sent, asked, done, intervened) = result.measured, self._actions
        _copy(memory, base, action, sent)
        _copy(memory, base, action if policy_action is None else policy_action, asked)
        _copy(memory, base, self._unmeasured if measured is None else measured, done)
        _copy(memory, base, self._unmeasured if by_hand is None else by_hand, intervened)
        for array in self._places:
            _copy(memory, base, result.observation[array[0]], array)
        if self._state is not None:
            if result.state is None:
                raise DataError("a simulator state is missing; the step was not logged")
            _copy(memory, base, result.state, self._state)
        for rows, finite, answer in self._finite:
            _isfinite(rows[place], finite)
            if 0 in answer:
                raise DataError("an observation, action or state holds NaN or infinity; the step was not logged")

    def _publish(self, count: int) -> None:
        assert self._ring is not None
        self._count += count
        self._ring.published = self._count

    def _finish(self, ring: Ring, keeper: Process, within_s: float) -> None:
        try:
            status = keeper.wait(within_s)
        except subprocess.TimeoutExpired:
            raise LogWriteError(f"{self.path} is still being written; what was logged is kept") from None
        if status == 0:
            return
        reason = ring.error or "the process that writes the log has died"
        try:
            recover(self.path, self._robot)  # a keeper that was killed did not finish; this process can
        except (OSError, DataError) as error:
            raise LogWriteError(
                f"episode not logged: {reason}, {one_line(error)}; what was logged to {self.path} before is intact, "
                "the rest is kept in memory until the log is opened again, free some space"
            ) from None
