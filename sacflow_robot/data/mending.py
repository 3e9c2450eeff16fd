"""A recorder that loses no step when what is behind it dies: it keeps them until it can be opened again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from sacflow_robot.data.recorder import LEAVE_S, StepRecorder
from sacflow_robot.episode import Step
from sacflow_robot.errors import DataError, LogWriteError
from sacflow_robot.spec import StepResult


class MendingRecorder:
    """A :class:`~sacflow_robot.spec.Recorder` for arms that move on their own time.

    When the log fails, ``append`` raises LogWriteError once, and from then on keeps steps in memory. :meth:`mend` opens the log
    anew and writes them as an episode that goes on where the logged part ends: its info says ``continues_at``, the number of
    the episode's steps before it.

    Args:
        open_log: Opens the log.

    Raises:
        DataError, LogWriteError: As ``open_log``.
    """

    def __init__(self, open_log: Callable[[], StepRecorder]) -> None:
        self._open, self._log = open_log, open_log()
        self._unlogged: list[Step] = []
        self._info: Mapping[str, Any] | None = None  # of the episode in progress
        self._last: tuple[StepResult, int] | None = None  # what the last logged step led to
        self._count = 0
        self._broken = False

    def begin(self, start: StepResult, time_ns: int, info: Mapping[str, Any]) -> None:
        self.mend()
        self._info, self._last, self._count = info, (start, time_ns), 0
        self._log.begin(start, time_ns, info)

    def append(self, step: Step) -> None:
        if self._broken:
            self._unlogged.append(step)
            return
        try:
            self._log.append(step)
        except LogWriteError:
            self._broken = True
            self._unlogged.append(step)
            raise
        self._count += 1
        self._last = step.result, step.time_ns

    def end(self, info: Mapping[str, Any]) -> None:
        if self._broken:
            self.mend()
        if self._info is not None:
            self._info = None
            self._log.end(info)

    def mend(self) -> None:
        """Open the log anew where it has failed, and write what it lacks.

        Raises:
            LogWriteError: It still fails; nothing is forgotten.
        """
        if not self._broken:
            return
        with contextlib.suppress(LogWriteError):
            self._log.close()
        self._log = self._open()
        self._broken = False
        if self._info is None or self._last is None:
            return
        start, time_ns = self._last
        self._log.begin(_started(start), time_ns, {**self._info, "continues_at": self._count})
        waiting, self._unlogged = self._unlogged, []
        for step in waiting:
            self.append(step)

    def close(self, *within_s: float) -> None:
        """As ``StepRecorder.close``, after mending."""
        if self._broken:
            with contextlib.suppress(DataError):
                self.mend()
        self._log.close(*within_s)

    def __enter__(self) -> MendingRecorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(LogWriteError):
            self.close(LEAVE_S)


def _started(result: StepResult) -> StepResult:
    """What a step led to, as the start of what follows."""
    return StepResult(result.observation, state=result.state, time_ns=result.time_ns)
