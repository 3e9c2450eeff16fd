"""What ``sacflow-robot bench serve`` measures, in which order, and how it is shown."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sacflow_robot.cli import common

if TYPE_CHECKING:
    from sacflow_robot.cli.bench import BenchServe


def measure(wanted: BenchServe) -> dict[str, Any]:
    """All of it, as the JSON object that the command prints; tables go to the console as they come."""
    from sacflow_robot.bench import serve, serve_fuzz, serve_load
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
        twin = next(iter(paths[1:]), None)
        result["rows"] = [row for path in paths for row in serve.round_trips(path, engine, wanted.requests)]
        _show(result["rows"])
        try:
            rows = [row for path in paths for row in serve.against_websockets(path, engine, wanted.requests)]
            result["websocket_rows"] = rows
            _show(rows)
        except ModuleNotFoundError as error:
            result["notes"].append(f"no comparison with openpi: {error.name} is not installed")
        result["many_clients"] = serve_load.many_clients(wanted.policy, engine, seconds=wanted.seconds)
        _show([result["many_clients"]])
        result["throughput_rows"] = serve_load.throughput(wanted.policy, engine)
        _show(result["throughput_rows"])
        if wanted.endure:
            result["endure"] = serve_load.endure(wanted.policy, twin, engine, Path(folder), wanted.endure)
            _show([result["endure"]])
        if wanted.fuzz:
            result["fuzz_rows"] = serve_fuzz.fuzz(wanted.policy, engine, wanted.fuzz)
            _show(result["fuzz_rows"])
    for note in result["notes"]:
        out.print(note)
    result["load_after"] = [round(value, 2) for value in os.getloadavg()]
    return result


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
