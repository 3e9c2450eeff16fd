"""The learning curve as a picture."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, PercentFormatter

from sacflow_robot.learn.metrics import Evaluation
from sacflow_robot.utils.intervals import wilson_interval
from sacflow_robot.utils.plot_style import BLUE, VERMILION, new_figure, save, tidy

_LINE, _CLONING = BLUE, VERMILION


def draw_curve(evaluations: Sequence[Evaluation], path: Path, title: str, *, returns: bool = False) -> None:
    """Evaluations on held-out seeds against environment steps.

    Args:
        evaluations: At least one, or nothing is drawn.
        path: PNG to write.
        title: What was trained.
        returns: Draw mean returns; otherwise success, with 95 % Wilson intervals and the level of cloning alone.
    """
    points = [e for e in evaluations if e.episodes]
    if not points:
        return
    figure = new_figure(7.2, 4.2)
    axes = figure.subplots()
    steps = [e.env_steps for e in points]
    if returns:
        _draw_line(axes, steps, [e.mean_return for e in points])
        axes.set(ylabel="mean return")
    else:
        _draw_success(axes, steps, points)
    axes.set(xlabel="environment steps online", xlim=(0, max(steps[-1], 1000)))
    band = "" if returns else ", band: 95 % interval"
    tidy(axes, f"{title}, {points[-1].episodes} held-out episodes per point{band}")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x else "0"))
    save(figure, path)


def _draw_line(axes: Axes, steps: list[int], values: list[float]) -> None:
    axes.plot(steps, values, "o-", color=_LINE, lw=1.8, ms=4.5, clip_on=False, zorder=3)


def _draw_success(axes: Axes, steps: list[int], points: list[Evaluation]) -> None:
    intervals = [wilson_interval(e.successes, e.episodes) for e in points]
    axes.fill_between(steps, [i[0] for i in intervals], [i[1] for i in intervals], color=_LINE, alpha=0.18, lw=0)
    _draw_line(axes, steps, [e.success_rate for e in points])
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
    axes.set(ylabel="success rate", ylim=(0, 1.0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
