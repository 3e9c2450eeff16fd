"""What each regulariser and each schedule of its weight keeps of data that shows two ways of doing a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from sacflow_robot.learn.config import FlowConfig, LearnerConfig, TrainConfig
from sacflow_robot.plotting import BLUE, COLOURS, GREEN, GREY, MARKERS, VERMILION, new_figure, tidy
from sacflow_robot.rollout import rollout
from sacflow_robot.study import two_ways
from sacflow_robot.study.report import Report, listed
from sacflow_robot.study.runs import LocalArms, in_parallel, train

REGULARISERS = {"action": 0.15, "flow-matching": 1.0, "same-noise": 0.15}
"""Regulariser and the weight that it starts with."""

SCHEDULES = ("constant", "linear", "adaptive")
_DEMO_SEED, _EVAL_SEED = 1_000_000, 10_000
_ARMS = 8
Path = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Setup:
    """What is measured.

    Attributes:
        seeds: Seeds of each case.
        demos: Demonstrations, the same for all cases.
        offline_steps: Updates of cloning.
        online_steps: Environment steps online.
        episodes: Episodes that each policy is judged by at the end, from starts held out.
        full: Take the published network sizes and batch.
        device: Where to compute.
    """

    seeds: Sequence[int]
    demos: int = 200
    offline_steps: int = 2000
    online_steps: int = 8000
    episodes: int = 100
    full: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class _Cell:
    setup: Setup
    regulariser: str  # or "cloning": the offline phase alone
    schedule: str
    seed: int


@dataclass(frozen=True)
class _Outcome:
    row: dict[str, Any]
    paths: list[Path]
    solved: list[bool]


def case_count(setup: Setup) -> int:
    """How often ``advance`` will be called."""
    return (len(REGULARISERS) * len(SCHEDULES) + 1) * len(setup.seeds)


def study_regularisation(setup: Setup, workers: int, advance: Callable[[], None]) -> Report:
    """Train every pair of regulariser and schedule offline to online, and cloning alone."""
    pairs = [("cloning", "-"), *((r, s) for r in REGULARISERS for s in SCHEDULES)]
    cells = [_Cell(setup, *pair, seed) for pair in pairs for seed in setup.seeds]
    outcomes = in_parallel(_measure, cells, workers, advance)
    rows = [outcome.row for outcome in outcomes]
    return Report("regularisation", rows, _draw(outcomes, setup), _read(rows, setup))


def _config(cell: _Cell) -> TrainConfig:
    setup, cloning = cell.setup, cell.regulariser == "cloning"
    full = setup.full
    learner = LearnerConfig(
        batch_size=256 if full else 128,
        discount=0.97,
        critic_width=512 if full else 128,
        critic_depth=4 if full else 2,
        updates_per_step=1.0 if full else 0.5,
        policy_delay=1,
        warmup_steps=min(1500, setup.online_steps // 4),
        clone="all",
        regulariser="action" if cloning else cell.regulariser,  # type: ignore[arg-type]
        regularisation=0.0 if cloning else REGULARISERS[cell.regulariser],
        regularisation_schedule="constant" if cloning else cell.schedule,  # type: ignore[arg-type]
    )
    return TrainConfig(
        env="two-ways",
        demos="none",
        seed=cell.seed,
        device=setup.device,
        compile="off",
        precision="float32",
        offline_steps=setup.offline_steps,
        online_steps=0 if cloning else setup.online_steps,
        eval_episodes=0,
        arms=_ARMS,
        flow=FlowConfig(width=512 if full else 128, depth=4 if full else 2, gate_width=256 if full else 64),
        learner=learner,
    )


def _measure(cell: _Cell) -> _Outcome:
    config, setup = _config(cell), cell.setup
    demos = two_ways.demonstrate(range(_DEMO_SEED, _DEMO_SEED + setup.demos))
    arms = LocalArms([two_ways.TwoWays() for _ in range(_ARMS)])
    trainer, finished = train(config, arms, demos=demos)
    shape = config.chunk_length, arms.spec.action_dim
    seeds = range(_EVAL_SEED, _EVAL_SEED + setup.episodes)
    episodes = sorted(rollout(arms, shape, trainer.act, seeds), key=lambda e: int(e.info["seed"]))
    paths = [episode.observations["position"] for episode in episodes]
    shown = np.concatenate([episode.observations["position"] for episode in demos])
    solved = [episode.success for episode in episodes]
    row = {
        "regulariser": cell.regulariser,
        "schedule": cell.schedule,
        "seed": cell.seed,
        "success_rate": float(np.mean(solved)),
        "rarer_way": rarer_way([p for p, success in zip(paths, solved, strict=True) if success]),
        "mean_steps": float(np.mean([len(e) for e in episodes if e.success])) if any(solved) else float("nan"),
        "distance_m": mean_distance(np.concatenate(paths), shown),
        "last_weight": trainer.agent.regularisation,
        "diverged": int(not finished),
    }
    return _Outcome(row, paths, solved)


def rarer_way(paths: Sequence[Path]) -> float:
    """Share of paths that take the side that fewer take: 0.5 where both are kept, 0 where one is lost."""
    sides = [two_ways.side_taken(path) for path in paths]
    left, right = sides.count(-1), sides.count(1)
    return min(left, right) / max(left + right, 1)


def mean_distance(points: Path, data: Path) -> float:
    """Mean distance (m) of points (N, 2) to the nearest one of the data (M, 2)."""
    nearest = [float(np.sqrt(((data - point) ** 2).sum(-1)).min()) for point in points]
    return float(np.mean(nearest))
