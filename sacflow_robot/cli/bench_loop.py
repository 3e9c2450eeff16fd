"""``sacflow-robot bench loop``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sacflow_robot.cli import common
from sacflow_robot.errors import UsageError
from sacflow_robot.utils.atomic_files import check_output, write_text


@dataclass(frozen=True)
class BenchLoop:
    """How well the control loop keeps time, with a server, a recorder and a simulated robot on its own clock beside it.

    Attributes:
        policy: Policy to serve; of a simulated task.
        rates: Control rates (Hz).
        seconds: How long to run at each.
        json: Print the result as one JSON object.
        out: JSON file to write the result to as well.
    """

    policy: Path = Path("policies/lift.onnx")
    rates: tuple[float, ...] = (20, 100, 500)
    seconds: float = 60.0
    json: bool = False
    out: Path | None = None

    def run(self) -> int:
        import datetime

        from rich.table import Table

        from sacflow_robot.bench.loop import measure
        from sacflow_robot.bench.machine import machine, present_load

        check_output(self.out)
        if not self.rates or not all(1 <= rate <= 1000 for rate in self.rates) or self.seconds <= 0:
            raise UsageError("--rates must name at least one from 1 to 1000 Hz, and --seconds be above 0")
        load, rows = present_load(), []
        for rate in self.rates:
            common.console().print(f"{rate:g} Hz for {self.seconds:g} s ...")
            rows.append(measure(self.policy, rate, self.seconds))
        table = Table("Hz", "period p50", "p99", "p99.9", "max (ms)", "missed", "of", box=None, pad_edge=False)
        for row in rows:
            times = (f"{row[f'period_{name}_us'] / 1e3:.3f}" for name in ("p50", "p99", "p999", "max"))
            table.add_row(f"{row['hz']:g}", *times, f"{row['missed']:,}", f"{row['steps']:,}")
        common.results(self.json).print(table)
        result = {
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "load_1min": load,
            "seconds": self.seconds,
            "rows": rows,
        }
        if self.out is not None:
            write_text(self.out, json.dumps(result) + "\n")
        if self.json:
            common.print_json(result)
        return 0
