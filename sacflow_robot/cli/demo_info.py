"""``sacflow-robot demos info``."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sacflow_robot.cli import common
from sacflow_robot.data.formats.agreement import AgreementOptions
from sacflow_robot.data.formats.inferred_spec import UNKNOWN
from sacflow_robot.errors import LogWriteError, UsageError, one_line
from sacflow_robot.utils.atomic_files import check_output

if TYPE_CHECKING:
    from rich.table import Table

    from sacflow_robot.data.formats.demonstrations import DemoSet

_PICTURES = (".png", ".pdf", ".svg")
_NO_RATE = "unknown, the file does not say it; give --rate HZ"
_ANY_RATE = 1.0  # Hz; what episodes of which no rate is known are read at, for nothing that depends on it


@dataclass(frozen=True)
class Info(AgreementOptions):
    """Describe demonstrations: a table, and a page of plots.

    Attributes:
        src: Episode log, LeRobotDataset or diffusion_policy store (folders), UMI's .zarr.zip, robomimic or raw robosuite
            HDF5 file, or robomimic:<task>/<ph|mh>.
        plots: Picture to draw (.png, .pdf or .svg); auto is <name of src>-info.png in the working directory, none
            draws nothing.
        env: Task that the demonstrations are to fit; by default the one, or the robot, that the source names.
        trim_idle: Leave out idle steps of raw robosuite files.
        json: Print the result as one JSON object.
    """

    src: Annotated[str, tyro.conf.Positional]
    plots: str = "auto"
    env: str | None = None
    trim_idle: bool = False
    json: bool = False

    def run(self) -> int:
        from sacflow_robot.data.formats.sources import kind_of, says_rate
        from sacflow_robot.data.summary import summarize
        from sacflow_robot.learn import demo_source

        picture = self._picture()
        path = demo_source.locate(self.src)
        rated = self.rate is not None or self.env is not None or says_rate(path)
        demos = demo_source.read(path, self.env, self.trim_idle, self if rated else replace(self, rate=_ANY_RATE))
        solved = sum(e.success for e in demos.episodes)
        success = common.success_json(solved, len(demos.episodes))
        figures = {**success, "format": kind_of(path), **summarize(demos)}
        if not rated:
            figures["rate"] = dict.fromkeys(figures["rate"])
        out = common.results(self.json)
        out.print(_facts(demos, figures))
        out.print()
        out.print(_keys(figures["keys"]))
        if losses := str(demos.losses):
            out.print(f"\nread without: {losses}")
        if picture is not None:
            figures["plots"] = str(picture)
            self._draw(picture, demos, figures)
        if self.json:
            common.print_json(figures)
        return 0

    def _picture(self) -> Path | None:
        """Path of the picture to draw; refused before anything is read."""
        from sacflow_robot.data.robomimic_download import parse_name

        if self.plots == "none":
            return None
        if self.plots == "auto" and importlib.util.find_spec("matplotlib") is None:
            common.console().print("no plots: matplotlib is not installed; pip install 'sacflow-robot[viz]'")
            return None
        importlib.import_module("matplotlib")  # before everything is read
        if self.plots == "auto":
            named = parse_name(self.src)
            return Path(f"{'-'.join(('robomimic', *named)) if named else Path(self.src).resolve().stem}-info.png")
        picture = Path(self.plots)
        if picture.suffix not in _PICTURES or not picture.parent.is_dir():
            raise UsageError(
                f"--plots {picture}: expected auto, none, or a {', '.join(_PICTURES)} file in a folder that exists"
            )
        check_output(picture, "--plots")
        return picture

    def _draw(self, picture: Path, demos: DemoSet, figures: Mapping[str, Any]) -> None:
        from sacflow_robot.data.report import draw_page

        try:
            draw_page(picture, demos, figures, self.src)
        except OSError as error:
            raise LogWriteError(f"cannot write {picture}: {one_line(error)}; give another --plots") from None
        common.results(self.json).print(f"plots: {picture}")


def _facts(demos: DemoSet, figures: Mapping[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    from sacflow_robot.data.formats.demonstrations import gripper_dimensions
    from sacflow_robot.data.formats.foreign_episodes import NO_SUCCESS
    from sacflow_robot.data.summary import describe_rate

    robot, rate, steps = demos.robot, figures["rate"], figures["steps_per_episode"]
    copies = figures["duplicates"]
    success = common.describe_success(figures["successes"], figures["episodes"])
    if NO_SUCCESS in demos.losses.remarks:
        success = "not recorded"
    having_states = sum(e.states is not None for e in demos.episodes)
    rows = {
        "format": figures["format"],
        "robot": ", ".join(
            each if each != UNKNOWN else f"{what} unknown"
            for what, each in (("robot", robot.robot), ("task", robot.task), ("controller", robot.controller))
        ),
        "episodes": f"{len(demos.episodes):,}, success {success}",
        "steps": f"{figures['steps']:,} ({steps['min']} to {steps['max']} an episode, median {steps['median']:g})",
        "rate": _NO_RATE if rate["nominal_hz"] is None else describe_rate(rate, robot.control_rate_hz),
        "chosen by": ", ".join(f"{name} {count:,}" for name, count in figures["sources"].items()),
        "policies": ", ".join(figures["policies"]) or "none",
        "idle": f"{figures['idle_share']:.1%} of the steps command nothing new",
        "at the limit": "-"
        if figures["saturated_share"] is None
        else f"{figures['saturated_share']:.1%} of the motion commands",
        "gripper": figures["gripper"] or ("as commanded" if gripper_dimensions(robot).any() else "none known"),
        "duplicates": "; ".join(" = ".join(map(str, group)) for group in copies[:5])
        + (f"; {len(copies) - 5} more groups" if len(copies) > 5 else "")
        if copies
        else "none",
        "subsets": ", ".join(f"{name} ({len(members)})" for name, members in demos.masks.items()) or "none",
        "simulator states": "yes" if having_states == len(demos.episodes) else "no" if not having_states else "some",
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(name, "bold"), Text(value))
    return table


def _keys(keys: list[dict[str, Any]]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name, side in (("key", "left"), ("shape", "left"), ("type", "left"), ("min", "right"), ("max", "right")):
        table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("unit", overflow="fold")
    for key in keys:
        shape = " x ".join(map(str, key["shape"])) or "1"
        low, high = (_number(key[end]) for end in ("min", "max"))
        table.add_row(*(Text(text) for text in (key["key"], shape, key["dtype"], low, high, key["unit"])))
    return table


def _number(value: Any) -> str:
    return str(value) if isinstance(value, bool | int) else f"{value:.4g}"
