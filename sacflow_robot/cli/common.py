"""Output, progress and options that several commands share."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sacflow_robot.episode import Episode
from sacflow_robot.errors import UsageError
from sacflow_robot.interfaces import Policy, VectorEnv
from sacflow_robot.spec import NO_ENVIRONMENT, RobotSpec
from sacflow_robot.utils.action_history import history_of as history_of
from sacflow_robot.utils.action_history import robot_with_history as robot_with_history
from sacflow_robot.utils.console import console as console
from sacflow_robot.utils.console import progress_bar as progress_bar
from sacflow_robot.utils.intervals import wilson_interval
from sacflow_robot.utils.seeding import EVAL_SEED as EVAL_SEED
from sacflow_robot.utils.seeding import RUN_SEED as RUN_SEED

if TYPE_CHECKING:
    from sacflow_robot.envs.environment import ActionFilter
    from sacflow_robot.learn.config import TrainConfig
    from sacflow_robot.serve.client import Keys


def results(as_json: bool = False) -> Console:
    """Console for results: stdout, or stderr with ``--json``, whose object is alone on stdout.

    Tables that are piped are as wide as their contents.
    """
    out = console(stderr=as_json)
    if not out.is_terminal:
        out.width = 10_000
    return out


@dataclass(frozen=True, kw_only=True)
class JsonOptions:
    """Option of commands that report figures.

    Attributes:
        json: Print the result as one JSON object.
    """

    json: bool = False

    def say(self, *parts: object) -> None:
        """Print results for people, each on lines of its own."""
        out = results(self.json)
        for part in parts:
            out.print(part)

    def finish(self, result: Mapping[str, Any]) -> int:
        """Print the result as JSON where the option says so; returns the exit status."""
        if self.json:
            print(json.dumps(result), flush=True)
        return 0


def table(rows: Sequence[Mapping[str, object]]) -> Table:
    """A table of rows of the same names: texts on the left, numbers on the right, columns never broken.

    A text that reads as a number is one.
    """
    made = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name, value in rows[0].items():
        words = name.replace("_us", " us").replace("_", " ")
        number = re.fullmatch(r"[\d,.]+(e[-+]\d+|%)?", str(value)) or not isinstance(value, str)
        made.add_column(words, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        made.add_row(*(value if isinstance(value, str) else f"{value:,}" for value in row.values()))
    return made


def facts(rows: Mapping[str, str]) -> Table:
    """A table of two columns: names, and what is known of them."""
    made = Table(show_header=False, box=None, pad_edge=False)
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows.items():
        made.add_row(Text(name, "bold"), Text(value))
    return made


def describe_success(found: Mapping[str, Any]) -> str:
    """``97/100 (97 %, 95 % interval 92 % to 99 %)``, of :func:`success_json`."""
    low, high = found["ci95"]
    share = f"{found['success_rate'] or 0:.0%}, 95 % interval {low:.0%} to {high:.0%}"
    return f"{found['successes']}/{found['episodes']} ({share})"


def success_json(episodes: Sequence[Episode | bool]) -> dict[str, Any]:
    """The figures that commands give of success, from episodes or from whether each was solved."""
    solved, count = sum(e if isinstance(e, bool) else e.success for e in episodes), len(episodes)
    rate = solved / count if count else None
    return {"episodes": count, "successes": solved, "success_rate": rate, "ci95": list(wilson_interval(solved, count))}


def evaluate_run(
    config: TrainConfig, path: Path, count: int, limiter: Callable[[], ActionFilter] | None = None
) -> list[Episode]:
    """Run a training run's policy file on the first seeds of ``sacflow-robot eval``."""
    from sacflow_robot.envs.collector import evaluation_envs
    from sacflow_robot.export.onnx_policy import OnnxPolicy

    policy = OnnxPolicy(path)
    with evaluation_envs(config.env, count, config.env_engine, config.action_history, limiter) as envs:
        return evaluate(policy, envs, range(EVAL_SEED, EVAL_SEED + count))


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


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """Options of commands that ask a policy server.

    Attributes:
        server: Address of the policy server.
        key: Secret key file of this client, where the server asks for keys.
        server_key: Public key file of the server, likewise.
    """

    server: str = "tcp://127.0.0.1:5555"
    key: Path | None = None
    server_key: Path | None = None

    @property
    def keys(self) -> Keys | None:
        """This client's keys; None where there are none."""
        from sacflow_robot.serve.client import Keys

        if (self.key is None) != (self.server_key is None):
            raise UsageError(
                "--key and --server-key go together: this client's secret key, and the server's public key"
            )
        return None if self.key is None or self.server_key is None else Keys(self.key, self.server_key)


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
