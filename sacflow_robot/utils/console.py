"""Remarks and progress bars on stderr, so that stdout carries results alone."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


def console(stderr: bool = True) -> Console:
    """Console for progress and remarks: stderr. Lines are not broken, so that paths can be copied."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)


def progress_bar(noun: str) -> Progress:
    """A bar that counts ``noun``, with a success rate in ``{task.fields[success]}``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn(noun),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[success]}"),
        console=console(),
    )


def transfer_bar() -> Progress:
    """A bar for a download."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=console(),
    )
