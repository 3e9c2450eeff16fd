"""``sacflow-robot demos``."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sacflow_robot.cli import common
from sacflow_robot.data.formats.agreement import AgreementOptions
from sacflow_robot.data.formats.inferred_spec import UNKNOWN
from sacflow_robot.errors import LogWriteError, UsageError, one_line
from sacflow_robot.spec import Engine
from sacflow_robot.utils.atomic_files import check_output

if TYPE_CHECKING:
    from rich.table import Table

    from sacflow_robot.data.formats.demonstrations import DemoSet


@dataclass(frozen=True)
class Collect(common.JsonOptions):
    """Collect demonstrations from a task's scripted expert, on all cores.

    Attributes:
        env: Task.
        quality: How good the expert is: proficient hardly ever fails, mixed is like a group of people, poor often fails.
        episodes: Episodes to collect.
        out: Episode log to make.
        seed: First environment seed, which decides the expert's style too.
        env_engine: What steps the robots: compiled, or robosuite's own (stock).
    """

    out: Path
    env: str = "lift"
    quality: Literal["proficient", "mixed", "poor"] = "mixed"
    episodes: int = 200
    seed: int = 1_000_000
    env_engine: Engine = "compiled"

    def run(self) -> int:
        from sacflow_robot.data.log.episode_writer import write_log
        from sacflow_robot.envs.experts.expert import make_expert
        from sacflow_robot.envs.tasks import get_task
        from sacflow_robot.learn.training_data import collect_demos

        if self.episodes < 1 or self.seed < 0:
            raise UsageError("--episodes must be at least 1 and --seed not negative")
        robot = get_task(self.env).robot
        make_expert(self.env, 0, self.quality)
        if self.out.exists():
            raise UsageError(f"{self.out} exists already; give another --out or remove it")
        check_output(self.out)
        episodes = collect_demos(self.env, self.quality, self.episodes, self.seed, self.env_engine)
        write_log(self.out, robot, episodes)
        found, steps = common.success_json(episodes), sum(map(len, episodes))
        success = common.describe_success(found)
        self.say(f"wrote {self.out}: {len(episodes)} episodes, {steps:,} steps, success {success}")
        return self.finish({**found, "steps": steps, "out": str(self.out)})


@dataclass(frozen=True)
class _SourceOptions(AgreementOptions, common.JsonOptions):
    """Demonstrations to read.

    Attributes:
        src: Episode log, LeRobotDataset or diffusion_policy store (folders), UMI's .zarr.zip, robomimic or raw robosuite
            HDF5 file, or robomimic:<task>/<ph|mh>.
        env: Task that the demonstrations are to fit; by default the one, or the robot, that the source names.
        trim_idle: Leave out idle steps of raw robosuite files.
    """

    src: Annotated[str, tyro.conf.Positional]
    env: str | None = field(default=None, kw_only=True)
    trim_idle: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Convert(_SourceOptions):
    """Convert demonstrations between formats: episode log, robomimic HDF5, LeRobotDataset v3.0; read others too.

    What the destination cannot hold is said in one line; all else comes back bit for bit.

    Attributes:
        dst: What to make; its suffix names the format: .zarr, .hdf5 (or .h5), .lerobot.
        to: Format, where the suffix names none.
    """

    dst: Annotated[Path, tyro.conf.Positional]
    to: Literal["zarr", "hdf5", "lerobot"] | None = None

    def run(self) -> int:
        from sacflow_robot.data.formats.sources import check_free, kind_to_write, write_demos
        from sacflow_robot.learn import demo_source

        kind = kind_to_write(self.dst, self.to)
        check_free(self.dst)
        demos = demo_source.read(demo_source.locate(self.src), self.env, self.trim_idle, self)
        if kind == "hdf5":
            demos = demo_source.describe_environment(demos)
        written = write_demos(self.dst, demos, kind)
        losses, steps = written.losses, sum(map(len, written.episodes))
        self.say(f"wrote {self.dst}: {len(written.episodes)} episodes, {steps:,} steps, success {_success(written)}")
        if str(losses):
            common.console().print(f"not the same as in {self.src}: {losses}")
        lost = {name: list(getattr(losses, name)) for name in ("left_out", "rounded", "remarks")}
        about = {"steps": steps, "out": str(self.dst), "format": kind, **lost}
        return self.finish({**common.success_json(written.episodes), **about})


_PICTURES = (".png", ".pdf", ".svg")
_NO_RATE = "unknown, the file does not say it; give --rate HZ"
_ANY_RATE = 1.0  # Hz; what episodes of which no rate is known are read at, for nothing that depends on it


@dataclass(frozen=True)
class Info(_SourceOptions):
    """Describe demonstrations: a table, and a page of plots.

    Attributes:
        plots: Picture to draw (.png, .pdf or .svg); auto is <name of src>-info.png in the working directory, none
            draws nothing.
    """

    plots: str = "auto"

    def run(self) -> int:
        from sacflow_robot.data.formats.sources import kind_of, says_rate
        from sacflow_robot.data.summary import summarize
        from sacflow_robot.learn import demo_source

        picture = self._picture()
        path = demo_source.locate(self.src)
        rated = self.rate is not None or self.env is not None or says_rate(path)
        demos = demo_source.read(path, self.env, self.trim_idle, self if rated else replace(self, rate=_ANY_RATE))
        figures = {**common.success_json(demos.episodes), "format": kind_of(path), **summarize(demos)}
        if not rated:
            figures["rate"] = dict.fromkeys(figures["rate"])
        self.say(_facts(demos, figures), "", _keys(figures["keys"]))
        if losses := str(demos.losses):
            self.say(f"\nread without: {losses}")
        if picture is not None:
            figures["plots"] = str(picture)
            self._draw(picture, demos, figures)
        return self.finish(figures)

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
        self.say(f"plots: {picture}")


def _success(demos: DemoSet) -> str:
    from sacflow_robot.data.formats.foreign_episodes import NO_SUCCESS

    known = NO_SUCCESS not in demos.losses.remarks
    return common.describe_success(common.success_json(demos.episodes)) if known else "not recorded"


def _facts(demos: DemoSet, figures: Mapping[str, Any]) -> Table:
    from sacflow_robot.data.formats.demonstrations import gripper_dimensions
    from sacflow_robot.data.summary import describe_rate

    robot, rate, steps = demos.robot, figures["rate"], figures["steps_per_episode"]
    copies = figures["duplicates"]
    having_states = sum(e.states is not None for e in demos.episodes)
    return common.facts(
        {
            "format": figures["format"],
            "robot": ", ".join(
                each if each != UNKNOWN else f"{what} unknown"
                for what, each in (("robot", robot.robot), ("task", robot.task), ("controller", robot.controller))
            ),
            "episodes": f"{len(demos.episodes):,}, success {_success(demos)}",
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
            "simulator states": "yes"
            if having_states == len(demos.episodes)
            else "no"
            if not having_states
            else "some",
        }
    )


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
