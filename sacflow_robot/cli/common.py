"""Output, progress and options that several commands share."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from sacflow_robot.episode import Episode
from sacflow_robot.errors import UsageError
from sacflow_robot.interfaces import Policy, VectorEnv
from sacflow_robot.spec import NO_ENVIRONMENT, Engine, RobotSpec
from sacflow_robot.utils.action_history import history_of as history_of
from sacflow_robot.utils.action_history import robot_with_history as robot_with_history
from sacflow_robot.utils.atomic_files import write_text
from sacflow_robot.utils.caches import cache_root as cache_root
from sacflow_robot.utils.intervals import wilson_interval

if TYPE_CHECKING:
    from sacflow_robot.envs.experts.demonstrator_style import Quality
    from sacflow_robot.serve.client import Keys

EVAL_SEED, RUN_SEED = 10_000, 30_000
"""First seeds of ``eval`` and ``run``. They differ because runs are logged and learned from; the curve's evaluations
begin at 20 000, demonstrations and training at 1 000 000."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def console(stderr: bool = True) -> Console:
    """Console for progress and remarks: stderr. Lines are not broken, so that paths can be copied."""
    return Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)


def results(as_json: bool = False) -> Console:
    """Console for results: stdout, or stderr with ``--json``, whose object is alone on stdout.

    Tables that are piped are as wide as their contents.
    """
    out = console(stderr=as_json)
    if not out.is_terminal:
        out.width = 10_000
    return out


def print_json(data: dict[str, Any]) -> None:
    """One JSON object on one line of stdout."""
    print(json.dumps(data), flush=True)


@dataclass(frozen=True)
class ResultOptions:
    """Options of commands that measure.

    Attributes:
        json: Print the result as one JSON object.
        out: JSON file to write the result to as well.
    """

    json: bool = False
    out: Path | None = None

    def finish(self, result: dict[str, Any]) -> int:
        """Write the result and print it, as the options say; returns the exit status."""
        if self.out is not None:
            write_text(self.out, json.dumps(result) + "\n")
        if self.json:
            print_json(result)
        return 0


def table(rows: Sequence[Mapping[str, object]]) -> Table:
    """A table of rows of the same names: texts on the left, numbers on the right, columns never broken."""
    made = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name, value in rows[0].items():
        words = name.replace("_us", " us").replace("_", " ")
        made.add_column(words, justify="left" if isinstance(value, str) else "right", no_wrap=True)
    for row in rows:
        made.add_row(*(value if isinstance(value, str) else f"{value:,}" for value in row.values()))
    return made


def progress_bar(noun: str) -> Progress:
    """A bar that counts ``noun``, with a success rate in ``{task.fields[success]}``."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn(noun),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[success]}"),
        console=console(),
    )


def transfer_bar() -> Progress:
    """A bar for a download."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=console(),
    )


def describe_success(successes: int, episodes: int) -> str:
    """``97/100 (97 %, 95 % interval 92 % to 99 %)``."""
    low, high = wilson_interval(successes, episodes)
    return f"{successes}/{episodes} ({successes / max(episodes, 1):.0%}, 95 % interval {low:.0%} to {high:.0%})"


def success_json(successes: int, episodes: int) -> dict[str, Any]:
    low, high = wilson_interval(successes, episodes)
    return {
        "episodes": episodes,
        "successes": successes,
        "success_rate": successes / episodes if episodes else None,
        "ci95": [low, high],
    }


def evaluate(
    policy: Policy, task: str, seeds: Iterable[int], engine: Engine = "compiled", history: int = 0
) -> list[Episode]:
    """Run a policy on all cores, one episode per seed, with a progress bar."""
    wanted = list(seeds)
    if not wanted:
        return []
    with evaluation_robots(task, len(wanted), engine, history) as envs:
        return evaluate_on(envs, policy, wanted)


@contextmanager
def evaluation_robots(task: str, episodes: int, engine: Engine, history: int = 0) -> Iterator[list[VectorEnv]]:
    """Robots enough for all cores, each by itself, so that no episode depends on another even in the last bit."""
    from sacflow_robot.envs.vector_env import core_count, make_vector_env

    with ExitStack() as stack:
        envs: list[VectorEnv] = []
        for _ in range(min(episodes, core_count())):
            envs.append(make_vector_env(task, 1, engine, background=False, history=history))
            stack.callback(envs[-1].close)
        yield envs


def evaluate_on(envs: Sequence[VectorEnv], policy: Policy, seeds: Sequence[int]) -> list[Episode]:
    """Run a policy, one episode per seed, with a progress bar."""
    from sacflow_robot.envs.collector import rollout

    episodes: list[Episode] = []
    with progress_bar("episodes") as bar:
        row = bar.add_task("evaluating", total=len(seeds), success="")
        for episode in rollout(envs, policy.spec.noise_shape, policy.infer, seeds):
            episodes.append(episode)
            solved = sum(e.success for e in episodes)
            bar.update(row, advance=1, success=f"success {solved / len(episodes):.0%}")
    return episodes


def collect_demos(
    task: str, quality: Quality, count: int, first_seed: int, engine: Engine = "compiled"
) -> list[Episode]:
    """Demonstrations of the scripted expert, collected on all cores with a progress bar."""
    from sacflow_robot.envs.vector_env import collect, core_count

    with progress_bar("episodes") as bar:
        row = bar.add_task("collecting", total=count, success="")
        solved = 0

        def show(episode: Episode) -> None:
            nonlocal solved
            solved += episode.success
            bar.update(row, advance=1)
            bar.update(row, success=f"success {solved / bar.tasks[0].completed:.0%}")

        seeds = range(first_seed, first_seed + count)
        return collect(task, quality, seeds, min(core_count(), max(count, 1)), show, engine)


def demo_cache(task: str, quality: Quality, count: int, engine: Engine = "compiled") -> Path:
    """Where ``train`` keeps the demonstrations that it collects itself.

    The name holds a digest of the experts and the environment: another version of them does not reuse old episodes.
    """
    from sacflow_robot.envs import experts, robosuite_env, tasks
    from sacflow_robot.envs import fast as compiled

    digest = hashlib.sha256()
    modules = sorted(Path(str(experts.__file__)).parent.glob("*.py"))
    if engine == "compiled":
        modules += sorted(Path(str(compiled.__file__)).parent.glob("*.py"))
    for module in (*modules, Path(str(robosuite_env.__file__)), Path(str(tasks.__file__))):
        digest.update(module.read_bytes())
    return cache_root() / "demos" / f"{task}-{quality}-{count}-{digest.hexdigest()[:10]}.zarr"


def client_keys(own: Path | None, server: Path | None) -> Keys | None:
    """Keys of a client, from its options --key and --server-key; None where there are neither.

    Raises:
        UsageError: Only one is given.
    """
    from sacflow_robot.serve.client import Keys

    if (own is None) != (server is None):
        raise UsageError("--key and --server-key go together: this client's secret key, and the server's public key")
    return None if own is None or server is None else Keys(own, server)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table as lines, columns of one width; never broken, whatever the terminal's width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def train_hint(robot: RobotSpec, log: object) -> str:
    """The command that learns from a log of this robot, and from nothing else."""
    from sacflow_robot.envs.registry import environment_of

    env, history = environment_of(robot), history_of(robot)
    words = [] if env == NO_ENVIRONMENT else ["--env", env, "--demos none"]
    return command_line("train", *words, *(["--action-history", history] if history else []), "--replay", log)


def replay_hint(spec: RobotSpec, log: object, driver: str) -> str:
    """The command that replays a log's first episode, on the robot that it is of."""
    from sacflow_robot.envs.registry import environment_of

    robot = ["--robot", shlex.quote(driver)] if environment_of(spec) == NO_ENVIRONMENT else []
    return command_line("replay", log, "--episode 0", *robot)


def robot_hint(robot: RobotSpec) -> str:
    """What to give ``run --robot`` for this robot: the simulated one, or a place to put the driver's name in."""
    from sacflow_robot.envs.registry import environment_of

    env, history = environment_of(robot), history_of(robot)
    options = f"?history={history}" if history else ""
    return "DRIVER:..." + options if env == NO_ENVIRONMENT else shlex.quote(f"sim:{env}{options}")


def command_line(*words: object) -> str:
    """A command to show to the user, with this program's name."""
    return " ".join(["sacflow-robot", *map(str, words)])
