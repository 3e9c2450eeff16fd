"""``sacflow-robot bench export``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sacflow_robot.cli import common
from sacflow_robot.errors import UsageError
from sacflow_robot.export.metadata import WeightsKind
from sacflow_robot.learn.config import VelocityName
from sacflow_robot.utils.atomic_files import check_output, write_text


@dataclass(frozen=True)
class BenchExport:
    """Size and microseconds of exported graphs: naive (the networks as published, called K times), folded, fewer bits.

    Attributes:
        velocities: Which velocities, each of the size that training makes it by default.
        euler_steps: K to measure besides the default.
        bursts: Turns that each graph takes, 50 evaluations a turn; the median counts.
        run_dir: Run folder; its policy's success is measured with each kind of weights and each K.
        episodes: Episodes of each of these.
        json: Print the result as one JSON object.
        out: JSON file to write the result to as well; what it holds of other velocities, and of success, stays.
    """

    velocities: tuple[VelocityName, ...] = get_args(VelocityName)
    euler_steps: tuple[int, ...] = (1, 2, 8)
    bursts: int = 40
    run_dir: Path | None = None
    episodes: int = 100
    json: bool = False
    out: Path | None = None

    def run(self) -> int:
        import datetime
        from dataclasses import asdict

        import torch

        from sacflow_robot.bench import export
        from sacflow_robot.bench.machine import machine, present_load
        from sacflow_robot.envs.tasks import get_task
        from sacflow_robot.learn.trained_run import ExportOptions

        check_output(self.out)
        if not self.velocities or self.bursts < 1 or self.episodes < 1:
            raise UsageError("--velocities must name at least one, --bursts and --episodes must be at least 1")
        for steps in self.euler_steps:
            ExportOptions(euler_steps=steps)
        torch.set_num_threads(1)
        result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "machine": machine()}
        result |= {"rows": [], "folded_of_naive": {}, "measured": {}}
        for velocity in self.velocities:
            common.console().print(f"exporting and evaluating {velocity} ...")
            moment = datetime.datetime.now().isoformat(timespec="minutes")
            result["measured"][velocity] = {"time": moment, "load": present_load()}
            rows = export.measure(get_task("lift").robot, velocity, self.euler_steps, self.bursts)
            result["rows"] += [asdict(row) for row in rows]
            time = {row.variant: row.p50_us for row in rows}
            result["folded_of_naive"][velocity] = round(time["folded"] / time["naive"], 3)
        _show(result["rows"], result["folded_of_naive"], self.json)
        if self.run_dir is not None:
            result["success_rows"] = self._success(self.run_dir)
            result["success_of"] = (
                f"the {result['success_rows'][0]['velocity']} policy that {self.run_dir.name} ends with"
            )
        if self.out is not None:
            _keep_others(result, self.out)
        text = json.dumps(result)
        if self.out is not None:
            write_text(self.out, text + "\n")
        if self.json:
            print(text, flush=True)
        return 0

    def _success(self, run_dir: Path) -> list[dict[str, Any]]:
        from rich.table import Table

        from sacflow_robot.cli.export import success_of
        from sacflow_robot.learn.trained_run import ExportOptions, TrainedRun

        trained, rows = TrainedRun(run_dir), []
        kinds = [ExportOptions(weights) for weights in get_args(WeightsKind)]
        table = Table(box=None, pad_edge=False)
        for name in ("weights", "K", "bytes", "action error", "success", "steps"):
            table.add_column(name, justify="left" if name in ("weights", "success") else "right", no_wrap=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "policy.onnx"
            for options in (*kinds, *(ExportOptions(euler_steps=steps) for steps in self.euler_steps)):
                row = trained.export(options, path)
                row |= success_of(trained.config, path, self.episodes)
                rows.append({name: value for name, value in row.items() if name not in ("policy", "version")})
                success = common.describe_success(row["successes"], self.episodes)
                figures = row["weights"], str(row["euler_steps"]), f"{row['bytes']:,}", f"{row['max_action_error']:.1e}"
                table.add_row(*figures, success, f"{row['mean_steps']:.0f}")
        common.results(self.json).print(table)
        return rows


def _keep_others(result: dict[str, Any], path: Path) -> None:
    """Add what was not measured now from the result file of an earlier run on the same machine."""
    try:
        earlier = json.loads(path.read_text())
        if earlier["machine"] != result["machine"]:
            return
        others = {name: about for name, about in earlier["measured"].items() if name not in result["measured"]}
        rows = [row for row in earlier["rows"] if row["velocity"] in others]
        ratios = {name: earlier["folded_of_naive"][name] for name in others}
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        common.console().print(f"{path} held no result of this measurement; it is written anew")
        return
    order = get_args(VelocityName)
    result["rows"] = sorted(result["rows"] + rows, key=lambda row: order.index(row["velocity"]))
    result["folded_of_naive"] |= ratios
    result["measured"] |= others
    for name in ("success_rows", "success_of"):
        if name in earlier:
            result.setdefault(name, earlier[name])


def _show(rows: Sequence[dict[str, Any]], ratios: dict[str, float], as_json: bool) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("velocity", "variant"):
        table.add_column(name, no_wrap=True)
    for name in ("K", "bytes", "nodes", "p50 us", "p99 us", "of naive", "action error"):
        table.add_column(name, justify="right", no_wrap=True)
    naive = {row["velocity"]: row["p50_us"] for row in rows if row["variant"] == "naive"}
    for row in rows:
        table.add_row(
            row["velocity"],
            row["variant"],
            str(row["euler_steps"]),
            f"{row['bytes']:,}",
            str(row["nodes"]),
            f"{row['p50_us']:,.1f}",
            f"{row['p99_us']:,.1f}",
            f"{row['p50_us'] / naive[row['velocity']]:.0%}",
            f"{row['max_abs_error']:.1e}",
        )
    out = common.results(as_json)
    out.print("one row, one thread of ONNX Runtime's CPU provider; action error against torch with the same K")
    out.print(table)
    out.print("folded in terms of naive: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
