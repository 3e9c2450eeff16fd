"""A recorder that loses no step when what is behind it dies: it keeps them until the disk takes them again."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sacflow_robot.data.log.recorder import LONGEST_CLOSE_S, StepRecorder, WriterStarter, start_writer
from sacflow_robot.episode import Step, StepResult
from sacflow_robot.errors import DataError, LogWriteError, UsageError
from sacflow_robot.spec import RobotSpec

_STALLED_S, _WAIT_S = 10.0, 0.005
_CATCH_UP = 8  # steps handed over with each new one, while older ones wait: little time for the control loop


class ResilientRecorder(StepRecorder):
    """A :class:`~sacflow_robot.interfaces.ResilientRecorder` for robots that move on their own time.

    When the log fails, ``append`` raises LogWriteError once. From then on it keeps steps: in shared memory, where they survive
    this process, and once that is full in its own. :meth:`mend` has them written where the log broke off.
    """

    def __init__(self, path: Path, robot: RobotSpec, start_writer: WriterStarter = start_writer) -> None:
        super().__init__(path, robot, start_writer)
        self._unlogged: deque[Step] = deque()  # what shared memory has no place for
        self._most = 0  # of these, while the disk catches up
        self._end: Mapping[str, Any] | None = None  # of an episode whose steps are not all handed over
        self._broken = False

    def begin(self, start: StepResult, time_ns: int, info: Mapping[str, Any]) -> None:
        self._catch_up()
        with self._noticed():
            super().begin(start, time_ns, info)

    def append(self, step: Step) -> None:
        if self._end is not None:
            raise UsageError("no episode is in progress; begin one first")
        if self._broken or self._unlogged:
            self._put_off(step)
        else:
            try:
                super().append(step)
            except LogWriteError:
                self._broken = True
                self._put_off(step)
                raise
        if self._unlogged and not self._broken:
            with self._noticed():
                self.check()
                if len(self._unlogged) > self._most:
                    raise LogWriteError(f"the disk of {self.path} is behind by more and more; log to a faster one")

    def end(self, info: Mapping[str, Any]) -> None:
        """End the episode.

        Raises:
            LogWriteError: The log still fails. The steps and the end are kept; the next begin or close tries again.
        """
        if self._end is not None:
            raise UsageError("no episode is in progress; begin one first")
        self._end = info
        try:
            self._catch_up()
        except LogWriteError:
            if self._end is not None and not self._unlogged:
                with contextlib.suppress(LogWriteError):  # it says the same
                    self._write_end()
            raise

    def mend(self) -> None:
        """Have the log written again where it has failed, without waiting until all is written.

        Raises:
            LogWriteError: The disk is still full or behind; nothing is lost, try again.
        """
        if not self._broken or self._revive() or not self._unlogged or self._hand_over(_CATCH_UP):
            return
        self._broken = True
        raise LogWriteError(f"the disk of {self.path} is still behind; try again, or log to a faster one")

    def close(self, within_s: float = LONGEST_CLOSE_S) -> None:
        """As ``StepRecorder.close``, after mending.

        Raises:
            LogWriteError: As ``StepRecorder.close``. Where steps are in this process's memory alone, it stays open: free some
                space and close it again.
        """
        try:
            self._catch_up(min(within_s, _STALLED_S))
        except LogWriteError as error:
            if self._unlogged:
                raise LogWriteError(f"{error}; until then {len(self._unlogged)} steps are in memory only") from None
            if self._end is not None:
                with contextlib.suppress(DataError):
                    self._write_end()
        super().close(within_s)

    @contextlib.contextmanager
    def _noticed(self) -> Iterator[None]:
        try:
            yield
        except LogWriteError:
            self._broken = True
            raise

    def _revive(self) -> bool:
        """Have the log written again; returns whether its writer had died."""
        died = self.restart(len(self._unlogged))
        self._broken = False
        self._most = len(self._unlogged) + self.capacity
        return died

    def _put_off(self, step: Step) -> None:
        self._unlogged.append(step)
        self._hand_over(_CATCH_UP)

    def _hand_over(self, most: int) -> int:
        """Move up to that many kept steps to shared memory, as far as it has places; returns how many."""
        count = 0
        while count < most and self._unlogged:
            try:
                if not self.keep(self._unlogged[0]):
                    break
            except DataError:  # a step that no log takes; the ones after it are none the worse
                self._unlogged.popleft()
                raise
            self._unlogged.popleft()
            count += 1
        return count

    def _catch_up(self, stalled_s: float = _STALLED_S) -> None:
        """Mend, and wait until all steps and a pending end are handed over, as long as the disk takes any."""
        if self._broken:
            self._revive()
        until = time.monotonic() + stalled_s
        while self._unlogged:
            with self._noticed():
                self.check()
                if self._hand_over(_CATCH_UP):
                    until = time.monotonic() + stalled_s
                elif time.monotonic() > until:
                    raise LogWriteError(f"the disk of {self.path} takes nothing; what was logged is kept")
                else:
                    time.sleep(_WAIT_S)
        if self._end is not None:
            self._write_end()

    def _write_end(self) -> None:
        info, self._end = self._end, None
        assert info is not None
        with self._noticed():
            super().end(info)
