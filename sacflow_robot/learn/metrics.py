"""Metrics of a run: evaluations, ``metrics.csv`` and TensorBoard."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from sacflow_robot.episode import Episode
from sacflow_robot.learn.run_folder import RunFolder
from sacflow_robot.learn.training_guards import diverged
from sacflow_robot.utils.atomic_files import write_text
from sacflow_robot.utils.intervals import wilson_interval

COLUMNS = (
    "phase",
    "updates",
    "env_steps",
    "wall_s",
    "success_rate",
    "success_low",
    "success_high",
    "mean_steps",
    "mean_return",
    "train_success_rate",
    "replay_steps",
    "loss/flow_matching",
    "loss/critic",
    "loss/actor",
    "value/data",
    "value/policy",
    "policy/distance_to_data",
    "policy/excess_entropy",
    "policy/temperature",
    "policy/regularization",
)


@dataclass(frozen=True)
class Evaluation:
    """Success of a policy on held-out seeds.

    Attributes:
        phase: ``offline`` or ``online``.
        env_steps: Environment steps learned from online so far.
        successes: Episodes solved.
        episodes: Episodes run.
        mean_steps: Mean episode length.
        mean_return: Mean sum of rewards.
    """

    phase: str
    env_steps: int
    successes: int
    episodes: int
    mean_steps: float
    mean_return: float

    @property
    def success_rate(self) -> float:
        return self.successes / self.episodes if self.episodes else float("nan")

    @staticmethod
    def of(episodes: Sequence[Episode], phase: str, env_steps: int) -> Evaluation:
        """The evaluation that these episodes are."""
        return Evaluation(
            phase=phase,
            env_steps=env_steps,
            successes=sum(e.success for e in episodes),
            episodes=len(episodes),
            mean_steps=float(np.mean([len(e) for e in episodes])),
            mean_return=float(np.mean([e.rewards.sum() for e in episodes])),
        )

    @property
    def figures(self) -> dict[str, float]:
        """Columns of ``metrics.csv``."""
        low, high = wilson_interval(self.successes, self.episodes)
        rates = {"success_rate": self.success_rate, "success_low": low, "success_high": high}
        return {**rates, "mean_steps": self.mean_steps, "mean_return": self.mean_return}

    def describe(self, *, from_scratch: bool) -> str:
        """The evaluation in one line; from scratch returns count, not successes."""
        low, high = wilson_interval(self.successes, self.episodes)
        start = "before learning" if from_scratch else "after cloning"
        when = start if self.phase == "offline" else f"after {self.env_steps:,} online steps"
        success = f"success {self.successes}/{self.episodes} (95 % interval {low:.0%} to {high:.0%})"
        figure = f"return {self.mean_return:.4g}" if from_scratch else success
        return f"{when}: {figure}, {self.mean_steps:.0f} steps on average"


class MetricsWriter:
    """Writes rows to ``metrics.csv`` and TensorBoard.

    Args:
        folder: The run folder.
        keep_rows: Rows of an existing file to keep when a run goes on; later ones belong to work that was lost.
    """

    def __init__(self, folder: RunFolder, keep_rows: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        kept = read_metrics(folder.metrics)[:keep_rows] if keep_rows else []
        self.rows = len(kept)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
        write_text(folder.metrics, text.getvalue())
        self._file = folder.metrics.open("a", newline="")
        self._csv = csv.DictWriter(self._file, COLUMNS)
        last = kept[-1].get("updates", "") if kept else ""
        self._tensorboard = SummaryWriter(str(folder.path), purge_step=int(last) + 1 if last.isdigit() else None)

    def write(self, phase: str, updates: int, values: Mapping[str, Tensor | float]) -> None:
        """Add one row; ``updates`` is the step axis of TensorBoard.

        Raises:
            SacflowError: A value is not finite.
        """
        for name, value in values.items():
            if not math.isfinite(float(value)):
                raise diverged(name, updates, self._folder)
        row = {name: f"{float(value):.6g}" for name, value in values.items()}
        for counter in ("env_steps", "replay_steps"):
            if counter in values:
                row[counter] = str(int(values[counter]))
        self._csv.writerow({"phase": phase, "updates": updates, **row})
        self._file.flush()
        self.rows += 1
        for name, value in values.items():
            self._tensorboard.add_scalar(name if "/" in name else f"run/{name}", float(value), updates)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows of a ``metrics.csv``."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name.replace("regularisation", "regularization"): value for name, value in row.items()} for row in rows]
