"""``sacflow-robot launch``."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import tyro

from sacflow_robot.cli import COMMANDS, common
from sacflow_robot.errors import UsageError, one_line

if TYPE_CHECKING:
    from sacflow_robot.launch.supervisor import Supervisor


@dataclass(frozen=True)
class Launch(common.JsonOptions):
    """Bring up the processes of a launch file, watch over them, and stop them all when the last one ends or one fails.

    Attributes:
        file: Launch file: a YAML map of process names to commands of this program, in the order of starting; see
            docs/launch.md.
        output: Folder for everything that the processes say, a file each.
        plain: Print what they say line by line, instead of one table; so it is where there is no terminal.
    """

    file: Annotated[Path, tyro.conf.Positional]
    output: Path | None = None
    plain: bool = False

    def run(self) -> int:
        from sacflow_robot.launch.cell import read_cell
        from sacflow_robot.launch.supervisor import Supervisor, cell_table

        out = common.console()
        plans = read_cell(self.file, COMMANDS)
        table = out.is_terminal and not self.plain and not any(plan.terminal for plan in plans)
        program = [sys.executable, "-P", "-m", "sacflow_robot"]  # -P: no sacflow_robot/ in the working folder
        with contextlib.ExitStack() as stack:
            files = self._open_files([plan.name for plan in plans], stack)
            width, lock = max(len(plan.name) for plan in plans), threading.Lock()

            def heard(name: str, line: str) -> None:
                with lock:
                    if name in files and not files[name].closed:
                        print(line, file=files[name], flush=True)
                    if not table:
                        out.print(f"{name:<{width}} | {line}")

            supervisor = Supervisor(plans, program, heard=heard)
            # SIGINT too: in the background of a script it is ignored unless one asks for it.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                stack.callback(signal.signal, number, signal.signal(number, _interrupt))
            if not table:
                for plan in plans:
                    out.print(f"{plan.name:<{width}} : {common.command_line(*plan.words)}")
                return self._finish(supervisor)
            from rich.live import Live

            live = stack.enter_context(
                Live(
                    get_renderable=lambda: cell_table(f"{self.file}, Ctrl-C stops it", supervisor.processes),
                    console=out,
                    refresh_per_second=4,
                )
            )
            stack.callback(live.refresh)
            return self._finish(supervisor)

    def _finish(self, supervisor: Supervisor) -> int:
        try:
            supervisor.run()
            return 0
        finally:
            processes = {
                p.plan.name: {"status": p.status, "restarts": p.restarts, "uptime_s": round(p.uptime_s, 1)}
                for p in supervisor.processes
            }
            self.finish({"processes": processes})

    def _open_files(self, names: list[str], stack: contextlib.ExitStack) -> dict[str, IO[str]]:
        if self.output is None:
            return {}
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            return {n: stack.enter_context((self.output / f"{n.replace('/', '_')}.log").open("a")) for n in names}
        except OSError as error:
            raise UsageError(f"cannot write to the folder {self.output}: {one_line(error)}; see --output") from None


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
