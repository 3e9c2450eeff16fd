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

        from sacflow_robot.bench.log import bench_log

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


@dataclass(frozen=True)
class BenchReplay:
    """Chunk batches per second (256 windows of 5 steps): replay buffer, plain NumPy gather, robomimic's loader.

    Attributes:
        steps: Environment steps to draw from, one measurement each; the larger one is the default replay capacity.
        turns: Turns that each source takes, 50 batches a turn; the median counts.
        robomimic_seconds: How long each of robomimic's four ways is measured; 0 leaves them out.
        folder: Where the memory-mapped buffer keeps its files.
        json: Print the result as one JSON object.
        out: JSON file to write the result to as well.
    """

    steps: tuple[int, ...] = (20_000, 300_000)
    turns: int = 200
    robomimic_seconds: float = 5.0
    folder: Path = Path()
    json: bool = False
    out: Path | None = None

    def run(self) -> int:
        import datetime
        from dataclasses import asdict

        from rich.table import Table

        from sacflow_robot.bench import replay
        from sacflow_robot.bench.machine import machine
        from sacflow_robot.envs.tasks import get_task

        if not self.steps or min(self.steps) < 1000 or self.turns < 1:
            raise UsageError("--steps must be at least 1000 each, and --turns at least 1")
        arm, notes = get_task("lift").arm, []
        rows = []
        for steps in self.steps:
            common.console().print(f"drawing from {steps:,} steps ...")
            rows += replay.measure_buffers(arm, steps, self.turns, self.folder)
        if self.robomimic_seconds > 0:
            common.console().print("letting robomimic draw from the fewest of them ...")
            try:
                rows += replay.measure_robomimic(arm, min(self.steps), self.robomimic_seconds)
            except ModuleNotFoundError as error:
                name = str(error.name).partition(".")[0]
                notes.append(f"no rows of robomimic: {name} is not installed")
        table = Table("source", "steps", "batches/s", "us a batch", box=None, pad_edge=False)
        for row in rows:
            rate = row.batches_per_s
            table.add_row(row.source, f"{row.steps:,}", f"{rate:,.0f}", f"{1e6 / rate:,.1f}")
        common.console().print(table)
        for note in notes:
            common.console().print(note)
        result = {"date": datetime.date.today().isoformat(), "machine": machine(), "rows": [asdict(r) for r in rows]}
        result |= {"notes": notes} if notes else {}
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(result) + "\n")
        if self.json:
            common.print_json(result)
        return 0


@dataclass(frozen=True)
class BenchServe:
    """Round trips of a served policy beside bare ONNX Runtime and a bare ZeroMQ echo; many clients; the usual way.

    Attributes:
        policy: Policy file.
        velocities: Measure these velocity networks too, untrained, where torch is installed.
        requests: Requests per measurement of round trips, after as many tenths to warm up.
        seconds: Length of the measurement with many clients (s).
        threads: Threads for one inference, everywhere.
        endure: Requests of the long run, with the policy replaced every second; 0 leaves it out.
        fuzz: Broken messages to send to the server beside a good client; 0 leaves it out.
        out: JSON file to write the result to as well.
        json: Print the result as one JSON object.
    """

    policy: Path = Path("policies/lift.onnx")
    velocities: tuple[str, ...] = ("flow-t",)
    requests: int = 5000
    seconds: float = 10.0
    threads: int = 1
    endure: int = 20_000
    fuzz: int = 10_000
    out: Path | None = None
    json: bool = False

    def run(self) -> int:
        from sacflow_robot.cli.bench_serve import measure

        if self.requests < 100 or not 0.1 <= self.seconds <= 600 or not 1 <= self.threads <= 64:
            raise UsageError("--requests must be at least 100, --seconds 0.1 to 600, --threads 1 to 64")
        result = measure(self)
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(result) + "\n")
        if self.json:
            common.print_json(result)
        return 0
