"""``sacflow-robot bench``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sacflow_robot.cli import common
from sacflow_robot.errors import UnknownNameError, UsageError
from sacflow_robot.utils.atomic_files import check_output, write_text

_EVAL_EPISODES, _EVAL_TURNS = 100, 5  # of bench sim


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

        check_output(self.out)
        if not 0 < self.seconds <= 600 or self.least_steps < 10:
            raise UsageError("--seconds must be above 0 and at most 600, --least-steps at least 10")
        result = bench_log(self.seconds, self.least_steps, self.folder)
        table = Table(box=None, pad_edge=False)
        for name in result.rows[0]:
            heading = name.removeprefix("append_").replace("_", " ")
            table.add_column(heading, justify="left" if name == "payload" else "right", no_wrap=True)
        for row in result.rows:
            table.add_row(*map(str, row.values()))
        out = common.results(self.json)
        out.print(table)
        out.print(f"a log of 10 000 episodes opens in {result.open_10k_episodes_s:.3f} s")
        text = json.dumps(result.to_dict())
        if self.out is not None:
            write_text(self.out, text + "\n")
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

        from sacflow_robot.bench import replay_buffer as replay
        from sacflow_robot.bench.machine import machine
        from sacflow_robot.envs.tasks import get_task

        check_output(self.out)
        if not self.steps or min(self.steps) < 1000 or self.turns < 1:
            raise UsageError("--steps must be at least 1000 each, and --turns at least 1")
        robot, notes = get_task("lift").robot, []
        rows = []
        for steps in self.steps:
            common.console().print(f"drawing from {steps:,} steps ...")
            rows += replay.measure_buffers(robot, steps, self.turns, self.folder)
        if self.robomimic_seconds > 0:
            common.console().print("letting robomimic draw from the fewest of them ...")
            try:
                rows += replay.measure_robomimic(robot, min(self.steps), self.robomimic_seconds)
            except ModuleNotFoundError as error:
                name = str(error.name).partition(".")[0]
                notes.append(f"no rows of robomimic: {name} is not installed")
        table = Table("source", "steps", "batches/s", "us a batch", box=None, pad_edge=False)
        for row in rows:
            rate = row.batches_per_s
            table.add_row(row.source, f"{row.steps:,}", f"{rate:,.0f}", f"{1e6 / rate:,.1f}")
        common.results(self.json).print(table)
        for note in notes:
            common.console().print(note)
        result = {"date": datetime.date.today().isoformat(), "machine": machine(), "rows": [asdict(r) for r in rows]}
        result |= {"notes": notes} if notes else {}
        if self.out is not None:
            write_text(self.out, json.dumps(result) + "\n")
        if self.json:
            common.print_json(result)
        return 0


@dataclass(frozen=True)
class BenchSim:
    """Control steps per second of the simulated tasks: stock robosuite, both engines, and the physics alone.

    Attributes:
        tasks: Which tasks.
        turns: Turns of 50 control steps that each engine takes per number of robots; the median counts.
        workers: Robots at once, one measurement each; by default one, and as many as there are cores.
        policy: Also time 100 episodes of this policy, as 'eval' runs them, under either engine.
        json: Print the result as one JSON object.
        out: JSON file to write the result to as well.
    """

    tasks: tuple[str, ...] = ("lift", "stack", "can", "square", "door")
    turns: int = 15
    workers: tuple[int, ...] = ()
    policy: Path | None = None
    json: bool = False
    out: Path | None = None

    def run(self) -> int:
        import datetime
        from dataclasses import asdict

        from rich.table import Table

        from sacflow_robot.bench import sim
        from sacflow_robot.bench.machine import machine, present_load
        from sacflow_robot.envs.tasks import get_task
        from sacflow_robot.envs.vector_env import core_count
        from sacflow_robot.export.onnx_policy import OnnxPolicy

        check_output(self.out)
        workers = self.workers or tuple(sorted({1, core_count()}))
        if not self.tasks or self.turns < 1 or min(workers) < 1:
            raise UsageError("--tasks must name at least one, --turns and --workers must be at least 1")
        for task in self.tasks:
            get_task(task)
        policy = OnnxPolicy(self.policy) if self.policy else None
        load, rows = present_load(), []
        for task in self.tasks:
            common.console().print(f"stepping {task} ...")
            rows += sim.measure(task, workers, self.turns)
        columns = [*sim.ENGINES, "of stock", "of physics"]
        table = Table("task", "envs", box=None, pad_edge=False)
        for name in columns:
            table.add_column(name, justify="right")
        ratios = []
        for task in self.tasks:
            for count in workers:
                rate = {row.engine: row.steps_per_s for row in rows if (row.task, row.workers) == (task, count)}
                of_stock, of_physics = rate["compiled"] / rate["stock"], rate["compiled"] / rate["physics"]
                table.add_row(
                    task,
                    str(count),
                    *(f"{rate[e]:,.0f}" for e in sim.ENGINES),
                    f"{of_stock:.1f} x",
                    f"{of_physics:.0%}",
                )
                ratios.append(
                    {"task": task, "workers": count, "of_stock": round(of_stock, 2), "of_physics": round(of_physics, 3)}
                )
        common.results(self.json).print("control steps per second; compiled in terms of stock and of the physics alone")
        common.results(self.json).print(table)
        result: dict[str, object] = {
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "load_before": load,
            "rows": [asdict(row) for row in rows],
            "ratios": ratios,
        }
        if policy is not None:
            common.console().print(f"evaluating {self.policy} ...")
            evaluations, same = sim.measure_evaluation(policy, _EVAL_EPISODES, _EVAL_TURNS)
            seconds = {row.engine: row.seconds for row in evaluations}
            faster = seconds["stock"] / seconds["compiled"]
            common.results(self.json).print(
                f"{_EVAL_EPISODES} episodes: stock {seconds['stock']:.2f} s, compiled {seconds['compiled']:.2f} s, "
                f"{faster:.1f} x; actions {'equal' if same else 'NOT equal'} to the last bit"
            )
            result["evaluation"] = {
                "rows": [asdict(row) for row in evaluations],
                "of_stock": round(faster, 2),
                "same_actions": same,
            }
        if self.out is not None:
            write_text(self.out, json.dumps(result) + "\n")
        if self.json:
            common.print_json(result)
        return 0


@dataclass(frozen=True)
class BenchTrain:
    """Updates per second at the published sizes: batch 256, D = 35, 19 observations, critics 2 x 512^4, K = 4.

    Attributes:
        cases: Algorithm and velocity, e.g. sac-flow:flow-g; all by default.
        device: auto, cpu, cuda or cuda:N.
        compile: auto, on or off.
        precision: auto, float32 or bfloat16.
        threads: Cores to compute on; all by default.
        repeats: Measurements of each case, of which the median counts.
        seconds: Length of each (s).
        json: Print the result as one JSON object.
        out: JSON file to write the result to as well.
    """

    cases: tuple[str, ...] = ()
    device: str = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int | None = None
    repeats: int = 5
    seconds: float = 5.0
    json: bool = False
    out: Path | None = None

    def run(self) -> int:
        import datetime
        from dataclasses import asdict

        from rich.table import Table

        from sacflow_robot.bench import train
        from sacflow_robot.bench.machine import machine
        from sacflow_robot.envs.vector_env import core_count

        check_output(self.out)
        cases = {f"{algo}:{velocity}": (algo, velocity) for algo, velocity in train.CASES}
        for name in self.cases:
            if name not in cases:
                raise UnknownNameError("case", name, cases)
        threads = core_count() if self.threads is None else self.threads
        if threads < 1 or self.repeats < 1 or not 0 < self.seconds <= 600:
            raise UsageError("--threads and --repeats must be at least 1, --seconds above 0 and at most 600")
        rows = []
        for algo, velocity in (cases[name] for name in self.cases or cases):
            common.console().print(f"{algo}, {velocity} ...")
            config = train.published(algo, velocity, device=self.device, compile=self.compile, precision=self.precision)
            rows.append(train.measure(config, velocity, self.repeats, self.seconds, threads))
        columns = "algorithm", "velocity", "precision", "compiled", "updates/s", "of the limit of", "peak MB", "first s"
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)  # 79 columns, which every terminal has
        for column in columns:
            table.add_column(column, justify="right" if column in columns[4:] else "left")
        for row in rows:
            yes = "yes" if row.compiled else "no"
            rate = f"{row.updates_per_s:.1f}"
            share = f"{row.percent_of_limit:.0f} % {row.limit}"
            peak, first = f"{row.peak_mb:.0f}", f"{row.first_s:.1f}"
            table.add_row(row.algo, row.velocity, row.precision, yes, rate, share, peak, first)
        common.results(self.json).print(table)
        result = {"date": datetime.date.today().isoformat(), "machine": machine(), "rows": [asdict(r) for r in rows]}
        if self.out is not None:
            write_text(self.out, json.dumps(result) + "\n")
        if self.json:
            common.print_json(result)
        return 0


ServePart = Literal["trips", "websockets", "clients", "throughput", "seams", "endure", "fuzz"]


@dataclass(frozen=True)
class BenchServe:
    """Round trips of a served policy beside bare ONNX Runtime and a bare ZeroMQ echo, and the usual way of serving; many
    clients, seams between chunks, long runs and hostile ones.

    Attributes:
        policy: Policy file.
        parts: What to measure: round trips, beside websockets, many clients, throughput, seams between chunks, a long run
            at rest and one with a new policy file every second, hostile messages.
        velocities: Measure these velocity networks too, untrained, where torch is installed.
        requests: Requests per measurement of round trips, after as many tenths to warm up.
        seconds: Length of the measurement with many clients (s).
        threads: Threads for one inference, everywhere.
        endure: Requests of the long run at rest; a tenth as many, and at least ten seconds' worth, while files are replaced.
        fuzz: Broken messages to send to each port, beside a good client.
        episodes: Episodes of simulated robot for each row about seams.
        out: JSON file to write the result to as well; what it holds of parts not measured now stays, and is said to.
        json: Print the result as one JSON object.
    """

    policy: Path = Path("policies/lift.onnx")
    parts: tuple[ServePart, ...] = ("trips", "websockets", "clients", "throughput", "seams", "endure", "fuzz")
    velocities: tuple[str, ...] = ("flow-t",)
    requests: int = 5000
    seconds: float = 10.0
    threads: int = 1
    endure: int = 10_000
    fuzz: int = 2_000
    episodes: int = 10
    out: Path | None = None
    json: bool = False

    def run(self) -> int:
        from sacflow_robot.cli.bench_serve import measure

        check_output(self.out)
        if self.requests < 100 or not 0.1 <= self.seconds <= 600 or not 1 <= self.threads <= 64:
            raise UsageError("--requests must be at least 100, --seconds 0.1 to 600, --threads 1 to 64")
        if min(self.endure, self.fuzz, self.episodes) < 1:
            raise UsageError(
                "--endure, --fuzz and --episodes must be at least 1; --parts leaves out what is not wanted"
            )
        result = measure(self)
        if self.out is not None:
            write_text(self.out, json.dumps(result) + "\n")
        if self.json:
            common.print_json(result)
        return 0
