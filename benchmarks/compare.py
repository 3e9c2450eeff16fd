"""Trainings side by side over several seeds: the figures that compare algorithms, velocities and precisions.

Runs what is missing, goes on with what was interrupted, then draws all of it and prints one JSON object. Run it again
after a stop: what the file named by ``--out`` holds is not run again (delete the file to do so), and of run folders the
unfinished are gone on with. Wall time is the run's own clock, so compare it between runs made under the same load.
"""

import csv
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import tyro
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MultipleLocator, NullLocator, PercentFormatter

from sacflow_robot.bench.machine import stamp
from sacflow_robot.learn.run_folder import RunFolder
from sacflow_robot.utils.atomic_files import write_text
from sacflow_robot.utils.plot_style import COLORS, MARKERS, new_figure, save, tidy

_SCRATCH = {
    "flow-g": "--velocity flow-g",
    "flow-t": "--velocity flow-t",
    "mlp": "--velocity mlp",
    "sac": "--algo sac",
}
# As published: the entropy of the whole path, of which none is asked for, and a temperature to begin with of 0.2.
_PATH = "--flow.entropy path --flow.noise-scale 0.34 --learner.initial-temperature 0.2"
_ALGORITHMS = {f"{name}": f"--algo {name}" for name in ("sac-flow", "qc-fql", "qc", "rlpd", "bc")}
_PRECISIONS = {name: f"--precision {name}" for name in ("float32", "bfloat16")}

# What is compared: per environment, the options of each line.
COMPARISONS: dict[str, dict[str, dict[str, str]]] = {
    "scratch": {
        env: {name: f"--env {env} --from-scratch {options}" for name, options in _SCRATCH.items()}
        for env in ("HalfCheetah-v5", "Hopper-v5")
    },
    "path": {
        "HalfCheetah-v5": {
            name: f"--env HalfCheetah-v5 --from-scratch --online-steps 20000 --velocity {name} {_PATH}"
            for name in ("flow-g", "mlp")
        }
    },
    "lift": {"lift": {name: f"--env lift {options}" for name, options in _ALGORITHMS.items()}},
    "precision": {"lift": {name: f"--env lift {options}" for name, options in _PRECISIONS.items()}},
}

_FROM_SCRATCH = "scratch", "path"
# Of the comparisons on Lift: what is drawn against what.
_PANELS = [("env_steps", "value"), ("wall_s", "value"), ("env_steps", "mean_steps")]

Key = tuple[str, str, int]  # environment, line, seed


@dataclass(frozen=True)
class Compare:
    """Train what a comparison needs, and draw it.

    Attributes:
        name: Which comparison.
        runs: Folder of its run folders.
        seeds: Seeds 0 to N - 1 of each line.
        jobs: Trainings at once, one core each.
        options: What to add to every training's command line, e.g. ``--options=--full`` for the published sizes.
        figure: PNG to draw; by default in the folder of the runs.
        out: JSON file that the results are in, written anew whenever a run is finished.
    """

    name: Annotated[Literal["scratch", "path", "lift", "precision"], tyro.conf.Positional]
    runs: Path = Path("runs/compare")
    seeds: int = 3
    jobs: int = 2
    options: str = ""
    figure: Path | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Curve:
    """Evaluations of one run, each (N,): environment steps, seconds, success rate or mean return, steps of an episode."""

    env_steps: npt.NDArray[np.float64]
    wall_s: npt.NDArray[np.float64]
    value: npt.NDArray[np.float64]
    mean_steps: npt.NDArray[np.float64]


def main() -> int:
    config = tyro.cli(Compare)
    wanted = {
        (env, line, seed): config.runs / config.name / f"{env}-{line}-s{seed}"
        for env, lines in COMPARISONS[config.name].items()
        for line in lines
        for seed in range(config.seeds)
    }
    results = Results(config.out, config.options, "mean_return" if config.name in _FROM_SCRATCH else "success_rate")

    def make(key: Key) -> None:
        env, line, seed = key
        if key not in results.curves:
            train(wanted[key], f"{COMPARISONS[config.name][env][line]} --seed {seed} {config.options}")
            results.add(key, wanted[key])

    with ThreadPoolExecutor(config.jobs) as pool:
        # All lines of a seed first, so that an early stop leaves a fair comparison.
        jobs = [pool.submit(make, key) for key in sorted(wanted, key=lambda key: key[2])]
        try:
            for job in jobs:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)
    draw(config.name, {key: results.curves[key] for key in wanted}, config.figure or config.runs / f"{config.name}.png")
    print(results.text())
    return 0


class Results:
    """The evaluations of finished runs, kept in a file.

    Args:
        path: The file; None keeps nothing.
        options: What the trainings' command lines have besides.
        value: ``success_rate`` or ``mean_return``.

    Raises:
        SystemExit: The file is of other options.
    """

    def __init__(self, path: Path | None, options: str, value: str) -> None:
        self._path, self._options, self._value = path, options, value
        self.curves: dict[Key, Curve] = {}
        self._lock = threading.Lock()
        if path is None or not path.exists():
            return
        known = json.loads(path.read_text())
        if known["options"] != options:
            raise SystemExit(f"{path} is of --options={known['options']!r}, not {options!r}; give another --out")
        for row in known["rows"]:
            parts = (np.array(row[name], float) for name in ("env_steps", "wall_s", value, "mean_steps"))
            self.curves[row["env"], row["line"], row["seed"]] = Curve(*parts)

    def add(self, key: Key, folder: Path) -> None:
        """Take over a finished run."""
        with self._lock:
            self.curves[key] = read_curve(folder, self._value)
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_text(self._path, self.text() + "\n")

    def text(self) -> str:
        """All of it, as one JSON object."""
        rows = [
            {"env": env, "line": line, "seed": seed, self._value: curve.value.tolist(),
             "env_steps": curve.env_steps.tolist(), "wall_s": curve.wall_s.tolist(), "mean_steps": curve.mean_steps.tolist()}
            for (env, line, seed), curve in sorted(self.curves.items())
        ]  # fmt: skip
        return json.dumps({**stamp(), "options": self._options, "rows": rows})


def train(folder: Path, options: str) -> None:
    """One training, unless it is finished."""
    run = RunFolder(folder, "")
    if list(folder.glob("*.onnx")):  # written last
        return
    if folder.exists() and not run.checkpoint.exists():  # stopped before it had anything to go on from
        shutil.rmtree(folder)
    how = f"--resume {folder}" if run.checkpoint.exists() else f"{options} --out {folder}"
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{folder.name}: {how}", file=sys.stderr, flush=True)
    with log.open("a") as out:
        command = [sys.executable, "-m", "sacflow_robot", "train", *how.split(), "--json"]
        if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out).returncode:
            raise SystemExit(f"{folder.name} failed; see {log}")


def read_curve(folder: Path, value: str) -> Curve:
    """The evaluations that a run folder's metrics hold."""
    with RunFolder(folder, "").metrics.open() as file:
        rows = [row for row in csv.DictReader(file) if row[value]]
    columns = ("env_steps", "wall_s", value, "mean_steps")
    return Curve(*(np.array([float(row[name]) for row in rows]) for name in columns))


def draw(name: str, curves: dict[Key, Curve], path: Path) -> None:
    """Mean over the seeds, and the range of them as a band."""
    lines = COMPARISONS[name]
    seeds = {(env, line): sum(key[:2] == (env, line) for key in curves) for env in lines for line in lines[env]}
    alike = len(set(seeds.values())) == 1
    axes_of = [("env_steps", "value")] if name in _FROM_SCRATCH else _PANELS
    panels = [(env, x, y) for env in lines for x, y in axes_of]
    figure = new_figure(4.3 * len(panels), 4.1)
    for axes, (env, x, y) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        for i, line in enumerate(lines[env]):
            same = [curve for (e, other, _), curve in curves.items() if (e, other) == (env, line)]
            label = line if alike else f"{line} ({seeds[env, line]})"
            _draw_line(axes, same, x, y, label=label, color=COLORS[i], marker=MARKERS[i])
        tidy(axes, f"{env}, mean and range of {f'{len(same)} seeds' if alike else '(N) seeds'}")
        if x == "env_steps":
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x else "0"))
            axes.set(xlabel="environment steps" if name in _FROM_SCRATCH else "environment steps online")
        else:
            axes.xaxis.set_major_locator(MultipleLocator(300))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 60:g}"))
            axes.set(xlabel="minutes of training, cloning included")
        axes.set_xlim(left=0)
        if name in _FROM_SCRATCH:
            axes.set(ylabel="mean return of 5 held-out episodes")
        elif y == "value":
            axes.set(ylabel="success on 50 held-out seeds", ylim=(0, 1.02))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        else:
            axes.set(ylabel="steps of an episode, failed ones in full", yscale="log")
            axes.yaxis.set_major_locator(FixedLocator([30, 50, 100, 200, 300]))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    names = list(next(iter(lines.values())))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(names), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


def _draw_line(axes: Axes, curves: Sequence[Curve], x: str, y: str, **look: Any) -> None:
    points = min(len(curve.value) for curve in curves)
    at = np.mean([getattr(curve, x)[:points] for curve in curves], axis=0)
    values = np.array([getattr(curve, y)[:points] for curve in curves])
    if points == 1:  # bc goes no further: its level, as a line across
        axes.axhline(values.mean(), color=look["color"], lw=1.3, ls=(0, (4, 3)), zorder=2)
    axes.plot(at, values.mean(0), lw=1.8, ms=4, zorder=3, **look)
    axes.fill_between(at, values.min(0), values.max(0), color=look["color"], alpha=0.13, lw=0)


if __name__ == "__main__":
    sys.exit(main())
