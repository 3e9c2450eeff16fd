"""Remarks and progress bars on stderr, so that stdout carries results alone."""

from rich import progress as bars
from rich.console import Console


def console(stderr: bool = True) -> Console:
    """Console for progress and remarks: stderr. Lines are not broken, so that paths can be copied."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)


def progress_bar(noun: str) -> bars.Progress:
    """A bar that counts ``noun``, with a success rate in ``{task.fields[success]}``."""
    success = bars.TextColumn("{task.fields[success]}")
    return _bar(bars.MofNCompleteColumn(), bars.TextColumn(noun), bars.TimeRemainingColumn(compact=True), success)


def transfer_bar() -> bars.Progress:
    """A bar for a download."""
    return _bar(bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn(compact=True))


def _bar(*columns: bars.ProgressColumn) -> bars.Progress:
    return bars.Progress(bars.TextColumn("{task.description}"), bars.BarColumn(28), *columns, console=console())
