"""The figure of ``study likelihood``, and the names of its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sacflow_robot.study.targets import GAUSSIAN, MIXTURE, Array, Mixture
from sacflow_robot.utils.plot_style import BLACK, BLUE, GRAY, GREEN, MARKERS, ORANGE, VERMILION, new_figure, tidy

# Values of the column "part".
MASS, OFF = "integral of the path density", "marginal off the target"
OF_PATHS, FROM_TARGET = "divergence of paths", "divergence from target"
EXACT, PATH = "entropy, exact", "entropy, path"

SHOWN = 16, 0.5
"""K and sigma of the panel of densities."""

Rows = Sequence[dict[str, Any]]


def pick(rows: Sequence[dict[str, Any]], part: str, **where: Any) -> list[dict[str, Any]]:
    """Rows of a part of the study that fit."""
    return [r for r in rows if r["part"] == part and all(r[key] == value for key, value in where.items())]


def draw(rows: Rows, shown: Mapping[str, Array]) -> Figure:
    """The figure of the study, from its rows and, by label, samples (N,) of the marginals at :data:`SHOWN`."""
    figure = new_figure(12.6, 7.4)
    grid = figure.subplots(2, 3)
    _draw_densities(grid[0][0], shown)
    for axes, target in zip(grid[0][1:], (MIXTURE, GAUSSIAN), strict=True):
        _draw_marginals(axes, rows, target)
    _draw_masses(grid[1][0], rows)
    _draw_divergences(grid[1][1], rows)
    _draw_entropies(grid[1][2], rows)
    return figure


def _steps(rows: Rows) -> list[int]:
    return sorted({row["euler_steps"] for row in pick(rows, EXACT)})


def _color(rows: Rows, steps: int) -> str:
    return (BLUE, GREEN, ORANGE, VERMILION)[_steps(rows).index(steps) % 4]


def _draw_densities(axes: Axes, shown: Mapping[str, Array]) -> None:
    steps, sigma = SHOWN
    x = np.linspace(-1.9, 1.9, 400)
    axes.fill_between(x, MIXTURE.density(x), color="#cccccc", lw=0, label="target")
    edges = np.linspace(-1.9, 1.9, 96)
    for (label, ends), color in zip(shown.items(), (BLACK, BLUE, VERMILION), strict=True):
        height, _ = np.histogram(ends, edges, density=True)
        axes.plot(0.5 * (edges[1:] + edges[:-1]), height, color=color, lw=1.5, label=label)
    tidy(axes, rf"mixture, K = {steps}, $\sigma$ = {sigma:g}")
    axes.set(xlabel="latent action", ylabel="density", ylim=(0, 1.55 * float(MIXTURE.density(x).max())))
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_marginals(axes: Axes, rows: Rows, target: Mixture) -> None:
    handles = []
    for n, steps in enumerate(_steps(rows)):
        color = _color(rows, steps)
        for drift, style in (("true", "-"), ("false", ":")):
            chosen = pick(rows, OFF, target=target.name, euler_steps=steps, drift=drift)
            axes.plot(
                [r["noise_scale"] for r in chosen],
                [r["value"] for r in chosen],
                f"{MARKERS[n]}{style}",
                color=color,
                ms=4,
                lw=1.5,
            )
        handles.append(Line2D([], [], color=color, marker=MARKERS[n], ms=4, label=f"K = {steps}"))
    handles += [
        Line2D([], [], color=GRAY, ls=ls, label=f"drift {what}") for ls, what in (("-", "corrected"), (":", "as it is"))
    ]
    floor = pick(rows, OFF, target=target.name, euler_steps=0)[0]["value"]
    axes.axhline(floor, color=GRAY, lw=0.8, ls=(0, (4, 3)))
    axes.annotate(
        "the target's own samples",
        (1.0, floor),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        fontsize=7,
        color=GRAY,
    )
    tidy(axes, f"{target.name}: marginal off its target")
    axes.set(xscale="log", yscale="log", xlabel=r"noise scale $\sigma$", ylabel="Wasserstein-1 distance (latent units)")
    axes.set_ylim(0.6 * floor, 8 * axes.dataLim.y1)
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="upper left", ncols=2)


def _draw_masses(axes: Axes, rows: Rows) -> None:
    chosen = pick(rows, MASS)
    for i, row in enumerate(chosen):
        color = BLUE if row["target"] == MIXTURE.name else ORANGE
        axes.errorbar(i, row["value"], 2 * row["standard_error"], fmt="o", ms=4, color=color, lw=1.3, capsize=2)
    axes.axhline(1, color=BLACK, lw=0.8, ls=(0, (4, 3)), zorder=1)
    labels = [f"{r['euler_steps']}\n{r['noise_scale']:g}" for r in chosen]
    tidy(axes, "integral of the path density (bars: 2 standard errors)")
    axes.set_xticks(range(len(chosen)), labels, fontsize=7)
    axes.set(xlabel=r"K, and below it $\sigma$", ylabel="integral over all paths")
    spread = max(abs(r["value"] - 1) + 2 * r["standard_error"] for r in chosen)
    axes.set_ylim(1 - 1.2 * spread, 1 + 1.7 * spread)
    handles = [
        Line2D([], [], color=c, marker="o", ls="", ms=4, label=t.name) for t, c in ((GAUSSIAN, ORANGE), (MIXTURE, BLUE))
    ]
    axes.legend(handles=handles, frameon=False, fontsize=8, ncols=2, loc="upper left")


def _draw_divergences(axes: Axes, rows: Rows) -> None:
    parts = (
        (OF_PATHS, GAUSSIAN.name, BLUE, "o", "paths of two Gaussian flows"),
        (FROM_TARGET, GAUSSIAN.name, ORANGE, "s", "exact density, Gaussian"),
        (FROM_TARGET, MIXTURE.name, VERMILION, "D", "exact density, mixture"),
    )
    for part, target, color, marker, label in parts:
        chosen = pick(rows, part, target=target)
        axes.errorbar(
            [r["expected"] for r in chosen],
            [r["value"] for r in chosen],
            [2 * r["standard_error"] for r in chosen],
            fmt=marker,
            ms=4.5,
            color=color,
            lw=1.2,
            label=label,
            mfc="white",
            zorder=3,
        )
    values = [r["expected"] for part, target, *_ in parts for r in pick(rows, part, target=target)]
    ends = [0.5 * min(values), 2 * max(values)]
    axes.plot(ends, ends, color=BLACK, lw=0.8, ls=(0, (4, 3)), zorder=1)
    tidy(axes, "KL divergence, nats a dimension", grid="both")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="analytic", ylabel="Monte Carlo")
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_entropies(axes: Axes, rows: Rows) -> None:
    stds = sorted({row["std"] for row in pick(rows, EXACT)})
    x = np.geomspace(min(stds), max(stds), 50)
    axes.plot(x, 0.5 * np.log(2 * np.pi * np.e * x**2), color=BLACK, lw=1.2, label="the Gaussian's own")
    for n, steps in enumerate(_steps(rows)):
        chosen = pick(rows, EXACT, euler_steps=steps)
        axes.plot(
            [r["std"] for r in chosen],
            [r["value"] for r in chosen],
            f"{MARKERS[n]}--",
            color=_color(rows, steps),
            ms=4.5,
            mfc="white",
            lw=1,
            label=f"exact density, K = {steps}",
        )
    chosen = pick(rows, PATH, euler_steps=max(_steps(rows)))
    axes.plot(
        [r["std"] for r in chosen],
        [r["value"] for r in chosen],
        "X-",
        color=VERMILION,
        ms=5,
        lw=1.2,
        label=r"noisy path less its noise, any K",
    )
    tidy(axes, "what the two densities call entropy")
    axes.set(xscale="log", xlabel="standard deviation of the target", ylabel="entropy (nats a dimension)")
    axes.set_xticks(stds, [f"{std:g}" for std in stds])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, loc="lower right")
