"""The table of what runs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from sacflow_robot.launch.process import State, SupervisedProcess

_COLORS = {
    State.READY: "green",
    State.DONE: "dim",
    State.FAILED: "bold red",
    State.PAUSING: "yellow",
    State.STARTING: "cyan",
    State.STOPPING: "cyan",
    State.WAITING: "dim",
}


def cell_table(title: str, processes: Sequence[SupervisedProcess]) -> Table:
    """One row per process: state, process id, time running, restarts, and the last line that it said."""
    table = Table(title=title, title_justify="left", expand=True, box=None, pad_edge=False)
    table.add_column("process", no_wrap=True)
    table.add_column("state", no_wrap=True, min_width=10)
    table.add_column("pid", justify="right", no_wrap=True)
    table.add_column("up", justify="right", no_wrap=True, min_width=7)
    table.add_column("restarts", justify="right", no_wrap=True)
    table.add_column("last line", no_wrap=True, overflow="ellipsis", ratio=1)
    for process in processes:
        said = process.last_lines(1)
        table.add_row(
            Text(process.plan.name),
            Text(process.state.value, _COLORS[process.state]),
            "" if process.pid is None else str(process.pid),
            duration(process.uptime_s) if process.uptime_s else "",
            str(process.restarts) if process.restarts else "",
            Text(said[0] if said else "", "" if process.state is State.FAILED else "dim"),
        )
    return table


def duration(seconds: float) -> str:
    """``42 s``, ``3:07``, ``1:02:03``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    clock = f"{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
    return f"{hours}:{clock}" if hours else clock
