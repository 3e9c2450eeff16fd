"""Step by step into an episode log, at the cost of a copy per step.

``StepRecorder.append`` puts the step into a ring in shared memory and returns: from then on the step survives the
death of this process. The keeper (:mod:`sacflow_robot.data.keeper`), a process of its own, takes it to the disk.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from sacflow_robot.data.columns import info_row
from sacflow_robot.data.journal import Session, recover
from sacflow_robot.data.log import EpisodeLog
from sacflow_robot.data.ring import Kind, Layout, Ring
from sacflow_robot.data.store import WRITING
from sacflow_robot.episode import Step
from sacflow_robot.errors import DataError, LogWriteError, UsageError, one_line
from sacflow_robot.spec import ArmSpec, StepResult

_LONGEST_CLOSE_S = 120.0


class Process(Protocol):
    """What is needed of the keeper's process."""

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


def start_keeper(log: Path, token: str) -> Process:
    """Start the keeper in a session of its own, so that a Ctrl-C meant for the control loop does not reach it."""
    command = [sys.executable, "-m", "sacflow_robot.data.keeper", str(log), token, str(os.getpid())]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)


class StepRecorder:
    """A log that is open for steps; a :class:`~sacflow_robot.spec.Recorder`. Close it, or use it as a context manager.

    Args:
        path: The log, made if absent.
        arm: The arm whose steps it will get.
        keeper: How to start the keeper.

    Raises:
        DataError: The path holds something else, or episodes of a different arm.
        LogWriteError: The log cannot be made there, or another process is writing to it.
    """

    def __init__(self, path: Path, arm: ArmSpec, keeper: Callable[[Path, str], Process] = start_keeper) -> None:
        self.path, self._arm, self._start_keeper = path, arm, keeper
        self._log = EpisodeLog.writer(path, arm)
        self._ring: Ring | None = None
        self._keeper: Process | None = None
        self._info: dict[str, Any] | None = None  # of the episode in progress
        self._ended = self._solved = False

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
        room = self._room(2)
        text = info_row({**info, "success": False, "interrupted": True})
        self._ring_infos["kind"][room[0]], self._ring_infos["info"][room[0]] = Kind.BEGIN, text
        self._ring_infos["index"][room[0]] = self._count
        self._observe(room[1], self._count + 1, Kind.START, start, time_ns)
        self._publish(2)
        self._info, self._ended, self._solved = dict(info), False, False

    def append(self, step: Step) -> None:
        """Keep one step. It survives the death of this process from now on, and a power cut within half a second.

        Raises:
            DataError: The step does not fit the log or holds a NaN; it was not kept.
            LogWriteError: The disk is full or failing, or the keeper is dead or too slow. All steps before are kept.
        """
        if self._info is None or self._ended:
            raise UsageError("no episode is in progress; begin one first")
        (at,) = self._room(1)
        fields, result = self._fields, step.result
        fields["action"][at] = step.commanded
        fields["proposed"][at] = step.commanded if step.proposed is None else step.proposed
        fields["measured"][at] = np.nan if result.measured is None else result.measured
        fields["reward"][at] = result.reward
        fields["source"][at], fields["flags"][at] = step.source, step.flags
        fields["terminated"][at], fields["truncated"][at] = result.terminated, result.truncated
        fields["received_ns"][at], fields["inferred_ns"][at] = step.received_ns, step.inferred_ns
        fields["sent_ns"][at] = step.sent_ns
        if not np.isfinite(fields["action"][at]).all():
            raise DataError("a step's commanded action holds NaN or infinity; it was not logged")
        self._observe(at, self._count, Kind.STEP, result, step.time_ns)
        self._publish(1)
        self._ended, self._solved = result.ended, result.terminated

    def end(self, info: Mapping[str, Any]) -> None:
        """End the episode; the keeper commits it in the background.

        Raises:
            DataError: The info is too long; the episode will count as interrupted.
            LogWriteError: The keeper has failed; the steps are kept.
        """
        if self._info is None:
            raise UsageError("no episode is in progress; begin one first")
        text = info_row({**self._info, "success": self._solved, **info})
        self._info = None
        (at,) = self._room(1)
        self._ring_infos["kind"][at], self._ring_infos["info"][at] = Kind.END, text
        self._ring_infos["index"][at] = self._count
        self._publish(1)

    def close(self) -> None:
        """Wait until everything is in the log, and let others write to it.

        Raises:
            LogWriteError: The disk is full or failing. What was appended is kept until the log is next opened.
        """
        try:
            if self._info is not None:
                with contextlib.suppress(DataError):
                    self.end({"interrupted": True})
            if self._ring is not None and self._keeper is not None:
                self._ring.closed = True
                self._finish(self._ring, self._keeper)
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
            self.close()

    def _open(self, state_size: int) -> None:
        """Make the ring, say where it is, and start the keeper."""
        held = self._log.state_size
        if held is not None and held != state_size:
            raise DataError(f"the episodes differ from those in {self.path} in state; log them to another path")
        layout, token = Layout(self._arm, state_size), uuid.uuid4().hex
        try:
            (self.path / WRITING).mkdir(exist_ok=True)
            ring = Ring.create(self.path, token, self._arm, layout)
            Session(token, str(ring.path), state_size).write(self.path)
            self._keeper = self._start_keeper(self.path, token)
        except OSError as error:
            raise LogWriteError(f"cannot log to {self.path}: {one_line(error)}") from None
        self._ring, self._state_size, self._count = ring, state_size, 0
        self._fields = {name: ring.records[name] for name in layout.step.names or ()}
        self._ring_infos = {name: ring.infos[name] for name in ("index", "kind", "info")}
        self._observed = [(self._fields[a.key], a.key, a.shape) for a in self._arm.observations]
        # All float32 observations lie side by side, so that one look finds a NaN in any.
        floats = [key for key, (dtype, _) in layout.observed.items() if dtype == "<f4"]
        width = sum(int(np.prod(layout.observed[key][1])) for key in floats)
        first = self._fields[floats[0]] if floats else None
        self._floats = (
            np.empty((ring.capacity, 0), np.float32)
            if first is None
            else np.lib.stride_tricks.as_strided(
                first.reshape(ring.capacity, -1)[:, :1], (ring.capacity, width), (layout.bytes, 4)
            )
        )

    def _room(self, count: int) -> list[int]:
        """Places for ``count`` records."""
        ring = self._ring
        assert ring is not None and self._keeper is not None
        if self._keeper.poll() is not None or ring.error:
            reason = ring.error or "the process that writes the log has died"
            raise LogWriteError(
                f"step not logged: {reason}; what was logged to {self.path} before is kept, free some space"
                if ring.error
                else f"step not logged: {reason}; what was logged to {self.path} before is kept"
            )
        if self._count + count - ring.drained > ring.capacity:
            raise LogWriteError(
                f"step not logged: the disk of {self.path} has not kept up for {ring.capacity} steps; log to a faster one"
            )
        return [(self._count + i) % ring.capacity for i in range(count)]

    def _observe(self, at: int, index: int, kind: Kind, result: StepResult, time_ns: int) -> None:
        fields = self._fields
        fields["index"][at], fields["kind"][at], fields["time_ns"][at] = index, kind, time_ns
        for rows, key, shape in self._observed:
            value = result.observation[key]
            if value.shape != shape:
                raise DataError(f"observation {key!r} has shape {value.shape}, expected {shape}; it was not logged")
            rows[at] = value
        if not np.isfinite(self._floats[at]).all():
            raise DataError("an observation holds NaN or infinity; it was not logged")
        if self._state_size:
            if result.state is None or not np.isfinite(result.state).all():
                raise DataError("a simulator state is missing or holds NaN; it was not logged")
            fields["state"][at] = result.state

    def _publish(self, count: int) -> None:
        assert self._ring is not None
        self._count += count
        self._ring.published = self._count

    def _finish(self, ring: Ring, keeper: Process) -> None:
        try:
            status = keeper.wait(_LONGEST_CLOSE_S)
        except subprocess.TimeoutExpired:
            raise LogWriteError(f"{self.path} is still being written; what was logged is kept") from None
        if status == 0:
            return
        reason = ring.error or "the process that writes the log has died"
        try:
            recover(self.path, self._arm)  # a keeper that was killed did not finish; this process can
        except (OSError, DataError) as error:
            raise LogWriteError(
                f"episode not logged: {reason}, {one_line(error)}; what was logged to {self.path} before is intact, "
                "the rest is kept in memory until the log is opened again, free some space"
            ) from None
