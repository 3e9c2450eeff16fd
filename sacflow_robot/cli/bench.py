"""``sacflow-robot bench``, except the measurements of policy files."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sacflow_robot.cli import common
from sacflow_robot.errors import UnknownNameError, UsageError
from sacflow_robot.utils.atomic_files import check_output, write_text

_EVAL_EPISODES, _EVAL_TURNS = 100, 5  # of bench sim


@dataclass(frozen=True, kw_only=True)
class Bench(common.JsonOptions):
    """A measurement, whose result begins with the date, the machine and its load.

    Attributes:
        out: JSON file to write the result to as well.
    """

    out: Path | None = None

    def run(self) -> int:
        from sacflow_robot.bench.machine import stamp

        check_output(self.out)
        self.check()
        result = stamp()
        self.measure(result)
        if self.out is not None:
            write_text(self.out, json.dumps(result) + "\n")
        return self.finish(result)

    def check(self) -> None:
        """Refuse options that make no sense, before anything is measured."""

    def measure(self, result: dict[str, Any]) -> None:
        """Add to the result what is measured, and print it."""
        raise NotImplementedError

    def keep_earlier(self, merge: Callable[[dict[str, Any]], None]) -> str:
        """Give the result that ``out`` holds of an earlier run to ``merge``; a remark where it holds none, or nothing."""
        if self.out is not None and self.out.exists():
            try:
                merge(json.loads(self.out.read_text()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                return f"{self.out} held no result of this measurement; it is written anew"
        return ""


@dataclass(frozen=True)
class BenchLog(Bench):
    """Measure the cost of logging a step in the control loop, and the time to open a large log.

    Attributes:
        seconds: Length of each measurement (s).
        least_steps: Steps of each measurement at least, at low rates.
        folder: Where to write the logs; a temporary folder if not given. The disk matters little.
    """

    seconds: float = 5.0
    least_steps: int = 300
    folder: Path | None = None

    def check(self) -> None:
        if not 0 < self.seconds <= 600 or self.least_steps < 10:
            raise UsageError("--seconds must be above 0 and at most 600, --least-steps at least 10")

    def measure(self, result: dict[str, Any]) -> None:
        from sacflow_robot.bench.log import bench_log

        result |= bench_log(self.seconds, self.least_steps, self.folder)
        self.say(common.table([{n.removeprefix("append_"): v for n, v in row.items()} for row in result["rows"]]))
        self.say(f"a log of 10 000 episodes opens in {result['open_10k_episodes_s']:.3f} s")


@dataclass(frozen=True)
class BenchReplay(Bench):
    """Chunk batches per second (256 windows of 5 steps): replay buffer, plain NumPy gather, robomimic's loader.

    Attributes:
        steps: Environment steps to draw from, one measurement each; the larger one is the default replay capacity.
        turns: Turns that each source takes, 50 batches a turn; the median counts.
        robomimic_seconds: How long each of robomimic's four ways is measured; 0 leaves them out.
        folder: Where the memory-mapped buffer keeps its files.
    """

    steps: tuple[int, ...] = (20_000, 300_000)
    turns: int = 200
    robomimic_seconds: float = 5.0
    folder: Path = Path()

    def check(self) -> None:
        if not self.steps or min(self.steps) < 1000 or self.turns < 1:
            raise UsageError("--steps must be at least 1000 each, and --turns at least 1")

    def measure(self, result: dict[str, Any]) -> None:
        from sacflow_robot.bench import replay_buffer
        from sacflow_robot.envs.tasks import get_task

        robot, rows = get_task("lift").robot, []
        for steps in self.steps:
            common.console().print(f"drawing from {steps:,} steps ...")
            rows += replay_buffer.measure_buffers(robot, steps, self.turns, self.folder)
        if self.robomimic_seconds > 0:
            common.console().print("letting robomimic draw from the fewest of them ...")
            try:
                rows += replay_buffer.measure_robomimic(robot, min(self.steps), self.robomimic_seconds)
            except ModuleNotFoundError as error:
                result["notes"] = [f"no rows of robomimic: {str(error.name).partition('.')[0]} is not installed"]
                common.console().print(result["notes"][0])
        shown = [
            {
                "source": row["source"],
                "steps": row["steps"],
                "batches/s": round(row["batches_per_s"]),
                "us a batch": round(1e6 / row["batches_per_s"], 1),
            }
            for row in rows
        ]
        self.say(common.table(shown))
        result["rows"] = rows


@dataclass(frozen=True)
class BenchLoop(Bench):
    """Measure the timing of the control loop, with a server, a recorder and a simulated robot on its own clock beside it.

    Attributes:
        policy: Policy to serve; of a simulated task.
        rates: Control rates (Hz).
        seconds: How long to run at each.
    """

    policy: Path = Path("policies/lift.onnx")
    rates: tuple[float, ...] = (20, 100, 500)
    seconds: float = 60.0

    def check(self) -> None:
        if not self.rates or not all(1 <= rate <= 1000 for rate in self.rates) or self.seconds <= 0:
            raise UsageError("--rates must name at least one from 1 to 1000 Hz, and --seconds be above 0")

    def measure(self, result: dict[str, Any]) -> None:
        from sacflow_robot.bench import loop

        rows = []
        for rate in self.rates:
            common.console().print(f"{rate:g} Hz for {self.seconds:g} s ...")
            rows.append(loop.measure(self.policy, rate, self.seconds))
        names = {"hz": "Hz", "period_p50_us": "period p50 us", "period_p99_us": "p99", "period_p999_us": "p99.9"}
        names |= {"period_max_us": "max", "missed": "missed", "steps": "of"}
        self.say(common.table([{new: row[old] for old, new in names.items()} for row in rows]))
        result |= {"seconds": self.seconds, "rows": rows}


@dataclass(frozen=True)
class BenchSim(Bench):
    """Control steps per second of the simulated tasks: stock robosuite, both engines, and the physics alone.

    Attributes:
        tasks: Which tasks.
        turns: Turns of 50 control steps that each engine takes per number of robots; the median counts.
        workers: Robots at once, one measurement each; by default one, and as many as there are cores.
        policy: Also time 100 episodes of this policy, as 'eval' runs them, under either engine.
    """

    tasks: tuple[str, ...] = ("lift", "stack", "can", "square", "door")
    turns: int = 15
    workers: tuple[int, ...] = ()
    policy: Path | None = None

    def check(self) -> None:
        from sacflow_robot.envs.tasks import get_task

        if not self.tasks or self.turns < 1 or min(self.workers, default=1) < 1:
            raise UsageError("--tasks must name at least one, --turns and --workers must be at least 1")
        for task in self.tasks:
            get_task(task)

    def measure(self, result: dict[str, Any]) -> None:
        from sacflow_robot.bench import sim
        from sacflow_robot.export.onnx_policy import OnnxPolicy
        from sacflow_robot.utils.processes import core_count

        policy = OnnxPolicy(self.policy) if self.policy else None
        workers, shown = self.workers or tuple(sorted({1, core_count()})), []
        result |= {"ratios": [], "rows": []}
        for task in self.tasks:
            common.console().print(f"stepping {task} ...")
            measured = sim.measure(task, workers, self.turns)
            result["rows"] += measured
            for count in workers:
                rate: dict[str, float] = {
                    row["engine"]: row["steps_per_s"] for row in measured if row["workers"] == count
                }
                of_stock, of_physics = rate["compiled"] / rate["stock"], rate["compiled"] / rate["physics"]
                figures: dict[str, object] = {engine: round(rate[engine]) for engine in sim.ENGINES}
                ratios = {"of_stock": round(of_stock, 2), "of_physics": round(of_physics, 3)}
                shown.append({"task": task, "envs": count, **figures, **ratios})
                result["ratios"].append({"task": task, "workers": count, **ratios})
        self.say("control steps per second; compiled in terms of stock and of the physics alone", common.table(shown))
        if policy is not None:
            common.console().print(f"evaluating {self.policy} ...")
            rows, same = sim.measure_evaluation(policy, _EVAL_EPISODES, _EVAL_TURNS)
            seconds = {row["engine"]: row["seconds"] for row in rows}
            faster = seconds["stock"] / seconds["compiled"]
            self.say(
                f"{_EVAL_EPISODES} episodes: stock {seconds['stock']:.2f} s, compiled {seconds['compiled']:.2f} s, "
                f"{faster:.1f} x; actions {'equal' if same else 'NOT equal'} to the last bit"
            )
            result["evaluation"] = {"rows": rows, "of_stock": round(faster, 2), "same_actions": same}


@dataclass(frozen=True)
class BenchTrain(Bench):
    """Updates per second at the published sizes: batch 256, D = 35, 19 observations, critics 2 x 512^4, K = 4.

    Attributes:
        cases: Algorithm and velocity, e.g. sac-flow:flow-g; all by default.
        device: auto, cpu, cuda or cuda:N.
        compile: auto, on or off.
        precision: auto, float32 or bfloat16.
        threads: Cores to compute on; all by default.
        repeats: Measurements of each case, of which the median counts.
        seconds: Length of each (s).
    """

    cases: tuple[str, ...] = ()
    device: str = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int | None = None
    repeats: int = 5
    seconds: float = 5.0

    def check(self) -> None:
        if (self.threads is not None and self.threads < 1) or self.repeats < 1 or not 0 < self.seconds <= 600:
            raise UsageError("--threads and --repeats must be at least 1, --seconds above 0 and at most 600")

    def measure(self, result: dict[str, Any]) -> None:
        from sacflow_robot.bench import train
        from sacflow_robot.utils.processes import core_count

        cases = {f"{algo}:{velocity}": (algo, velocity) for algo, velocity in train.CASES}
        for name in self.cases:
            if name not in cases:
                raise UnknownNameError("case", name, cases)
        chosen = {"device": self.device, "compile": self.compile, "precision": self.precision}
        result["rows"] = []
        for algo, velocity in (cases[name] for name in self.cases or cases):
            common.console().print(f"{algo}, {velocity} ...")
            config, threads = train.published(algo, velocity, **chosen), self.threads or core_count()
            result["rows"].append(train.measure(config, velocity, self.repeats, self.seconds, threads))
        shown = [
            {
                "algorithm": row["algo"],
                "velocity": row["velocity"],
                "precision": row["precision"],
                "compiled": "yes" if row["compiled"] else "no",
                "updates/s": round(row["updates_per_s"], 1),
                "of the limit of": f"{row['percent_of_limit']:.0f} % {row['limit']}",
                "peak MB": round(row["peak_mb"]),
                "first s": round(row["first_s"], 1),
            }
            for row in result["rows"]
        ]
        self.say(common.table(shown))
