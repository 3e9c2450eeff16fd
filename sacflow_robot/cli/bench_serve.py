"""What ``sacflow-robot bench serve`` measures, in which order, and how it is shown."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sacflow_robot.cli import common

if TYPE_CHECKING:
    from sacflow_robot.cli.bench import BenchServe
    from sacflow_robot.serve.policy import Engine

Tables = Iterator[tuple[str, list[dict[str, Any]]]]


def measure(wanted: BenchServe) -> dict[str, Any]:
    """What was asked for, as the JSON object that the command prints; tables go to the console as they come."""
    from sacflow_robot.bench import serve
    from sacflow_robot.serve.policy import Engine

    engine, out = Engine(threads=wanted.threads), common.console()
    result: dict[str, Any] = {**serve.describe(), "engine": str(engine), "notes": []}
    with tempfile.TemporaryDirectory() as folder:
        paths = [wanted.policy]
        for velocity in wanted.velocities:
            try:
                paths.append(serve.untrained_twin(wanted.policy, velocity, Path(folder) / f"{velocity}.onnx"))
            except ModuleNotFoundError as error:
                result["notes"].append(f"no rows of {velocity}: {error.name} is not installed")
        for part in dict.fromkeys(wanted.parts):
            try:
                for name, rows in _MEASURE[part](wanted, engine, paths, Path(folder)):
                    result[name] = rows
                    _show(rows)
            except ModuleNotFoundError as error:
                result["notes"].append(f"no {part}: {error.name} is not installed")
    for note in result["notes"]:
        out.print(note)
    result["load_after"] = [round(value, 2) for value in os.getloadavg()]
    return result


def _trips(wanted: BenchServe, engine: Engine, paths: list[Path], folder: Path) -> Tables:
    from sacflow_robot.bench import serve

    yield "rows", [row for path in paths for row in serve.round_trips(path, engine, wanted.requests)]


def _websockets(wanted: BenchServe, engine: Engine, paths: list[Path], folder: Path) -> Tables:
    from sacflow_robot.bench import serve

    yield "websocket_rows", [row for path in paths for row in serve.against_websockets(path, engine, wanted.requests)]


def _clients(wanted: BenchServe, engine: Engine, paths: list[Path], folder: Path) -> Tables:
    from sacflow_robot.bench import serve_load

    yield "many_clients", [serve_load.many_clients(wanted.policy, engine, seconds=wanted.seconds)]


def _throughput(wanted: BenchServe, engine: Engine, paths: list[Path], folder: Path) -> Tables:
    from sacflow_robot.bench import serve_load

    yield "throughput_rows", serve_load.throughput(wanted.policy, engine)


def _seams(wanted: BenchServe, engine: Engine, paths: list[Path], folder: Path) -> Tables:
    from sacflow_robot.bench import serve_seams

    if serve_seams.has_gripper_position(wanted.policy):
        yield "seams", serve_seams.seams(wanted.policy, engine, wanted.episodes)


def _endure(wanted: BenchServe, engine: Engine, paths: list[Path], folder: Path) -> Tables:
    from sacflow_robot.bench import serve_load

    rows = [serve_load.at_rest(wanted.policy, engine, wanted.endure)]
    if len(paths) > 1:
        count = max(wanted.endure // 10, min(wanted.endure, _LEAST_RELOADING))
        rows.append(serve_load.reloading(paths[0], paths[1], engine, folder, count))
    for row in rows:
        yield f"endure_{'rest' if row['while'] == 'at rest' else 'reload'}", [row]


def _fuzz(wanted: BenchServe, engine: Engine, paths: list[Path], folder: Path) -> Tables:
    from sacflow_robot.bench import serve_fuzz

    yield "fuzz_rows", serve_fuzz.fuzz(wanted.policy, engine, wanted.fuzz)


_LEAST_RELOADING = 20_000
_MEASURE: dict[str, Callable[[BenchServe, Engine, list[Path], Path], Tables]] = {
    "trips": _trips,
    "websockets": _websockets,
    "clients": _clients,
    "throughput": _throughput,
    "seams": _seams,
    "endure": _endure,
    "fuzz": _fuzz,
}


def _show(rows: Sequence[dict[str, Any]]) -> None:
    """A table of figures; lists of them in lines below it."""
    from rich.table import Table

    out, table = common.console(), Table(box=None, pad_edge=False)
    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    for name in names:
        words, is_text = name.replace("_us", " us").replace("_", " "), isinstance(rows[0][name], str)
        table.add_column(words, justify="left" if is_text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(str(row[name]) if isinstance(row[name], str) else f"{row[name]:,}" for name in names))
    out.width = max(out.width, 200) if not out.is_terminal else out.width
    out.print(table)
    for row in rows:
        for name in row.keys() - set(names):
            out.print(f"{name.replace('_', ' ')}: {', '.join(map(str, row[name]))}")
    out.print()
