"""``sacflow-robot bench``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from sacflow_robot.cli import common
from sacflow_robot.cli.common import ResultOptions
from sacflow_robot.errors import UnknownNameError, UsageError
from sacflow_robot.utils.atomic_files import check_output

_EVAL_EPISODES, _EVAL_TURNS = 100, 5  # of bench sim


@dataclass(frozen=True)
class BenchLog(ResultOptions):
    """Measure the cost of logging a step in the control loop, and the time to open a large log.

    Attributes:
        seconds: Length of each measurement (s).
        least_steps: Steps of each measurement at least, at low rates.
        folder: Where to write the logs; a temporary folder if not given. The disk matters little.
    """

    seconds: float = 5.0
    least_steps: int = 300
    folder: Path | None = None

    def run(self) -> int:
        from sacflow_robot.bench.log import bench_log
        from sacflow_robot.bench.machine import stamp

        check_output(self.out)
        if not 0 < self.seconds <= 600 or self.least_steps < 10:
            raise UsageError("--seconds must be above 0 and at most 600, --least-steps at least 10")
        result = stamp() | bench_log(self.seconds, self.least_steps, self.folder)
        out = common.results(self.json)
        out.print(common.table([{n.removeprefix("append_"): v for n, v in row.items()} for row in result["rows"]]))
        out.print(f"a log of 10 000 episodes opens in {result['open_10k_episodes_s']:.3f} s")
        return self.finish(result)


@dataclass(frozen=True)
class BenchReplay(ResultOptions):
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

    def run(self) -> int:
        from sacflow_robot.bench import replay_buffer
        from sacflow_robot.bench.machine import stamp
        from sacflow_robot.envs.tasks import get_task

        check_output(self.out)
        if not self.steps or min(self.steps) < 1000 or self.turns < 1:
            raise UsageError("--steps must be at least 1000 each, and --turns at least 1")
        result, robot, rows = stamp(), get_task("lift").robot, []
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
                "source": row.source,
                "steps": row.steps,
                "batches/s": round(row.batches_per_s),
                "us a batch": round(1e6 / row.batches_per_s, 1),
            }
            for row in rows
        ]
        common.results(self.json).print(common.table(shown))
        return self.finish(result | {"rows": [asdict(row) for row in rows]})


@dataclass(frozen=True)
class BenchLoop(ResultOptions):
    """Measure the timing of the control loop, with a server, a recorder and a simulated robot on its own clock beside it.

    Attributes:
        policy: Policy to serve; of a simulated task.
        rates: Control rates (Hz).
        seconds: How long to run at each.
    """

    policy: Path = Path("policies/lift.onnx")
    rates: tuple[float, ...] = (20, 100, 500)
    seconds: float = 60.0

    def run(self) -> int:
        from sacflow_robot.bench.loop import measure
        from sacflow_robot.bench.machine import stamp

        check_output(self.out)
        if not self.rates or not all(1 <= rate <= 1000 for rate in self.rates) or self.seconds <= 0:
            raise UsageError("--rates must name at least one from 1 to 1000 Hz, and --seconds be above 0")
        result, rows = stamp(), []
        for rate in self.rates:
            common.console().print(f"{rate:g} Hz for {self.seconds:g} s ...")
            rows.append(measure(self.policy, rate, self.seconds))
        names = {"hz": "Hz", "period_p50_us": "period p50 us", "period_p99_us": "p99", "period_p999_us": "p99.9"}
        names |= {"period_max_us": "max", "missed": "missed", "steps": "of"}
        common.results(self.json).print(common.table([{new: row[old] for old, new in names.items()} for row in rows]))
        return self.finish(result | {"seconds": self.seconds, "rows": rows})


@dataclass(frozen=True)
class BenchSim(ResultOptions):
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

    def run(self) -> int:
        from sacflow_robot.bench import sim
        from sacflow_robot.bench.machine import stamp
        from sacflow_robot.envs.tasks import get_task
        from sacflow_robot.export.onnx_policy import OnnxPolicy
        from sacflow_robot.utils.processes import core_count

        check_output(self.out)
        workers = self.workers or tuple(sorted({1, core_count()}))
        if not self.tasks or self.turns < 1 or min(workers) < 1:
            raise UsageError("--tasks must name at least one, --turns and --workers must be at least 1")
        for task in self.tasks:
            get_task(task)
        policy = OnnxPolicy(self.policy) if self.policy else None
        result, rows, shown = stamp(), [], []
        result["ratios"] = []
        for task in self.tasks:
            common.console().print(f"stepping {task} ...")
            measured = sim.measure(task, workers, self.turns)
            rows += measured
            for count in workers:
                rate = {row.engine: row.steps_per_s for row in measured if row.workers == count}
                of_stock, of_physics = rate["compiled"] / rate["stock"], rate["compiled"] / rate["physics"]
                figures: dict[str, object] = {engine: round(rate[engine]) for engine in sim.ENGINES}
                ratios = {"of_stock": round(of_stock, 2), "of_physics": round(of_physics, 3)}
                shown.append({"task": task, "envs": count, **figures, **ratios})
                result["ratios"].append({"task": task, "workers": count, **ratios})
        out = common.results(self.json)
        out.print("control steps per second; compiled in terms of stock and of the physics alone")
        out.print(common.table(shown))
        result["rows"] = [asdict(row) for row in rows]
        if policy is not None:
            common.console().print(f"evaluating {self.policy} ...")
            evaluations, same = sim.measure_evaluation(policy, _EVAL_EPISODES, _EVAL_TURNS)
            seconds = {row.engine: row.seconds for row in evaluations}
            faster = seconds["stock"] / seconds["compiled"]
            out.print(
                f"{_EVAL_EPISODES} episodes: stock {seconds['stock']:.2f} s, compiled {seconds['compiled']:.2f} s, "
                f"{faster:.1f} x; actions {'equal' if same else 'NOT equal'} to the last bit"
            )
            timed = [asdict(row) for row in evaluations]
            result["evaluation"] = {"rows": timed, "of_stock": round(faster, 2), "same_actions": same}
        return self.finish(result)


@dataclass(frozen=True)
class BenchTrain(ResultOptions):
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

    def run(self) -> int:
        from sacflow_robot.bench import train
        from sacflow_robot.bench.machine import stamp
        from sacflow_robot.utils.processes import core_count

        check_output(self.out)
        cases = {f"{algo}:{velocity}": (algo, velocity) for algo, velocity in train.CASES}
        for name in self.cases:
            if name not in cases:
                raise UnknownNameError("case", name, cases)
        threads = core_count() if self.threads is None else self.threads
        if threads < 1 or self.repeats < 1 or not 0 < self.seconds <= 600:
            raise UsageError("--threads and --repeats must be at least 1, --seconds above 0 and at most 600")
        result, rows = stamp(), []
        for algo, velocity in (cases[name] for name in self.cases or cases):
            common.console().print(f"{algo}, {velocity} ...")
            config = train.published(algo, velocity, device=self.device, compile=self.compile, precision=self.precision)
            rows.append(train.measure(config, velocity, self.repeats, self.seconds, threads))
        shown = [
            {
                "algorithm": row.algo,
                "velocity": row.velocity,
                "precision": row.precision,
                "compiled": "yes" if row.compiled else "no",
                "updates/s": round(row.updates_per_s, 1),
                "of the limit of": f"{row.percent_of_limit:.0f} % {row.limit}",
                "peak MB": round(row.peak_mb),
                "first s": round(row.first_s, 1),
            }
            for row in rows
        ]
        common.results(self.json).print(common.table(shown))
        return self.finish(result | {"rows": [asdict(row) for row in rows]})
