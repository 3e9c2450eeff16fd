"""``sacflow-robot bench serve``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sacflow_robot.cli import common
from sacflow_robot.cli.common import ResultOptions
from sacflow_robot.errors import UsageError
from sacflow_robot.utils.atomic_files import check_output

if TYPE_CHECKING:
    from sacflow_robot.export.onnx_policy import Engine

ServePart = Literal["trips", "websockets", "clients", "throughput", "seams", "endure", "fuzz"]


@dataclass(frozen=True)
class BenchServe(ResultOptions):
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

    def run(self) -> int:
        check_output(self.out)
        if self.requests < 100 or not 0.1 <= self.seconds <= 600 or not 1 <= self.threads <= 64:
            raise UsageError("--requests must be at least 100, --seconds 0.1 to 600, --threads 1 to 64")
        if min(self.endure, self.fuzz, self.episodes) < 1:
            raise UsageError(
                "--endure, --fuzz and --episodes must be at least 1; --parts leaves out what is not wanted"
            )
        return self.finish(measure(self))


Tables = Iterator[tuple[str, list[dict[str, Any]]]]


def measure(wanted: BenchServe) -> dict[str, Any]:
    """Measure the parts, as the JSON object that the command prints; tables go to the console as they come.

    ``parts`` says of each part when, beside what load and with which policy it was measured, and which tables hold it. A
    result file that is there already keeps its other parts, as far as they were measured on the same machine and engine.
    """
    from sacflow_robot.bench import serve
    from sacflow_robot.export.onnx_policy import Engine, OnnxPolicy

    engine, out = Engine(threads=wanted.threads), common.console()
    version, settings = OnnxPolicy(wanted.policy, engine).version, _settings(wanted)
    result: dict[str, Any] = {**serve.describe(), "engine": str(engine), "notes": [], "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        paths = [wanted.policy]
        for velocity in wanted.velocities:
            try:
                paths.append(serve.untrained_twin(wanted.policy, velocity, Path(folder) / f"{velocity}.onnx"))
            except ModuleNotFoundError as error:
                result["notes"].append(f"no rows of {velocity}: {error.name} is not installed")
        for part in dict.fromkeys(wanted.parts):
            about = {**serve.now(), "policy_version": version, **settings.get(part, {})}
            try:
                tables = {}
                for name, rows in _MEASURE[part](wanted, engine, paths, Path(folder)):
                    tables[name] = rows
                    _show(rows, wanted.json)
            except ModuleNotFoundError as error:
                result["notes"].append(f"no {part}: {error.name} is not installed")
                continue
            result |= tables
            result["parts"][part] = {**about, "load_after": serve.now()["load"], "tables": list(tables)}
    if wanted.out is not None:
        _keep_other_parts(result, wanted.out)
    for note in result["notes"]:
        out.print(note)
    return result


def _settings(wanted: BenchServe) -> dict[str, dict[str, Any]]:
    """Settings that the rows of a part do not hold."""
    turns = {"requests": wanted.requests, "order": "the ways measured take turns call by call, shuffled at each turn"}
    return {"trips": turns, "websockets": turns, "clients": {"seconds": wanted.seconds}}


def _keep_other_parts(result: dict[str, Any], path: Path) -> None:
    """Add the parts that were not measured now from the result file of an earlier run."""
    try:
        earlier = json.loads(path.read_text())
        parts = {name: part for name, part in earlier["parts"].items() if name not in result["parts"]}
        tables = {name: earlier[name] for part in parts.values() for name in part["tables"]}
        alike = all(earlier[name] == result[name] for name in ("machine", "engine"))
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        result["notes"].append(f"{path} held no result of this measurement; it was written anew")
        return
    if parts and not alike:
        result["notes"].append(f"left out {', '.join(parts)} of {path}: measured on another machine or engine")
    elif parts:
        result |= tables
        result["parts"] |= parts
        result["notes"].append(f"{', '.join(parts)}: from {path}, measured earlier; see parts")


def _trips(wanted: BenchServe, engine: Engine, paths: list[Path], folder: Path) -> Tables:
    from sacflow_robot.bench import serve

    yield "rows", [row for path in paths for row in serve.round_trips(path, engine, wanted.requests)]


def _websockets(wanted: BenchServe, engine: Engine, paths: list[Path], folder: Path) -> Tables:
    from sacflow_robot.bench import serve

    measured = [serve.against_websockets(path, engine, wanted.requests) for path in paths]
    yield "websocket_rows", [row for rows, _ in measured for row in rows]
    yield "websocket_gaps", [gap for _, gaps in measured for gap in gaps]


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


def _show(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Print a table of figures, and lists of them in lines below it."""
    out = common.results(as_json)
    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    out.print(common.table([{name: row[name] for name in names} for row in rows]))
    for row in rows:
        for name in row.keys() - set(names):
            out.print(f"{name.replace('_', ' ')}: {', '.join(map(str, row[name]))}")
    out.print()
