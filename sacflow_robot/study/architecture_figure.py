"""The figure of ``study architecture``, and which of its rows belong to which factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sacflow_robot.study.report import geometric_mean
from sacflow_robot.utils.plot_style import BLUE, GRAY, GREEN, MARKERS, ORANGE, VERMILION, new_figure, tidy

VELOCITIES = ("mlp", "flow-g", "flow-t", "flow-l")
WIDTH, K, BIAS, RATE = 128, 4, 5.0, 0.07
"""Values of the factors that are not varied: width, steps, bias of flow-g's gate, rate of flow-l at the start."""

_COLORS = dict(zip(VELOCITIES, (VERMILION, BLUE, GREEN, ORANGE), strict=True))
_MARKERS = dict(zip(VELOCITIES, MARKERS, strict=False))


def by(rows: Sequence[dict[str, Any]], column: str, **where: Any) -> dict[float, list[dict[str, Any]]]:
    """Rows that fit, by the value of a column."""
    found: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        trained = np.isnan(row["heads_difference"])
        if trained and all(row[key] == value for key, value in where.items()):
            found.setdefault(float(row[column]), []).append(row)
    return dict(sorted(found.items()))


def factors() -> list[tuple[str, str, tuple[str, ...], dict[str, Any]]]:
    """Column, what it is called, the velocities that have it, and what the others are held at."""
    start = {"flow-g": BIAS, "flow-l": RATE}

    def held(velocity: str) -> dict[str, Any]:
        return {"gate_start": start[velocity]} if velocity in start else {}

    fixed = {v: held(v) for v in VELOCITIES}
    return [
        ("width", "width", VELOCITIES, {v: {**fixed[v], "euler_steps": K} for v in VELOCITIES}),
        ("euler_steps", "rollout steps K", VELOCITIES, {v: {**fixed[v], "width": WIDTH} for v in VELOCITIES}),
        (
            "gate_start",
            "gate's bias at the start (flow-g)",
            ("flow-g",),
            {"flow-g": {"width": WIDTH, "euler_steps": K}},
        ),
        (
            "gate_start",
            "rate at the start (flow-l)",
            ("flow-l",),
            {"flow-l": {"width": WIDTH, "euler_steps": K}},
        ),
    ]


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """The figure of the study, from its rows."""
    figure = new_figure(13.2, 9.0)
    grid = figure.subplots(3, 4)
    for j, (column, label, velocities, held) in enumerate(factors()):
        for velocity in velocities:
            groups = by(rows, column, velocity=velocity, **held[velocity])
            style = {"color": _COLORS[velocity], "marker": _MARKERS[velocity], "ms": 4.5, "lw": 1.5}
            x = list(groups)
            _scatter(grid[0][j], groups, "success_rate", _COLORS[velocity])
            grid[0][j].plot(
                x, [np.mean([r["success_rate"] for r in g]) for g in groups.values()], label=velocity, **style
            )
            _scatter(grid[1][j], groups, "gradient_ratio", _COLORS[velocity])
            grid[1][j].plot(x, [geometric_mean([r["gradient_ratio"] for r in g]) for g in groups.values()], **style)
            if j < 2:
                grid[2][j].plot(x, [g[0]["torch_us"] for g in groups.values()], ls=":", **style)
                grid[2][j].plot(x, [g[0]["onnx_us"] for g in groups.values()], **style)
        _label(grid[0][j], label, "success")
        _label(grid[1][j], label, r"$\|\partial L/\partial A_0\|\ /\ \|\partial L/\partial A_K\|$")
        grid[0][j].set_ylim(0, 1.04)
        grid[1][j].set_yscale("log")
        for axes in (grid[0][j], grid[1][j], *([grid[2][j]] if j < 2 else [])):
            if column in ("width", "euler_steps"):
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            elif velocities == ("flow-l",):
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if j < 2:
            _label(grid[2][j], label, "microseconds an action")
            grid[2][j].set_yscale("log")
            grid[2][j].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low = min(axes.get_ylim()[0] for axes in grid[1])
    high = max(axes.get_ylim()[1] for axes in grid[1])
    for axes in grid[1]:
        axes.set_ylim(low, high)
    _draw_heads(grid[2][2], rows)
    _explain(grid[2][3])
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def _scatter(axes: Axes, groups: dict[float, list[dict[str, Any]]], column: str, color: str) -> None:
    for x, group in groups.items():
        axes.plot([x] * len(group), [r[column] for r in group], "o", color=color, ms=3, alpha=0.35, mew=0)


def _label(axes: Axes, x: str, y: str) -> None:
    tidy(axes)
    axes.set_xlabel(x)
    axes.set_ylabel(y, fontsize=9)


def _draw_heads(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    chosen = [row for row in rows if not np.isnan(row["heads_difference"])]
    values = [max(row["heads_difference"], 1e-18) for row in chosen]
    axes.bar([str(row["heads"]) for row in chosen], values, width=0.55, color=GREEN)
    axes.set(yscale="log", ylim=(1e-18, 1), xlabel="attention heads (flow-t)")
    axes.set_ylabel("difference from a linear map", fontsize=9)
    tidy(axes)


def _explain(axes: Axes) -> None:
    axes.axis("off")
    text = (
        "Costs: dotted torch, solid ONNX Runtime,\none thread, one chunk of 5 actions.\n\n"
        f"Where a panel does not vary it:\nwidth {WIDTH}, K = {K}, gate bias {BIAS:g},\nrate {RATE:g}.\n\n"
        "Faint dots: single seeds."
    )
    axes.text(0.02, 0.95, text, va="top", fontsize=9, color=GRAY)
