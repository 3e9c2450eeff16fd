"""Output, progress and options that several commands share."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sacflow_robot.episode import Episode
from sacflow_robot.errors import UsageError
from sacflow_robot.interfaces import Policy, VectorEnv
from sacflow_robot.spec import NO_ENVIRONMENT, RobotSpec
from sacflow_robot.utils.action_history import history_of as history_of
from sacflow_robot.utils.action_history import robot_with_history as robot_with_history
from sacflow_robot.utils.atomic_files import write_text
from sacflow_robot.utils.console import console as console
from sacflow_robot.utils.console import progress_bar as progress_bar
from sacflow_robot.utils.intervals import wilson_interval
from sacflow_robot.utils.seeding import EVAL_SEED as EVAL_SEED
from sacflow_robot.utils.seeding import RUN_SEED as RUN_SEED

if TYPE_CHECKING:
    from sacflow_robot.serve.client import Keys


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


def evaluate(policy: Policy, envs: Sequence[VectorEnv], seeds: Sequence[int]) -> list[Episode]:
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
    """Value of ``run --robot`` for this robot: the simulated one, or a place to put the driver's name in."""
    from sacflow_robot.envs.registry import environment_of

    env, history = environment_of(robot), history_of(robot)
    options = f"?history={history}" if history else ""
    return "DRIVER:..." + options if env == NO_ENVIRONMENT else shlex.quote(f"sim:{env}{options}")


def command_line(*words: object) -> str:
    """A command to show to the user, with this program's name."""
    return " ".join(["sacflow-robot", *map(str, words)])
