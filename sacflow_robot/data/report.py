"""A page of plots that shows at a glance what is in a set of demonstrations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sacflow_robot.data.formats.demonstrations import FINGERS, DemoSet, finger_width, gripper_dimensions
from sacflow_robot.data.formats.inferred_spec import describe_unit
from sacflow_robot.episode import Episode
from sacflow_robot.utils.atomic_files import replacing
from sacflow_robot.utils.intervals import wilson_interval
from sacflow_robot.utils.plot_style import BLUE, GRAY, VERMILION, new_figure, save, tidy

SOLVED, FAILED, NEUTRAL = BLUE, VERMILION, "#555555"
_MOST_TRACES = 150  # more lines than that are a blot
_EEF = "robot0_eef_pos"
_MOVING = 25  # episodes averaged over


def draw_page(path: Path, demos: DemoSet, figures: Mapping[str, Any], title: str) -> None:
    """Draw the page as a picture."""
    figure = Figure(figsize=(14, 11), layout="constrained")
    rows: Any = figure.subfigures(3, 1, height_ratios=[1, 1.15, 0.9], hspace=0.03)
    _heading(figure, demos, figures, title)

    lengths, outcome, steps = rows[0].subplots(1, 3, width_ratios=[1.3, 0.9, 1.3])
    _lengths(lengths, demos.episodes)
    _outcomes(outcome, demos.episodes)
    _over_episodes(steps, demos.episodes)

    shown = _evenly(demos.episodes)
    plane, height, grip = rows[1].subplots(1, 3)
    for axes, draw in (plane, _plane), (height, _height):
        draw(axes, shown) if _EEF in shown[0].observations else _absent(axes, _EEF)
    _gripper(grip, shown, demos)
    if len(shown) < len(demos.episodes):
        rows[1].supylabel(f"{len(shown)} of {len(demos.episodes)} episodes", fontsize=8, color=NEUTRAL)

    _actions(rows[2], demos)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)


def _heading(figure: Figure, demos: DemoSet, figures: Mapping[str, Any], title: str) -> None:
    solved, count = sum(e.success for e in demos.episodes), len(demos.episodes)
    robot, low_high = demos.robot, wilson_interval(solved, count)
    rate = figures["rate"]["nominal_hz"]
    facts = [
        f"{robot.robot}, {robot.task}, {robot.controller}, {'rate unknown' if rate is None else f'{rate:g} Hz nominal'}",
        f"{count:,} episodes, {figures['steps']:,} steps",
        f"success {solved / count:.0%} (95 % interval {low_high[0]:.0%} to {low_high[1]:.0%})",
        f"idle {figures['idle_share']:.0%}",
    ]
    figure.text(0.01, 0.995, title, fontsize=14, fontweight="bold", va="top")
    figure.suptitle(f"\n{'   ·   '.join(facts)}", fontsize=11, x=0.01, ha="left")


def _split(episodes: list[Episode]) -> list[tuple[str, str, list[Episode]]]:
    """Failed ones last, so that they are drawn on top."""
    parts = [("solved", SOLVED, [e for e in episodes if e.success])]
    parts.append(("not solved", FAILED, [e for e in episodes if not e.success]))
    return [(f"{name} ({len(part)})", color, part) for name, color, part in parts if part]


def _lengths(axes: Axes, episodes: list[Episode]) -> None:
    parts = _split(episodes)
    lengths = [len(e) for e in episodes]
    bins = np.linspace(min(lengths) - 0.5, max(lengths) + 0.5, min(40, max(lengths) - min(lengths) + 1) + 1)
    axes.hist(
        [[len(e) for e in part] for _, _, part in parts],
        bins=bins.tolist(),
        stacked=True,
        color=[color for _, color, _ in parts],
        label=[label for label, _, _ in parts],
    )
    axes.axvline(float(np.median(lengths)), color=NEUTRAL, linestyle=":", label=f"median {np.median(lengths):g}")
    axes.set(title="episode lengths", xlabel="steps", ylabel="episodes")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)


def _outcomes(axes: Axes, episodes: list[Episode]) -> None:
    """Return against length: who is quick, who is slow, who never arrives."""
    for label, color, part in _split(episodes):
        returns = [float(e.rewards.sum()) for e in part]
        axes.scatter([len(e) for e in part], returns, s=12, alpha=0.5, color=color, label=label, linewidths=0)
    axes.set(title="return", xlabel="steps", ylabel="sum of rewards")
    axes.margins(y=0.15)
    axes.legend(fontsize=8)


def _over_episodes(axes: Axes, episodes: list[Episode]) -> None:
    """Success in the order of recording: a demonstrator who tires or learns shows here."""
    success = np.array([e.success for e in episodes], float)
    window = max(1, min(50, len(success) // 5))
    smooth = np.convolve(success, np.ones(window) / window, "valid")
    index = np.arange(len(success))
    for solved, color in ((True, SOLVED), (False, FAILED)):
        mine = index[success == solved]
        axes.plot(mine, np.full(len(mine), float(solved)), "|", color=color, markersize=7)
    if len(success) >= 5:
        axes.plot(index[window - 1 :] - (window - 1) / 2, smooth, color=NEUTRAL, label=f"mean of {window}")
        axes.legend(fontsize=8)
    axes.set(title="success in order of recording", xlabel="episode", ylim=(-0.08, 1.08))
    axes.set_yticks([0, 0.5, 1], ["not solved", "50 %", "solved"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _evenly(episodes: list[Episode]) -> list[Episode]:
    """Pick at most as many episodes as a plot of traces bears, from all over the set."""
    count = min(_MOST_TRACES, len(episodes))
    return [episodes[i] for i in np.unique(np.linspace(0, len(episodes) - 1, count).astype(int))]


def _traces(axes: Axes, episodes: list[Episode], line: Callable[[Episode], npt.NDArray[Any]]) -> None:
    """A line (T, 2) of each episode, by success, thin and translucent the more there are."""
    alpha = float(np.clip(4 / np.sqrt(len(episodes)), 0.3, 0.9))
    for _, color, part in _split(episodes):
        axes.add_collection(LineCollection([line(e) for e in part], colors=color, linewidths=0.8, alpha=alpha))
    axes.autoscale_view()


def _absent(axes: Axes, what: str) -> None:
    axes.text(0.5, 0.5, f"no {what} among the observations", ha="center", va="center", color=NEUTRAL)
    axes.set_axis_off()


def _plane(axes: Axes, episodes: list[Episode]) -> None:
    _traces(axes, episodes, lambda e: e.observations[_EEF][:, :2])
    starts = np.array([e.observations[_EEF][0, :2] for e in episodes])
    ends = np.array([e.observations[_EEF][-1, :2] for e in episodes])
    axes.plot(*starts.T, "o", color="black", markersize=3, markerfacecolor="none", markeredgewidth=0.7)
    axes.plot(*ends.T, "x", color="black", markersize=4, markeredgewidth=0.7)
    axes.set(title="end effector from above", xlabel="x (m)", ylabel="y (m)")
    axes.set_aspect("equal", adjustable="datalim")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    lines = [Line2D([], [], color=color, label=label) for label, color, _ in _split(episodes)]
    marks = [
        Line2D([], [], color="black", marker=m, linestyle="", label=t) for m, t in (("$○$", "start"), ("x", "end"))
    ]
    axes.legend(handles=[*lines, *marks], fontsize=8)


def _seconds(episode: Episode) -> npt.NDArray[np.float64]:
    seconds: npt.NDArray[np.float64] = (episode.time_ns - episode.time_ns[0]) / 1e9
    return seconds


def _height(axes: Axes, episodes: list[Episode]) -> None:
    _traces(axes, episodes, lambda e: np.column_stack([_seconds(e), e.observations[_EEF][:, 2]]))
    axes.set(title="end effector: height", xlabel="time (s)", ylabel="z (m)")


def _gripper(axes: Axes, episodes: list[Episode], demos: DemoSet) -> None:
    """Plot the distance between the fingers and the gripper's command, each where it is known."""
    dimensions = np.flatnonzero(gripper_dimensions(demos.robot))
    fingers = FINGERS in episodes[0].observations
    if not fingers and not len(dimensions):
        _absent(axes, FINGERS)
        return
    beside = axes.twinx() if fingers and len(dimensions) else axes
    if len(dimensions):

        def command(e: Episode) -> npt.NDArray[Any]:
            return np.column_stack([_seconds(e)[:-1], e.action[:, dimensions[0]]])

        if fingers:  # commands on an axis of their own, of a few episodes: more are a blot
            lines = [command(e) for _, _, part in _split(episodes) for e in part]
            shown = lines[:: max(1, len(lines) // 10)]
            beside.add_collection(LineCollection(shown, colors=NEUTRAL, linewidths=0.8, linestyles="dotted", alpha=0.7))
            beside.autoscale_view()
        else:
            _traces(axes, episodes, command)
        name, unit = demos.robot.action_names[dimensions[0]], demos.robot.action_units[dimensions[0]]
        beside.set_ylabel(f"command: {name} ({describe_unit(unit)})")
    if fingers:
        _traces(axes, episodes, lambda e: np.column_stack([_seconds(e), 1e3 * finger_width(e)]))
        axes.set_ylabel("between the fingers (mm)")
    axes.set(
        title="gripper: opening, and command (dotted)" if fingers and len(dimensions) else "gripper", xlabel="time (s)"
    )


def _actions(part: Any, demos: DemoSet) -> None:
    """One histogram per action dimension, over the controller's range."""
    robot = demos.robot
    actions = np.concatenate([e.action for e in demos.episodes])
    columns = min(robot.action_dim, 8)
    axes = part.subplots(-(-robot.action_dim // columns), columns, sharey=True, squeeze=False).ravel()
    low, high = robot.action_bounds
    for i, (each, name, unit) in enumerate(zip(axes, robot.action_names, robot.action_units, strict=False)):
        bounded = np.isfinite(low[i]) and np.isfinite(high[i])
        span = (float(low[i]), float(high[i])) if bounded else (float(actions[:, i].min()), float(actions[:, i].max()))
        margin = 0.05 * max(span[1] - span[0], 1e-6)
        shares = np.full(len(actions), 100 / len(actions))
        edges = (span[0] - margin, span[1] + margin)
        each.hist(actions[:, i], bins=45, range=edges, weights=shares, color=NEUTRAL)
        each.set_title(f"{name}\n{describe_unit(unit)}", fontsize=9)
        each.set_yscale("log")
        each.tick_params(labelsize=7)
    for each in axes[robot.action_dim :]:
        each.set_axis_off()
    axes[0].set_ylim(50 / len(actions), 150)
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel("% of steps (log)", fontsize=9)
    part.suptitle("actions sent", fontsize=11)


@dataclass(frozen=True)
class Stretch:
    """Episodes in a row with one policy."""

    version: str  # of the policy
    first: int  # number of the first episode
    solved: tuple[bool, ...]  # whether each was solved


def stretches(episodes: Sequence[Episode]) -> list[Stretch]:
    """Episodes in a row with one policy, in the order of the log; those that name no policy count as ``"unknown"``."""
    found: list[Stretch] = []
    for i, episode in enumerate(episodes):
        version = str(episode.info.get("policy_version", "unknown"))
        if found and found[-1].version == version:
            found[-1] = Stretch(version, found[-1].first, (*found[-1].solved, episode.success))
        else:
            found.append(Stretch(version, i, (episode.success,)))
    return found


def draw_versions(path: Path, title: str, episodes: Sequence[Episode]) -> None:
    """Draw success against the episode's number: each version's with its 95 % Wilson interval, and a moving mean; and below
    it how long episodes were.
    """
    figure = new_figure(8.4, 5.4)
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    solved = np.array([e.success for e in episodes], float)
    parts = stretches(episodes)
    for i, part in enumerate(parts):
        count, end = len(part.solved), part.first + len(part.solved)
        low, high = wilson_interval(sum(part.solved), count)
        above.fill_between([part.first, end], low, high, color=BLUE, alpha=0.16, lw=0)
        label = "each version's, with its 95 % interval" if not i else None
        above.plot([part.first, end], [sum(part.solved) / count] * 2, color=BLUE, lw=2.2, label=label)
        if i:
            above.axvline(part.first, color=GRAY, lw=0.8, ls=(0, (2, 3)))
        middle = (part.first + end) / 2
        name = f"{part.version[:6]}: {sum(part.solved)}/{count}"
        above.annotate(name, (middle, 0.02), rotation=90, fontsize=7.5, ha="center", va="bottom", color="#444444")
    if len(solved) >= _MOVING:
        mean = np.convolve(solved, np.ones(_MOVING) / _MOVING, "valid")
        label = f"of the last {_MOVING} episodes"
        above.plot(np.arange(len(mean)) + _MOVING, mean, color=VERMILION, lw=1.2, label=label)
    above.set(ylabel="success rate", ylim=(0, 1.02), xlim=(0, len(solved)))
    above.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    above.legend(loc="center right", fontsize=8, framealpha=0.9)
    tidy(above, title)
    below.plot(np.arange(len(solved)) + 0.5, [len(e) for e in episodes], ".", color=GRAY, ms=3)
    below.set(xlabel="episode", ylabel="steps", ylim=(0, None))
    tidy(below)
    save(figure, path)
