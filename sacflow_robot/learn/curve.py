"""The learning curve as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from sacflow_robot.learn.run_folder import Evaluation
from sacflow_robot.statistics import wilson_interval

_LINE, _CLONING = "#1f5fa8", "#b8621b"


def draw_curve(evaluations: Sequence[Evaluation], path: Path, title: str) -> None:
    """Success on held-out seeds against environment steps, with 95 % Wilson intervals and the level of cloning alone."""
    points = [e for e in evaluations if e.episodes]
    if not points:
        return
    figure = Figure(figsize=(7.2, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = [e.env_steps for e in points]
    intervals = [wilson_interval(e.successes, e.episodes) for e in points]
    axes.fill_between(steps, [i[0] for i in intervals], [i[1] for i in intervals], color=_LINE, alpha=0.18, lw=0)
    axes.plot(steps, [e.success_rate for e in points], "o-", color=_LINE, lw=1.8, ms=4.5, clip_on=False, zorder=3)
    start = points[0]
    axes.axhline(start.success_rate, color=_CLONING, lw=1.2, ls=(0, (5, 3)), zorder=1)
    axes.annotate(
        f"cloning alone: {start.success_rate:.0%}",
        (1.0, start.success_rate),
        xycoords=("axes fraction", "data"),
        xytext=(-4, -5),
        textcoords="offset points",
        ha="right",
        va="top",
        color=_CLONING,
    )
    axes.set(xlabel="environment steps online", ylabel="success rate", ylim=(0, 1.0), xlim=(0, max(steps[-1], 1)))
    axes.set_title(
        f"{title}, {points[-1].episodes} held-out episodes per point, band: 95 % interval", fontsize=10, loc="left"
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x else "0"))
    axes.grid(axis="y", color="#dddddd", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    partial = path.with_name(f".{path.stem}.partial.png")
    try:
        figure.savefig(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
