"""Success by policy version, of a log in which the policy changed while the robot ran."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.ticker import PercentFormatter

from sacflow_robot.episode import Episode
from sacflow_robot.utils.intervals import wilson_interval
from sacflow_robot.utils.plot_style import BLUE, GRAY, VERMILION, new_figure, save, tidy

_MOVING = 25  # episodes averaged over


@dataclass(frozen=True)
class Stretch:
    """Episodes in a row with one policy.

    Attributes:
        version: Of the policy.
        first: Number of the first episode.
        solved: Whether each was solved.
    """

    version: str
    first: int
    solved: tuple[bool, ...]


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

    Args:
        path: PNG to write.
        title: What was logged.
        episodes: At least one.
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
