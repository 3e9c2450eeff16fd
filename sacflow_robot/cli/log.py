"""``sacflow-robot log``."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from sacflow_robot.cli import common
from sacflow_robot.episode import Episode
from sacflow_robot.errors import LogWriteError, UsageError, one_line
from sacflow_robot.utils.atomic_files import check_output

if TYPE_CHECKING:
    from sacflow_robot.data.log.repair import Problem
    from sacflow_robot.spec import RobotSpec


@dataclass(frozen=True)
class Info:
    """Print what an episode log holds; reading all of it also checks it.

    Attributes:
        log: Episode log: a folder, or an address such as s3://bucket/episodes.zarr.
        plot: PNG to draw: success by policy version, over the episodes.
        json: Print the result as one JSON object.
    """

    log: Annotated[str, tyro.conf.Positional]
    plot: Path | None = None
    json: bool = False

    def run(self) -> int:
        from rich.table import Table
        from rich.text import Text

        from sacflow_robot.data.log.reader import EpisodeLog
        from sacflow_robot.data.summary import (
            count_flags,
            count_sources,
            describe_rate,
            measured_rate,
            successes_by_version,
        )

        check_output(self.plot, "--plot", parents=False)
        if self.plot is not None:
            importlib.import_module("matplotlib")  # before everything is read
        log = EpisodeLog.open(self.log)
        episodes = list(log.episodes())
        rate = measured_rate(episodes)
        solved = sum(e.success for e in episodes)
        sources = count_sources(episodes)
        flags = count_flags(episodes)
        cut = sum(bool(e.info.get("interrupted")) for e in episodes)
        by_version = successes_by_version(episodes)
        lengths = [len(e) for e in episodes]
        robot = log.robot
        rows = {
            "robot": f"{robot.robot}, {robot.task}, {robot.controller}",
            "rate": describe_rate(rate, robot.control_rate_hz),
            "episodes": f"{len(episodes)}, success {common.describe_success(solved, len(episodes))}"
            if episodes
            else "0",
            "steps": f"{log.steps:,}" + (f" ({min(lengths)} to {max(lengths)} an episode)" if lengths else ""),
            "chosen by": ", ".join(f"{name} {n:,}" for name, n in sources.items()),
            "flags": ", ".join(f"{name} {n:,}" for name, n in flags.items() if n) or "none",
            "interrupted": f"{cut} episodes" if cut else "none",
            "policies": "\n".join(
                f"{version}: success {common.describe_success(sum(solved_by), len(solved_by))}"
                for version, solved_by in by_version.items()
            )
            or "none",
            "simulator states": "yes, episodes can be replayed"
            if any(e.states is not None for e in episodes)
            else "no",
            "observations": ", ".join(f"{a.key} {a.shape}" for a in robot.observations),
        }
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in rows.items():
            table.add_row(Text(name, "bold"), Text(value))
        common.results(self.json).print(table)
        if self.plot is not None:
            self._draw(self.plot, episodes, robot)
        if self.json:
            common.print_json(
                {
                    **common.success_json(solved, len(episodes)),
                    "steps": log.steps,
                    "rate": {"nominal_hz": robot.control_rate_hz, **rate},
                    "sources": sources,
                    "flags": flags,
                    "interrupted": cut,
                    "policies": sorted(by_version),
                    "by_policy": [
                        {"policy_version": version, **common.success_json(sum(solved_by), len(solved_by))}
                        for version, solved_by in by_version.items()
                    ],
                }
            )
        return 0

    def _draw(self, path: Path, episodes: list[Episode], robot: RobotSpec) -> None:
        from sacflow_robot.data.report import draw_versions

        if not episodes:
            raise UsageError(f"{self.log} holds no episode; leave out --plot")
        try:
            draw_versions(
                path, f"{Path(self.log).name}: {robot.robot}, {robot.task}, success by policy version", episodes
            )
        except (OSError, ValueError) as error:
            raise LogWriteError(f"cannot write {path}: {one_line(error)}; give another --plot") from None
        common.results(self.json).print(f"plot: {path}")


@dataclass(frozen=True)
class Verify:
    """Check everything in an episode log without changing it; exit status 1 if anything is wrong.

    Attributes:
        log: Episode log: a folder, or an address such as s3://bucket/episodes.zarr.
        json: Print the result as one JSON object.
    """

    log: Annotated[str, tyro.conf.Positional]
    json: bool = False

    def run(self) -> int:
        from sacflow_robot.data.log.repair import verify

        problems = verify(self.log)
        if problems:
            _print_problems(problems, "what is wrong", self.json)
            if not self.json:
                repair = common.command_line("log repair", self.log, "--out NEW")
                common.console().print(f"save what can be read with: {repair}")
        else:
            common.results(self.json).print(f"{self.log}: sound")
        if self.json:
            common.print_json({"sound": not problems, "problems": [asdict(p) for p in problems]})
        return 1 if problems else 0


@dataclass(frozen=True)
class Repair:
    """Save every episode that can still be read to a new log; the original is not touched.

    Attributes:
        log: Damaged episode log.
        out: The new log.
        json: Print the result as one JSON object.
    """

    log: Annotated[Path, tyro.conf.Positional]
    out: Path
    json: bool = False

    def run(self) -> int:
        from sacflow_robot.data.log.repair import repair

        check_output(self.out, folder=True)
        saved, lost = repair(self.log, self.out)
        if lost:
            _print_problems(lost, "what was wrong, or not saved", self.json)
        common.results(self.json).print(f"{saved} episodes saved to {self.out}; {self.log} is as it was")
        if self.json:
            common.print_json({"saved": saved, "problems": [asdict(p) for p in lost]})
        return 0


@dataclass(frozen=True)
class Copy:
    """Copy an episode log, each way between folders and object stores.

    Attributes:
        log: Episode log: a folder, or an address such as s3://bucket/episodes.zarr.
        out: Where to; nothing may be there yet.
        json: Print the result as one JSON object.
    """

    log: Annotated[str, tyro.conf.Positional]
    out: Annotated[str, tyro.conf.Positional]
    json: bool = False

    def run(self) -> int:
        from sacflow_robot.data.log.episode_writer import write_log
        from sacflow_robot.data.log.reader import EpisodeLog
        from sacflow_robot.data.log.remote import is_url

        if not is_url(self.out):
            check_output(Path(self.out), "OUT", folder=True)
        log = EpisodeLog.open(self.log)
        write_log(self.out, log.robot, log.episodes())
        common.results(self.json).print(f"{len(log)} episodes copied to {self.out}")
        if self.json:
            common.print_json({"episodes": len(log), "steps": log.steps})
        return 0


def _print_problems(problems: list[Problem], heading: str, as_json: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("where")
    table.add_column(heading)
    for problem in problems:
        table.add_row(Text(problem.where, "bold"), Text(problem.what))
    common.results(as_json).print(table)
