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
    from rich.table import Table

    from sacflow_robot.data.log.repair import Problem
    from sacflow_robot.spec import RobotSpec


@dataclass(frozen=True)
class _LogOptions(common.JsonOptions):
    """An episode log.

    Attributes:
        log: Episode log: a folder, or an address such as s3://bucket/episodes.zarr.
    """

    log: Annotated[str, tyro.conf.Positional]


@dataclass(frozen=True)
class Info(_LogOptions):
    """Print what an episode log holds; reading all of it also checks it.

    Attributes:
        plot: PNG to draw: success by policy version, over the episodes.
    """

    plot: Path | None = None

    def run(self) -> int:
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
        success = common.success_json(episodes)
        sources = count_sources(episodes)
        flags = count_flags(episodes)
        cut = sum(bool(e.info.get("interrupted")) for e in episodes)
        by_version = {v: common.success_json(solved) for v, solved in successes_by_version(episodes).items()}
        lengths = [len(e) for e in episodes]
        robot = log.robot
        rows = {
            "robot": f"{robot.robot}, {robot.task}, {robot.controller}",
            "rate": describe_rate(rate, robot.control_rate_hz),
            "episodes": f"{len(episodes)}, success {common.describe_success(success)}" if episodes else "0",
            "steps": f"{log.steps:,}" + (f" ({min(lengths)} to {max(lengths)} an episode)" if lengths else ""),
            "chosen by": ", ".join(f"{name} {n:,}" for name, n in sources.items()),
            "flags": ", ".join(f"{name} {n:,}" for name, n in flags.items() if n) or "none",
            "interrupted": f"{cut} episodes" if cut else "none",
            "policies": "\n".join(f"{v}: success {common.describe_success(s)}" for v, s in by_version.items())
            or "none",
            "simulator states": "yes, episodes can be replayed"
            if any(e.states is not None for e in episodes)
            else "no",
            "observations": ", ".join(f"{a.key} {a.shape}" for a in robot.observations),
        }
        self.say(common.facts(rows))
        if self.plot is not None:
            self._draw(self.plot, episodes, robot)
        return self.finish(
            {
                **success,
                "steps": log.steps,
                "rate": {"nominal_hz": robot.control_rate_hz, **rate},
                "sources": sources,
                "flags": flags,
                "interrupted": cut,
                "policies": sorted(by_version),
                "by_policy": [{"policy_version": version, **found} for version, found in by_version.items()],
            }
        )

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
        self.say(f"plot: {path}")


@dataclass(frozen=True)
class Verify(_LogOptions):
    """Check everything in an episode log without changing it; exit status 1 if anything is wrong."""

    def run(self) -> int:
        from sacflow_robot.data.log.repair import verify

        problems = verify(self.log)
        if problems:
            self.say(_problems(problems, "what is wrong"))
            if not self.json:
                repair = common.command_line("log repair", self.log, "--out NEW")
                common.console().print(f"save what can be read with: {repair}")
        else:
            self.say(f"{self.log}: sound")
        self.finish({"sound": not problems, "problems": [asdict(p) for p in problems]})
        return 1 if problems else 0


@dataclass(frozen=True)
class Repair(common.JsonOptions):
    """Save every episode that can still be read to a new log; the original is not touched.

    Attributes:
        log: Damaged episode log.
        out: The new log.
    """

    log: Annotated[Path, tyro.conf.Positional]
    out: Path

    def run(self) -> int:
        from sacflow_robot.data.log.repair import repair

        check_output(self.out, folder=True)
        saved, lost = repair(self.log, self.out)
        if lost:
            self.say(_problems(lost, "what was wrong, or not saved"))
        self.say(f"{saved} episodes saved to {self.out}; {self.log} is as it was")
        return self.finish({"saved": saved, "problems": [asdict(p) for p in lost]})


@dataclass(frozen=True)
class Copy(_LogOptions):
    """Copy an episode log, each way between folders and object stores.

    Attributes:
        out: Where to; nothing may be there yet.
    """

    out: Annotated[str, tyro.conf.Positional]

    def run(self) -> int:
        from sacflow_robot.data.log.episode_writer import write_log
        from sacflow_robot.data.log.reader import EpisodeLog
        from sacflow_robot.data.log.remote import is_url

        if not is_url(self.out):
            check_output(Path(self.out), "OUT", folder=True)
        log = EpisodeLog.open(self.log)
        write_log(self.out, log.robot, log.episodes())
        self.say(f"{len(log)} episodes copied to {self.out}")
        return self.finish({"episodes": len(log), "steps": log.steps})


def _problems(problems: list[Problem], heading: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("where", heading, box=None, pad_edge=False)
    for problem in problems:
        table.add_row(Text(problem.where, "bold"), Text(problem.what))
    return table
