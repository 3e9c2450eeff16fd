"""Whether the compiled engine goes where robosuite goes, over many episodes of every task; fails if it does not.

Prints one JSON object. Per task and kind of actions: the largest difference after one control step from the same state
(which has to be within 1e-9), how many whole episodes stay within 1e-9 without being put back, and for how many steps the
median one does; contacts amplify rounding.
"""

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tyro

from sacflow_robot.bench.machine import stamp
from sacflow_robot.envs.fast.compare import KINDS, TOLERANCE, Comparer, Comparison, Kind
from sacflow_robot.envs.tasks import TASKS
from sacflow_robot.utils.processes import core_count


@dataclass(frozen=True)
class Equality:
    """Hold the compiled engine against robosuite.

    Attributes:
        tasks: Which tasks.
        seeds: Episodes per task and kind of actions.
        steps: Control steps per episode.
        out: JSON file to write the result to as well.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    seeds: int = 50
    steps: int = 200
    out: Path | None = None


def main() -> int:
    config = tyro.cli(Equality)
    jobs = [(task, kind, seed, config.steps) for task in config.tasks for kind in KINDS for seed in range(config.seeds)]
    with ProcessPoolExecutor(core_count(), get_context("spawn")) as pool:
        done = list(pool.map(compare, *zip(*jobs, strict=True), chunksize=config.seeds))
    rows, fine = [], True
    for task in config.tasks:
        for kind in KINDS:
            these = [c for c, job in zip(done, jobs, strict=True) if job[:2] == (task, kind)]
            row = summary(these)
            fine &= bool(row["step_deviation_max"] < TOLERANCE and row["alike"])
            rows.append({"task": task, "actions": kind, **row})
            print(rows[-1], file=sys.stderr)
    text = json.dumps({**stamp(), "steps": config.steps, "rows": rows})
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(text + "\n")
    print(text)
    return 0 if fine else 1


def compare(task: str, kind: Kind, seed: int, steps: int) -> Comparison:
    return _comparer(task).episode(kind, seed, steps)


def summary(episodes: list[Comparison]) -> dict[str, object]:
    free = [c.free_deviation for c in episodes]
    return {
        "episodes": len(episodes),
        "alike": all(c.alike for c in episodes),
        "step_deviation_max": max(c.step_deviation for c in episodes),
        "free_within_1e9": sum(d < TOLERANCE for d in free),
        "free_deviation_median": float(np.median(free)),
        "free_deviation_max": max(free),
        "free_steps_median": float(np.median([c.free_steps for c in episodes])),
    }


_comparer = cache(Comparer)


if __name__ == "__main__":
    sys.exit(main())
