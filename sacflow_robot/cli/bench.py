"""``sacflow-robot bench``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sacflow_robot.cli import common
from sacflow_robot.errors import UsageError


@dataclass(frozen=True)
class BenchLog:
    """What logging a step costs the control loop, and how long a large log takes to open.

    Attributes:
        seconds: Length of each measurement (s).
        least_steps: Steps of each measurement at least, at low rates.
        folder: Where to write the logs; a temporary folder if not given. The disk matters little.
        out: JSON file to write the result to as well.
        json: Print the result as one JSON object.
    """

    seconds: float = 5.0
    least_steps: int = 300
    folder: Path | None = None
    out: Path | None = None
    json: bool = False

    def run(self) -> int:
        from rich.table import Table

        from sacflow_robot.data.bench import bench_log

        if not 0 < self.seconds <= 600 or self.least_steps < 10:
            raise UsageError("--seconds must be above 0 and at most 600, --least-steps at least 10")
        result = bench_log(self.seconds, self.least_steps, self.folder)
        table = Table(box=None, pad_edge=False)
        for name in result.rows[0]:
            heading = name.removeprefix("append_").replace("_", " ")
            table.add_column(heading, justify="left" if name == "payload" else "right", no_wrap=True)
        for row in result.rows:
            table.add_row(*map(str, row.values()))
        out = common.console()
        out.print(table)
        out.print(f"a log of 10 000 episodes opens in {result.open_10k_episodes_s:.3f} s")
        text = json.dumps(result.to_dict())
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(text + "\n")
        if self.json:
            print(text, flush=True)
        return 0
