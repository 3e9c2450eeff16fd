"""Two ways of doing a task in the data: what each regularizer, with each schedule of its weight, keeps of them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle

from sacflow_robot.study import two_ways
from sacflow_robot.study.options import TrialOptions
from sacflow_robot.study.report import Report, listed
from sacflow_robot.study.runs import RunAll
from sacflow_robot.study.two_ways import Path, run_trial, trial_config
from sacflow_robot.utils.plot_style import (
    BLACK,
    BLUE,
    GRAY,
    GREEN,
    MARKERS,
    ORANGE,
    PURPLE,
    VERMILION,
    new_figure,
    tidy,
)
from sacflow_robot.utils.seeding import TRAINING_SEED

BC_LOSSES = {"action": 1.0, "flow-matching": 1.0, "same-noise": 1.0}
"""Regularizer and the weight that it starts with. The weights do not compare: flow-matching's loss is a mean over the chunk's
dimensions, the two distances are sums."""

SCHEDULES = ("constant", "linear", "adaptive")
_MEASURES = {
    "success_rate": "success",
    "rarer_way": "share of the rarer way",
    "mean_steps": "steps to the goal",
    "action_distance": "distance from the data's actions",
}
_MOST_PATHS = 60
_CLONING = "cloning", "-"
_PAIRS = [(regularizer, schedule) for regularizer in BC_LOSSES for schedule in SCHEDULES]


class _Case(NamedTuple):
    regularizer: str  # or "cloning": the offline phase alone
    schedule: str
    seed: int
    cloned: dict[str, Any] | None = None


class _Result(NamedTuple):
    row: dict[str, Any]
    paths: list[Path]
    solved: list[bool]
    agent: dict[str, Any] | None


def study(options: TrialOptions, run_all: RunAll) -> Report:
    """Clone once for each seed, and go on from that clone with every pair of regularizer and schedule."""
    measure = partial(_measure, options)
    clones = run_all(measure, [_Case(*_CLONING, seed) for seed in options.all_seeds])
    start = dict(zip(options.all_seeds, clones, strict=True))
    cases = [_Case(*pair, seed, start[seed].agent) for pair in _PAIRS for seed in options.all_seeds]
    results = [*clones, *run_all(measure, cases)]
    rows = [result.row for result in results]
    return Report("regularization", rows, _draw(results, options), _read(rows))


def _measure(options: TrialOptions, case: _Case) -> _Result:
    cloning = case.regularizer == "cloning"
    if cloning:
        config = replace(trial_config(options, case.seed), online_steps=0)
    else:
        weight = BC_LOSSES[case.regularizer]
        config = trial_config(options, case.seed, bc_loss=case.regularizer, bc_schedule=case.schedule, bc_coef=weight)
    outcome = run_trial(config, options.episodes, case.cloned)
    row = {
        "bc_loss": case.regularizer,
        "schedule": case.schedule,
        "seed": case.seed,
        **outcome.figures,
        "last_weight": outcome.agent.bc_coef,
        "finished": int(outcome.finished),
    }
    return _Result(row, outcome.paths, outcome.solved, outcome.agent.state_dict() if cloning else None)


def _of(rows: Sequence[dict[str, Any]], pair: tuple[str, str], measure: str) -> list[float]:
    return [r[measure] for r in rows if (r["bc_loss"], r["schedule"]) == pair]


def _mean(values: Sequence[float]) -> float:
    """Of those that are numbers: a policy that never arrives takes no number of steps."""
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def _draw(results: Sequence[_Result], options: TrialOptions) -> Figure:
    figure = new_figure(13.2, 8.2)
    parts: Any = figure.subfigures(1, 2, width_ratios=[1.75, 1], wspace=0.02)
    left, right = parts
    grid: Any = left.subplots(len(BC_LOSSES), len(SCHEDULES), sharex=True, sharey=True)
    demos = two_ways.demonstrate(range(TRAINING_SEED, TRAINING_SEED + _MOST_PATHS))
    shown = {(r.row["bc_loss"], r.row["schedule"]): r for r in results if r.row["seed"] == options.all_seeds[0]}
    for axes, pair in zip(grid.flat, _PAIRS, strict=True):
        _draw_paths(axes, shown[pair], [e.observations["position"] for e in demos])
        tidy(axes, ", ".join(pair), grid="both")
        axes.set(xlabel="x (m)", ylabel="y (m)")
        axes.label_outer()
    lines = [("demonstrations", "#bbbbbb", ""), ("left", BLUE, ""), ("right", ORANGE, ""), ("failed", VERMILION, "x")]
    handles = [Line2D([], [], color=color, marker=marker, mew=1.5, label=name) for name, color, marker in lines]
    left.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    rows = [result.row for result in results]
    panels: Any = right.subplots(len(_MEASURES), 1, sharex=True)
    for axes, (measure, label) in zip(panels, _MEASURES.items(), strict=True):
        _draw_measure(axes, rows, measure, label)
    return figure


def _draw_paths(axes: Axes, result: _Result, demos: list[Path]) -> None:
    for path in demos:
        axes.plot(path[:, 0], path[:, 1], color="#cccccc", lw=0.6, zorder=1)
    axes.add_patch(Circle((0, 0), two_ways.OBSTACLE, color="#555555", zorder=2))
    goal = (float(two_ways.GOAL_AT[0]), float(two_ways.GOAL_AT[1]))
    axes.add_patch(Circle(goal, two_ways.GOAL, fill=False, ec=BLACK, lw=1.2, zorder=4))
    for path, success in list(zip(result.paths, result.solved, strict=True))[:_MOST_PATHS]:
        color = (BLUE if two_ways.side_taken(path) < 0 else ORANGE) if success else VERMILION
        axes.plot(path[:, 0], path[:, 1], color=color, lw=0.8, alpha=0.6, zorder=3)
        if not success:
            axes.plot(*path[-1], "x", color=VERMILION, ms=5, mew=1.3, zorder=5)
    look: dict[str, Any] = {"ha": "center", "va": "center", "color": "white", "fontsize": 11, "fontweight": "bold"}
    axes.text(0.5, 0.5, f"{result.row['success_rate']:.0%}", transform=axes.transAxes, zorder=6, **look)
    axes.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))


def _draw_measure(axes: Axes, rows: list[dict[str, Any]], measure: str, label: str) -> None:
    colors = dict(zip(SCHEDULES, (GREEN, PURPLE, BLACK), strict=True))
    for i, regularizer in enumerate(BC_LOSSES):
        for j, schedule in enumerate(SCHEDULES):
            values = _of(rows, (regularizer, schedule), measure)
            x, color = i + 0.24 * (j - 1), colors[schedule]
            axes.plot([x] * len(values), values, MARKERS[j], color=color, ms=4, alpha=0.45, mew=0)
            label_once = schedule if i == 0 else None
            axes.plot([x - 0.09, x + 0.09], [_mean(values)] * 2, color=color, lw=2.4, label=label_once)
    cloned = _mean(_of(rows, _CLONING, measure))
    axes.axhline(cloned, color=GRAY, lw=1, ls=(0, (4, 3)), zorder=1, label="cloning alone")
    tidy(axes, label)
    axes.set_xticks(range(len(BC_LOSSES)), list(BC_LOSSES))
    axes.set_xlim(-0.5, len(BC_LOSSES) - 0.5)
    axes.set_ylim(0, {"success_rate": 1.04, "rarer_way": 0.52}.get(measure))
    if measure == "success_rate":
        handles = axes.get_legend_handles_labels()
        axes.figure.legend(*handles, loc="outside upper center", ncols=4, frameon=False, fontsize=8)


def _read(rows: list[dict[str, Any]]) -> str:
    def mean(pair: tuple[str, str], measure: str) -> float:
        return _mean(_of(rows, pair, measure))

    seeds = len(_of(rows, _CLONING, "seed"))

    def told(pair: tuple[str, str]) -> str:
        success, way, steps, off = (mean(pair, measure) for measure in _MEASURES)
        return f"{pair[0]} {pair[1]} {success:.0%}, {way:.0%}, {steps:.0f}, {off:.2f}"

    lost = [pair for pair in _PAIRS if mean(pair, "rarer_way") < 0.2]
    best = max(_PAIRS, key=lambda pair: mean(pair, "success_rate"))
    fastest = min(_PAIRS, key=lambda pair: np.nan_to_num(mean(pair, "mean_steps"), nan=np.inf))
    text = (
        f"Success, share of the rarer way, steps to the goal and distance from the data's actions, means over seeds ({seeds}): "
        f"{told(_CLONING)}; {'; '.join(map(told, _PAIRS))}. Most successful is {best[0]} with the {best[1]} schedule, "
        f"fastest {fastest[0]} with the {fastest[1]} one. "
    )
    if lost:
        names = listed([f"{' '.join(pair)} ({mean(pair, 'rarer_way'):.0%})" for pair in lost])
        kept = len(_PAIRS) - len(lost)
        text += f"The rarer way falls below 20 % of successes with {names}; the other {kept} keep both ways."
    else:
        text += "All keep both ways: the rarer one has at least 20 % of the successes."
    unfinished = sum(not row["finished"] for row in rows)
    return text + (f" {unfinished} runs diverged." if unfinished else "")
