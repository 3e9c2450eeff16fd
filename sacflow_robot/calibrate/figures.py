"""Figures of measurements. Imports matplotlib: import this only to draw."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from sacflow_robot.calibrate.dynamics import HIDDEN_SHARE, IDENTIFIED_SHARE, Fit
from sacflow_robot.calibrate.gap import Gap
from sacflow_robot.calibrate.hand_eye import HandEye
from sacflow_robot.calibrate.latency import Latency
from sacflow_robot.calibrate.noise import Noise
from sacflow_robot.calibrate.predict import Predicted, Window
from sacflow_robot.utils.plot_style import BLUE, COLORS, GRAY, GREEN, VERMILION, new_figure, save, tidy


def draw_latency(found: Latency, path: Path) -> None:
    figure = new_figure(12, 3.4)
    left, middle, right, clocks = figure.subplots(1, 4)
    if len(found.observation_s):
        width = 1e3 * max(float(np.ptp(found.observation_s)), 0.004)
        around = 1e3 * float(found.observation_s.min())
        left.hist(1e3 * found.observation_s, bins=40, range=(around - 0.1 * width, around + 1.1 * width), color=BLUE)
    tidy(left, f"observations, {1e3 * found.observation_median_s:.1f} ms", xlabel="from capture to the loop (ms)")
    middle.hist(1e3 * found.command_s, bins=20, color=GREEN)
    middle.axvline(1e3 * found.command_mean_s, color=VERMILION, lw=1.5)
    title = f"commands, {1e3 * found.command_mean_s:.1f} ± {1e3 * found.unsure_s:.1f} ms"
    tidy(middle, title, xlabel="from sending to acting (ms)")
    begin = found.round_trip_s
    near = (found.times > begin - 0.08) & (found.times < begin + 0.06)
    scale = 1 / max(float(found.fitted[near][-1]), 1e-12)
    for row in found.seen:
        right.plot(1e3 * (found.times[near] - begin), scale * row[near], color=GRAY, lw=0.5, alpha=0.5)
    right.plot(1e3 * (found.times[near] - begin), scale * found.fitted[near], color=VERMILION, lw=2, label="fitted")
    right.axvline(0, color=VERMILION, lw=1, ls=":")
    right.set(xlabel="from the beginning found (ms)", ylabel="motion, of that 60 ms later", ylim=(-0.3, 1.3))
    right.legend(frameon=False, fontsize=8, loc="upper left")
    tidy(right, "motions, less what went on")
    clock = found.clock
    if clock is None:
        clocks.text(0.5, 0.5, "nobody knows when\nobservations arrived", ha="center", va="center", fontsize=9)
        tidy(clocks, "clocks")
    else:
        way = clock.way
        clocks.plot(way.pieces, 1e3 * way.least_s, "o", ms=4, color=BLUE)
        clocks.plot(way.pieces, 1e3 * (way.least_s.mean() - 1e-6 * way.drift_ppm * (way.pieces - way.pieces.mean())),
                    color=VERMILION, lw=1)  # fmt: skip
        top = 1e3 * max(float(way.least_s.max()), 1e-3)
        label = "fastest arrival less stamp (ms, from least)"
        clocks.set(xlabel="s into the run", ylabel=label, ylim=(-0.1 * top, 1.2 * top))
        offset = f"arm's ahead by {1e3 * clock.offset_s:.4g} ± {1e3 * clock.spread_s:.0f} ms"
        tidy(clocks, offset if clock.differs else "clocks agree, as far as can be told")
    save(figure, path)


def draw_noise(found: Noise, path: Path) -> None:
    keys = [key for key, rows in found.readings.items() if np.ptp(rows) > 0]
    figure = new_figure(9, 1.7 * max(1, len(keys)))
    for axes, key in zip(np.atleast_1d(figure.subplots(max(1, len(keys)), 1, sharex=True)), keys, strict=False):
        rows = found.readings[key]
        for column, color in zip(rows.T, COLORS, strict=False):
            axes.plot(np.arange(len(rows)) / found.rate_hz, 1e3 * column, color=color, lw=0.6)
        noise = [
            f"{1e3 * found.values[name][0][0]:.3g} m{unit}"
            for unit in ("m", "rad")
            if (name := f"sensors.{key}.noise_{unit}") in found.values
        ]
        tidy(axes, f"{key}: noise {' and '.join(noise)}")
    figure.supxlabel("seconds at rest", fontsize=9)
    figure.supylabel("reading less its mean (mm, mrad)", fontsize=9)
    save(figure, path)


def draw_dynamics(fit: Fit, window: Window, before: Predicted, after: Predicted, path: Path) -> None:
    figure = new_figure(11, 4.6)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.1, 0.9, 1.3])
    ways = {"simulator before": (before, "--"), "simulator after": (after, "-")}
    # Each from its own beginning, for a pose's bias is not a matter of dynamics.
    began = {name: replace(m, position=m.position + window.position[:10].mean(0) - m.position[:10].mean(0))
             for name, (m, _) in ways.items()}  # fmt: skip
    _draw_axes(left, window, {name: (began[name], style) for name, (_, style) in ways.items()})
    tidy(left, "a motion that was not fitted to")
    bars = [1e3 * fit.held_out_before_m, 1e3 * fit.held_out_rmse_m]
    middle.bar(["before", "after"], bars, color=[GRAY, BLUE], width=0.6)
    for i, bar in enumerate(bars):
        middle.text(i, bar, f"{bar:.2g}", ha="center", va="bottom", fontsize=9)
    tidy(middle, f"{bars[0] / max(bars[1], 1e-9):.0f} times less", ylabel="error of the gripper, held out (mm)")
    share = np.minimum(fit.spread / fit.reference, 3.0)
    rows = np.arange(len(share))[::-1]
    colors = np.where(fit.identified, BLUE, np.where(fit.hidden, VERMILION, GRAY))
    right.barh(rows, 100 * share, color=colors, height=0.7)
    for edge in (IDENTIFIED_SHARE, HIDDEN_SHARE):
        right.axvline(100 * edge, color=GRAY, lw=1, ls=":")
    right.set_yticks(rows, [label.split(".", 1)[1] for label in fit.labels], fontsize=6)
    right.set(xscale="log", xlabel="one standard deviation, % of the value")
    tidy(right, "told (blue), roughly (gray), not (red)", "x")
    save(figure, path)


def draw_handeye(found: HandEye, path: Path) -> None:
    figure = new_figure(5, 4.2)
    axes = figure.subplots()
    for i, (seen, made) in enumerate(found.corners):
        axes.plot(*(seen - made).T, ".", ms=4, color=COLORS[i % len(COLORS)])
    axes.set_aspect("equal", "datalim")
    title = f"corners as seen, from where they should be: {found.reprojection_px:.2f} px rms"
    tidy(axes, title, "both", xlabel="px", ylabel="px")
    save(figure, path)


def draw_gap(gap: Gap, path: Path) -> None:
    figure = new_figure(11, 6.2)
    grid = figure.add_gridspec(2, 3, height_ratios=[1, 1])
    order = np.linspace(0, len(gap.windows) - 1, 3).astype(int)
    for column, i in enumerate(order):
        axes = figure.add_subplot(grid[0, column])
        ways = {"simulator": (gap.predicted[i], "--"), f"with the {gap.causes[0].name} mended": (gap.better[i], ":")}
        _draw_axes(axes, gap.windows[i], ways, legend=column == 0)
        tidy(axes, f"piece {i + 1} of the log")
    axes = figure.add_subplot(grid[1, :2])
    told = [c for c in gap.causes if np.isfinite(c.explains)]
    rows = np.arange(len(told))[::-1]
    axes.barh(rows, [100 * c.explains for c in told], color=[VERMILION, *[BLUE] * len(told)][: len(told)], height=0.65)
    for row, cause in zip(rows, told, strict=True):
        axes.text(100 * cause.explains + 1, row, f"{100 * cause.explains:.0f} %", va="center", fontsize=9)
    axes.set_yticks(rows, [c.name for c in told])
    axes.set(xlim=(0, 112), xlabel="of the gripper's squared error explained by mending this alone (%)")
    tidy(axes, f"causes of {1e3 * gap.rmse_m:.1f} mm", "x")
    axes = figure.add_subplot(grid[1, 2])
    if gap.joint_rmse_rad is None:
        off = np.concatenate([p.position - w.position for p, w in zip(gap.predicted, gap.windows, strict=True)])
        axes.bar(["x", "y", "z"], 1e3 * np.sqrt(np.mean(off**2, axis=0)), color=BLUE)
        tidy(axes, "error per axis (joints not logged)", ylabel="mm")
    else:
        axes.bar([str(i + 1) for i in range(7)], 1e3 * gap.joint_rmse_rad, color=BLUE)
        tidy(axes, "error per joint", ylabel="mrad")
    save(figure, path)


def draw_perturbations(rows: Sequence[dict[str, float | str]], path: Path) -> None:
    """Success against the strength of each perturbation, with intervals."""
    names = list(dict.fromkeys(str(row["perturbation"]) for row in rows))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = new_figure(3.4 * columns, 2.5 * lines)
    panels = np.atleast_1d(figure.subplots(lines, columns, sharey=True)).reshape(-1)
    for axes, name in zip(panels, names, strict=False):
        own = [row for row in rows if row["perturbation"] == name]
        x, y = [float(r["value"]) for r in own], np.array([float(r["success_rate"]) for r in own])
        low, high = (np.array([float(r[end]) for r in own]) for end in ("ci_low", "ci_high"))
        axes.errorbar(x, 100 * y, 100 * np.array([y - low, high - y]), color=BLUE, marker="o", ms=4, capsize=3, lw=1.5)
        tidy(axes, name, xlabel=str(own[0]["unit"]), ylim=(-3, 103))
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.supylabel("success (%), 95 % intervals", fontsize=9)
    save(figure, path)


def _draw_axes(axes: Axes, window: Window, ways: dict[str, tuple[Predicted, str]], legend: bool = True) -> None:
    """The gripper's way as measured (pale) and as predicted; the legend says which color and which line is which."""
    for i, (name, color) in enumerate(zip("xyz", COLORS, strict=False)):
        begin = window.position[0, i]
        measured = 1e3 * (window.position[:, i] - begin)
        axes.plot(window.time_s, measured, color=color, lw=2.5, alpha=0.35, label=f"{name}, measured")
        for way, (made, style) in ways.items():
            label = way if i == 2 else None
            axes.plot(window.time_s, 1e3 * (made.position[:, i] - begin), style, color=color, lw=1.2, label=label)
    axes.set(xlabel="s", ylabel="gripper, from where it began (mm)")
    if legend:
        axes.legend(fontsize=7, framealpha=0.8, edgecolor="none")
