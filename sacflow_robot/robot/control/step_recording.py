"""Hand an episode's steps to a recorder, each in the period after it: a robot that moves has had its next command by then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sacflow_robot.episode import Step, StepResult
from sacflow_robot.errors import LogWriteError
from sacflow_robot.interfaces import Recorder, ResilientRecorder


class StepRecording:
    """The recording of one episode.

    Args:
        recorder: Gets the steps; None records nothing.
        wait: Whether a step that cannot be kept is an error at once, as on a robot that stands still meanwhile. Else a
            resilient recorder keeps it for later.
    """

    def __init__(self, recorder: Recorder | None, wait: bool) -> None:
        self._recorder = recorder
        self._wait = wait
        self._step: Step | None = None  # taken, and not yet given to the recorder
        self._begun = False

    def begin(self, start: StepResult, captured_ns: int, info: Mapping[str, Any]) -> None:
        if self._recorder is not None:
            self._recorder.begin(start, captured_ns, info)
            self._begun = True

    def take(self, step: Step) -> None:
        """Take a step, for the next :meth:`flush`."""
        self._step = step

    def flush(self) -> str:
        """Give the step to the recorder; the reason why a resilient one could not write it, else empty.

        Raises:
            LogWriteError: The recorder cannot keep the step.
        """
        step = self._step
        self._step = None
        if step is None or self._recorder is None or not self._begun:
            return ""
        try:
            self._recorder.append(step)
        except LogWriteError as error:
            if self._wait or not isinstance(self._recorder, ResilientRecorder):
                raise
            return str(error)
        return ""

    def mend(self) -> None:
        """Have a resilient recorder try again.

        Raises:
            LogWriteError: It still cannot write.
        """
        if isinstance(self._recorder, ResilientRecorder):
            self._recorder.mend()

    def end(self, info: Mapping[str, Any]) -> None:
        if self._recorder is not None and self._begun:
            self.flush()
            self._begun = False
            self._recorder.end(info)
