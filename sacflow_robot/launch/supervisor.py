"""Starts the processes of a cell one after the other, watches over them, shows them, and stops them in the opposite order."""

import time
from collections.abc import Callable, Sequence

from rich.table import Table
from rich.text import Text

from sacflow_robot.errors import SacflowError
from sacflow_robot.launch.cell import ProcessPlan
from sacflow_robot.launch.process import State, SupervisedProcess

_POLL_S = 0.05
_SHOWN_LINES = 8
_COLORS = {
    State.READY: "green",
    State.DONE: "dim",
    State.FAILED: "bold red",
    State.PAUSING: "yellow",
    State.STARTING: "cyan",
    State.STOPPING: "cyan",
    State.WAITING: "dim",
}


class CellError(SacflowError):
    """A process of the cell failed; the others were stopped."""


class Supervisor:
    """A running cell. The last process is what the cell is for: when it ends, the cell does.

    Args:
        program: Command that this program's arguments follow.
        heard: Called with the name of a process and each line of its output, from reading threads.
        refresh: Called often while the cell runs, to show it.
    """

    def __init__(
        self,
        plans: Sequence[ProcessPlan],
        program: Sequence[str],
        *,
        heard: Callable[[str, str], None] = lambda name, line: None,
        refresh: Callable[[], None] = lambda: None,
    ) -> None:
        self.processes = [SupervisedProcess(plan, program, heard) for plan in plans]
        self._heard, self._refresh = heard, refresh
        self._missed: set[str] = set()

    def run(self) -> None:
        """Run the cell until its last process ends well. Stops everything in any case.

        Raises:
            CellError: A process failed that may not, or ended before the last; the message has its name, its exit
                status and its last lines.
        """
        try:
            for process in self.processes:
                if process.needless():
                    continue
                process.start()
                while process.state in (State.STARTING, State.PAUSING):
                    self._look()
                    if process.overdue():
                        raise CellError(
                            f"process {process.plan.name!r} was not ready within {process.plan.ready_within_s:g} s"
                            f"{_said(process)}; the others were stopped"
                        )
            last = self.processes[-1]
            while last.state is not State.DONE:
                self._look()
        finally:
            self.stop()

    def stop(self) -> None:
        """Stop every process, the last started first, each before the next is asked to; when interrupted, all at once."""
        try:
            for process in reversed(self.processes):
                process.ask_to_stop()
                process.wait_stopped(self._refresh)
        except KeyboardInterrupt:
            for process in reversed(self.processes):
                process.kill()
            raise

    def _look(self) -> None:
        """One look at every process; raises CellError if one of them ended that should not have."""
        for process in self.processes:
            process.poll()
            last, plan = process is self.processes[-1], process.plan
            if last and process.state is State.FAILED:
                raise CellError(f"process {plan.name!r} ended with {_how(process)}{_said(process)}")
            ended_well = process.state is State.DONE and not (last or plan.may_end or plan.ready_at_end)
            if process.state is State.FAILED and plan.may_fail:
                if plan.name not in self._missed:
                    self._missed.add(plan.name)
                    self._heard(plan.name, f"failed with {_how(process)}; the others go on without it")
            elif process.state is State.FAILED or ended_well:
                raise CellError(
                    f"process {plan.name!r} ended first, with {_how(process)}{_said(process)}; the others were stopped"
                )
        self._refresh()
        time.sleep(_POLL_S)


def _how(process: SupervisedProcess) -> str:
    status = process.status or 0
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    return f"{how} after {process.restarts} restarts" if process.restarts else how


def _said(process: SupervisedProcess) -> str:
    lines = process.last_lines(_SHOWN_LINES)
    return f"; it said last: {' / '.join(lines)}" if lines else ""


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
