"""``sacflow-robot study``."""

from __future__ import annotations

import datetime
import importlib
import platform
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sacflow_robot import __version__
from sacflow_robot.cli import common
from sacflow_robot.study.options import (
    ArchitectureOptions,
    GradientsOptions,
    LikelihoodOptions,
    StudyOptions,
    TrialOptions,
)


@dataclass(frozen=True)
class Gradients(GradientsOptions):
    __doc__ = GradientsOptions.__doc__

    def run(self) -> int:
        return carry_out("gradients", self)


@dataclass(frozen=True)
class Likelihood(LikelihoodOptions):
    __doc__ = LikelihoodOptions.__doc__

    def run(self) -> int:
        return carry_out("likelihood", self)


@dataclass(frozen=True)
class Architecture(ArchitectureOptions):
    __doc__ = ArchitectureOptions.__doc__

    def run(self) -> int:
        return carry_out("architecture", self)


@dataclass(frozen=True)
class Regularization(TrialOptions):
    """The three regularizers and three schedules on a task whose demonstrations show two ways."""

    def run(self) -> int:
        return carry_out("regularization", self)


def carry_out(name: str, options: StudyOptions) -> int:
    """Run a study, write its files, print its reading; returns the exit status."""
    importlib.import_module("torch")  # first, for its extra brings everything that a study needs
    from sacflow_robot.study.report import Report, make_folder
    from sacflow_robot.study.runs import in_parallel
    from sacflow_robot.utils.processes import core_count

    folder, began = make_folder(options.out), time.monotonic()
    with common.progress_bar("cases") as bar:
        row = bar.add_task(name, total=0, success="")

        def run_all(work: Callable[[Any], Any], cases: Sequence[Any]) -> list[Any]:
            bar.update(row, total=(bar.tasks[row].total or 0) + len(cases))
            return in_parallel(work, cases, options.workers or core_count(), lambda: bar.advance(row))

        report: Report = importlib.import_module(f"sacflow_robot.study.{name}").study(options, run_all)
    wall_s = time.monotonic() - began
    command = common.command_line("study", name, *_given(options))
    made_by = (
        f"Made by `{command}`, sacflow-robot {__version__}, {datetime.date.today().isoformat()}, "
        f"{platform.machine()} with {core_count()} cores, in {wall_s / 60:.1f} minutes."
    )
    paths = report.write(folder, made_by)
    out = common.results(options.json)
    out.print(report.reading)
    for path in paths.values():
        out.print(f"wrote {path}")
    if options.json:
        files = {kind: str(path) for kind, path in paths.items()}
        rows = [{k: None if isinstance(v, float) and v != v else v for k, v in r.items()} for r in report.rows]
        result = {"study": name, "wall_s": round(wall_s, 1), "reading": report.reading, "files": files}
        common.print_json({**result, "rows": rows})
    return 0


def _given(options: StudyOptions) -> list[str]:
    """The options that make the result what it is, as on a command line."""
    words = [f"--seed {options.seed}"]
    for option in fields(options):
        value, name = getattr(options, option.name), option.name.replace("_", "-")
        if option.name in ("out", "seed", "workers", "json") or value == option.default:
            continue
        values = value if isinstance(value, tuple) else [value]
        words.append(f"--{name}" if value is True else f"--{name} {shlex.join(map(str, values))}")
    return words
