"""Progress of training on the terminal; on stderr, so that stdout carries results alone."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Speed(ProgressColumn):
    """Steps per second of a task."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} steps/s", style="progress.data.speed")


class TrainingProgress:
    """One bar per phase: phase, step, steps/s, time left, last success rate; plus a line per evaluation."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self._bars = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            _Speed(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[success]}"),
            console=self.console,
            transient=False,
        )
        self._task = self._bars.add_task("", visible=False, success="")
        self._success = ""

    def begin(self, phase: str, total: int, done: int = 0) -> None:
        """Show a new bar for a phase of ``total`` steps, ``done`` of which lie behind."""
        self._task = self._bars.add_task(phase, total=total, completed=done, success=self._success)

    def advance(self, steps: int) -> None:
        self._bars.advance(self._task, steps)

    def evaluated(self, line: str, success_rate: float) -> None:
        """Show a line about an evaluation, and its success rate beside the bar."""
        self._success = f"success {success_rate:.0%}"
        self._bars.update(self._task, success=self._success)
        self.console.print(line)

    def say(self, line: str) -> None:
        self.console.print(line)

    def __enter__(self) -> TrainingProgress:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bars.stop()
