"""``sacflow-robot bench export`` and ``bench serve``."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from sacflow_robot.cli import common
from sacflow_robot.cli.bench import Bench
from sacflow_robot.errors import UsageError
from sacflow_robot.export.metadata import WeightsKind
from sacflow_robot.learn.config import VelocityName

if TYPE_CHECKING:
    from sacflow_robot.export.onnx_policy import Engine

ServePart = Literal["trips", "websockets", "clients", "throughput", "seams", "endure", "fuzz"]
_LEAST_RELOADING = 20_000


@dataclass(frozen=True)
class BenchExport(Bench):
    """Size and microseconds of exported graphs: naive (the networks as published, called K times), folded, fewer bits.

    What --out holds of other velocities, and of success, from an earlier run on the same machine stays.

    Attributes:
        velocities: Which velocities, each of the size that training makes it by default.
        euler_steps: K to measure besides the default.
        bursts: Turns that each graph takes, 50 evaluations a turn; the median counts.
        run_dir: Run folder; its policy's success is measured with each kind of weights and each K.
        episodes: Episodes of each of these.
    """

    velocities: tuple[VelocityName, ...] = get_args(VelocityName)
    euler_steps: tuple[int, ...] = (1, 2, 8)
    bursts: int = 40
    run_dir: Path | None = None
    episodes: int = 100

    def check(self) -> None:
        from sacflow_robot.learn.trained_run import ExportOptions

        if not self.velocities or self.bursts < 1 or self.episodes < 1:
            raise UsageError("--velocities must name at least one, --bursts and --episodes must be at least 1")
        for steps in self.euler_steps:
            ExportOptions(euler_steps=steps)

    def measure(self, result: dict[str, Any]) -> None:
        import torch

        from sacflow_robot.bench import export
        from sacflow_robot.bench.machine import now, present_load
        from sacflow_robot.envs.tasks import get_task

        torch.set_num_threads(1)
        result |= {"rows": [], "folded_of_naive": {}, "measured": {}}
        for velocity in self.velocities:
            common.console().print(f"exporting and evaluating {velocity} ...")
            result["measured"][velocity] = {**now(), "load": present_load()}
            rows = export.measure(get_task("lift").robot, velocity, self.euler_steps, self.bursts)
            result["rows"] += rows
            time = {row["variant"]: row["p50_us"] for row in rows}
            result["folded_of_naive"][velocity] = round(time["folded"] / time["naive"], 3)
        self._show(result["rows"], result["folded_of_naive"])
        if self.run_dir is not None:
            rows = result["success_rows"] = self._success(self.run_dir)
            result["success_of"] = f"the {rows[0]['velocity']} policy that {self.run_dir.name} ends with"

        def merge(earlier: dict[str, Any]) -> None:
            if earlier["machine"] != result["machine"]:
                return
            others = {name: about for name, about in earlier["measured"].items() if name not in result["measured"]}
            rows = [row for row in earlier["rows"] if row["velocity"] in others]
            ratios = {name: earlier["folded_of_naive"][name] for name in others}
            order = get_args(VelocityName)
            result["rows"] = sorted(result["rows"] + rows, key=lambda row: order.index(row["velocity"]))
            result["folded_of_naive"] |= ratios
            result["measured"] |= others
            for name in ("success_rows", "success_of"):
                if name in earlier:
                    result.setdefault(name, earlier[name])

        if remark := self.keep_earlier(merge):
            common.console().print(remark)

    def _success(self, run_dir: Path) -> list[dict[str, Any]]:
        from sacflow_robot.cli.evaluate import success_of
        from sacflow_robot.learn.trained_run import ExportOptions, TrainedRun

        trained, rows, shown = TrainedRun(run_dir), [], []
        kinds = [ExportOptions(weights) for weights in get_args(WeightsKind)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "policy.onnx"
            for options in (*kinds, *(ExportOptions(euler_steps=steps) for steps in self.euler_steps)):
                row = trained.export(options, path)
                row |= success_of(common.evaluate_run(trained.config, path, self.episodes))
                rows.append({name: value for name, value in row.items() if name not in ("policy", "version")})
                shown.append(
                    {
                        "weights": row["weights"],
                        "K": row["euler_steps"],
                        "bytes": row["bytes"],
                        "action error": f"{row['max_action_error']:.1e}",
                        "success": common.describe_success(row),
                        "steps": round(row["mean_steps"]),
                    }
                )
        self.say(common.table(shown))
        return rows

    def _show(self, rows: list[dict[str, Any]], ratios: Mapping[str, float]) -> None:
        naive = {row["velocity"]: row["p50_us"] for row in rows if row["variant"] == "naive"}
        shown = [
            {
                "velocity": row["velocity"],
                "variant": row["variant"],
                "K": row["euler_steps"],
                **{name: row[name] for name in ("bytes", "nodes", "p50_us", "p99_us")},
                "of naive": f"{row['p50_us'] / naive[row['velocity']]:.0%}",
                "action error": f"{row['max_abs_error']:.1e}",
            }
            for row in rows
        ]
        self.say(
            "one row, one thread of ONNX Runtime's CPU provider; action error against torch with the same K",
            common.table(shown),
            "folded in terms of naive: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()),
        )


@dataclass(frozen=True)
class BenchServe(Bench):
    """Round trips of a served policy beside bare ONNX Runtime and a bare ZeroMQ echo, and the usual way of serving; many
    clients, seams between chunks, long runs and hostile ones.

    What --out holds of other parts from an earlier run stays, as far as they were measured on the same machine and engine;
    ``parts`` says of each when, beside what load and with which policy it was measured, and which tables hold it.

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

    def check(self) -> None:
        if self.requests < 100 or not 0.1 <= self.seconds <= 600 or not 1 <= self.threads <= 64:
            raise UsageError("--requests must be at least 100, --seconds 0.1 to 600, --threads 1 to 64")
        if min(self.endure, self.fuzz, self.episodes) < 1:
            raise UsageError(
                "--endure, --fuzz and --episodes must be at least 1; --parts leaves out what is not wanted"
            )

    def measure(self, result: dict[str, Any]) -> None:
        from sacflow_robot.bench import serve
        from sacflow_robot.bench.machine import now
        from sacflow_robot.export.onnx_policy import Engine, OnnxPolicy

        engine = Engine(threads=self.threads)
        version = OnnxPolicy(self.policy, engine).version
        notes: list[str] = []
        measured: dict[str, Any] = {}
        result |= {"engine": str(engine), "notes": notes, "parts": measured}
        turns = {"requests": self.requests, "order": "the ways measured take turns call by call, shuffled at each turn"}
        settings: dict[str, dict[str, Any]] = {
            "trips": turns,
            "websockets": turns,
            "clients": {"seconds": self.seconds},
        }
        with tempfile.TemporaryDirectory() as folder:
            paths = [self.policy]
            for velocity in self.velocities:
                try:
                    paths.append(serve.untrained_twin(self.policy, velocity, Path(folder) / f"{velocity}.onnx"))
                except ModuleNotFoundError as error:
                    notes.append(f"no rows of {velocity}: {error.name} is not installed")
            for part in dict.fromkeys(self.parts):
                about = {**now(), "policy_version": version, **settings.get(part, {})}
                try:
                    tables = self._measure(part, engine, paths, Path(folder))
                except ModuleNotFoundError as error:
                    notes.append(f"no {part}: {error.name} is not installed")
                    continue
                for rows in tables.values():
                    self._show(rows)
                result |= tables
                measured[part] = {**about, "load_after": now()["load"], "tables": list(tables)}

        def merge(earlier: dict[str, Any]) -> None:
            parts = {name: part for name, part in earlier["parts"].items() if name not in measured}
            tables = {name: earlier[name] for part in parts.values() for name in part["tables"]}
            if any(earlier[name] != result[name] for name in ("machine", "engine")):
                if parts:
                    notes.append(f"left out {', '.join(parts)} of {self.out}: measured on another machine or engine")
            elif parts:
                result.update(tables)
                measured.update(parts)
                notes.append(f"{', '.join(parts)}: from {self.out}, measured earlier; see parts")

        if remark := self.keep_earlier(merge):
            notes.append(remark)
        for note in notes:
            common.console().print(note)

    def _measure(
        self, part: ServePart, engine: Engine, paths: list[Path], folder: Path
    ) -> dict[str, list[dict[str, Any]]]:
        """Tables of a part, by name."""
        from sacflow_robot.bench import serve, serve_fuzz, serve_load, serve_seams

        match part:
            case "trips":
                return {"rows": [row for path in paths for row in serve.round_trips(path, engine, self.requests)]}
            case "websockets":
                both = [serve.against_websockets(path, engine, self.requests) for path in paths]
                names = "websocket_rows", "websocket_gaps"
                return {name: [row for each in both for row in each[i]] for i, name in enumerate(names)}
            case "clients":
                return {"many_clients": [serve_load.many_clients(self.policy, engine, self.seconds)]}
            case "throughput":
                return {"throughput_rows": serve_load.throughput(self.policy, engine)}
            case "seams":
                rows = serve_seams.seams(self.policy, engine, self.episodes)
                return {"seams": rows} if rows else {}
            case "endure":
                tables = {"endure_rest": [serve_load.at_rest(self.policy, engine, self.endure)]}
                if len(paths) > 1:
                    count = max(self.endure // 10, min(self.endure, _LEAST_RELOADING))
                    tables["endure_reload"] = [serve_load.reloading(paths[0], paths[1], engine, folder, count)]
                return tables
            case "fuzz":
                return {"fuzz_rows": serve_fuzz.fuzz(self.policy, engine, self.fuzz)}

    def _show(self, rows: list[dict[str, Any]]) -> None:
        """Print a table of figures, and lists of them in lines below it."""
        names = [name for name, value in rows[0].items() if not isinstance(value, list)]
        self.say(common.table([{name: row[name] for name in names} for row in rows]))
        for row in rows:
            self.say(*(f"{n.replace('_', ' ')}: {', '.join(map(str, row[n]))}" for n in row.keys() - set(names)))
        self.say("")
