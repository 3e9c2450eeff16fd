"""``sacflow-robot study``."""

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
class _Study(StudyOptions, common.JsonOptions):
    def run(self) -> int:
        """Run the study, write its files, print its reading."""
        importlib.import_module("torch")  # first, for its extra brings everything that a study needs
        from sacflow_robot.study.report import Report, make_folder
        from sacflow_robot.study.runs import in_parallel
        from sacflow_robot.utils.processes import core_count

        name = type(self).__name__.lower()
        folder, began = make_folder(self.out), time.monotonic()
        with common.progress_bar("cases") as bar:
            row = bar.add_task(name, total=0, success="")

            def run_all(work: Callable[[Any], Any], cases: Sequence[Any]) -> list[Any]:
                bar.update(row, total=(bar.tasks[row].total or 0) + len(cases))
                return in_parallel(work, cases, self.workers or core_count(), lambda: bar.advance(row))

            report: Report = importlib.import_module(f"sacflow_robot.study.{name}").study(self, run_all)
        wall_s = time.monotonic() - began
        made_by = (
            f"Made by `{common.command_line('study', name, *_given(self))}`, sacflow-robot {__version__}, "
            f"{datetime.date.today().isoformat()}, {platform.machine()} with {core_count()} cores, in {wall_s / 60:.1f} minutes."
        )
        paths = report.write(folder, made_by)
        self.say(report.reading, *(f"wrote {path}" for path in paths.values()))
        files = {kind: str(path) for kind, path in paths.items()}
        rows = [{k: None if isinstance(v, float) and v != v else v for k, v in r.items()} for r in report.rows]
        result = {"study": name, "wall_s": round(wall_s, 1), "reading": report.reading, "files": files}
        return self.finish({**result, "rows": rows})


@dataclass(frozen=True)
class Gradients(GradientsOptions, _Study):
    __doc__ = GradientsOptions.__doc__


@dataclass(frozen=True)
class Likelihood(LikelihoodOptions, _Study):
    __doc__ = LikelihoodOptions.__doc__


@dataclass(frozen=True)
class Architecture(ArchitectureOptions, _Study):
    __doc__ = ArchitectureOptions.__doc__


@dataclass(frozen=True)
class Regularization(TrialOptions, _Study):
    """The three regularizers and three schedules on a task whose demonstrations show two ways."""


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
