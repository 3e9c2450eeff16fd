"""One look for all figures: colors that stay apart for color-blind eyes, thin axes, files written in one step.

Imports matplotlib, so import this module only to draw.
"""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sacflow_robot.utils.atomic_files import replacing

# Okabe and Ito, "Color universal design" (2008).
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK, GRAY = "#E69F00", "#56B4E9", "#222222", "#888888"
COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS = "osD^vPX"  # a second way, besides color, to tell lines apart


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size (inches) that lays itself out."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes, title: str = "", grid: str = "y", **properties: Any) -> None:
    """Two spines, a faint grid behind the data, the title at the left; ``grid`` is x, y or both, the rest what axes take."""
    axes.set(**properties)
    if title:
        axes.set_title(title, fontsize=10, loc="left")
    axes.grid(axis=grid, color="#dddddd", lw=0.7)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, complete or not at all."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
