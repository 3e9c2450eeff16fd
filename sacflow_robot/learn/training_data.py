"""Episodes that a run begins with: demonstrations and logs, read, checked and, where none are given, collected."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sacflow_robot.data.formats.demonstrations import DemoOptions
from sacflow_robot.data.formats.sources import load_demos, with_recorded_history
from sacflow_robot.data.log.episode_writer import write_log
from sacflow_robot.data.robomimic_download import parse_name
from sacflow_robot.envs.demonstrations import collect
from sacflow_robot.envs.registry import get_robot, why_no_environment
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, LogWriteError, UsageError
from sacflow_robot.learn import demo_source
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.spec import NO_ENVIRONMENT, Engine, RobotSpec
from sacflow_robot.utils.action_history import robot_with_history, with_action_history
from sacflow_robot.utils.caches import cache_root
from sacflow_robot.utils.console import console, progress_bar
from sacflow_robot.utils.processes import core_count
from sacflow_robot.utils.seeding import CURVE_SEED, EVAL_SEED, TRAINING_SEED

if TYPE_CHECKING:
    from sacflow_robot.envs.experts.primitives import Quality


def robot_without_environment(config: TrainConfig) -> RobotSpec | None:
    """The robot of demonstrations and logs that no environment is known of; else None.

    Raises:
        UsageError: They do not say which it is, or there are none.
        DataError: They cannot be read.
    """
    if config.env != NO_ENVIRONMENT:
        return None
    sources = [source for source in (config.demos, *config.replay) if source != "none"]
    robot = demo_source.recorded_robot(sources, config.rate)
    console().print(
        f"robot: {robot.robot}, {robot.task}; no environment of it is known here, so that nothing is evaluated "
        f"({why_no_environment(robot)})"
    )
    return robot_with_history(robot, config.action_history)


def load_training_episodes(config: TrainConfig, robot: RobotSpec | None = None) -> tuple[list[Episode], list[Episode]]:
    """Read the demonstrations (``--demos``) and the logs (``--replay``) that a configuration names.

    Args:
        config: The run's configuration.
        robot: The robot of a run without an environment.

    Raises:
        UsageError: They name nothing.
        DataError: Something cannot be read or does not fit.
    """
    options = demo_source.options_for(config.env, config.trim_idle, config, robot)
    demos: Path | str | None = None
    if config.demos == "auto":
        demos = _cached_demos(config)
    elif config.demos != "none":
        named = parse_name(config.demos)
        if named is not None and named[0] != config.env:
            raise UsageError(f"--demos {config.demos} are of another task than --env {config.env}")
        demos = demo_source.locate(config.demos)
    if config.from_scratch:
        return [], []
    if demos is None and not config.replay:
        raise UsageError("nothing to learn from: --demos none needs at least one --replay LOG, or --from-scratch")

    def load(path: Path | str, options: DemoOptions) -> list[Episode]:
        read = load_demos(path, with_recorded_history(options, path))
        found = [with_action_history(e, config.action_history) for e in read.episodes]
        check_seeds(found, config, path)
        solved, steps = sum(e.success for e in found), sum(map(len, found))
        assumed = f", where: {'; '.join(read.losses.remarks)}" if read.losses.remarks else ""
        console().print(f"read {len(found)} episodes ({solved} successful, {steps:,} steps) from {path}{assumed}")
        return found

    chosen = load(demos, options) if demos else []
    whole = replace(options, agreement=replace(config, filter_key=None))  # a subset is one of the demonstrations
    return chosen, [episode for path in config.replay for episode in load(path, whole)]


def check_seeds(episodes: Sequence[Episode], config: TrainConfig, path: Path | str) -> None:
    """Refuse episodes that began where evaluation begins: their success would be no evidence.

    Raises:
        DataError: An episode's seed is one that this run evaluates on.
    """
    evaluated = {
        *range(EVAL_SEED, EVAL_SEED + config.final_eval_episodes),
        *range(CURVE_SEED, CURVE_SEED + config.eval_episodes),
    }
    for i, episode in enumerate(episodes):
        if episode.info.get("seed") in evaluated:
            raise DataError(
                f"{path}, episode {i}, has seed {episode.info['seed']}, on which this run evaluates; log episodes to "
                f"learn from with other seeds, as 'run' and 'demos collect' do by default"
            )


def _cached_demos(config: TrainConfig) -> Path:
    if config.demo_episodes < 1:
        raise UsageError("--demo-episodes is 0; it must be at least 1, or give --demos none and --replay LOG")
    path = demo_cache(config.env, config.demo_quality, config.demo_episodes, config.env_engine)
    if not path.exists():
        console().print(f"collecting {config.demo_episodes} demonstrations, once; they are kept in {path}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"cannot make the cache folder {path.parent}: {error.strerror}; set SACFLOW_ROBOT_CACHE"
            ) from None
        episodes = collect_demos(
            config.env, config.demo_quality, config.demo_episodes, TRAINING_SEED, config.env_engine
        )
        try:
            write_log(path, get_robot(config.env), episodes)
        except (LogWriteError, UsageError):
            if not path.exists():  # else another run collected the same episodes meanwhile
                raise
    return path


def collect_demos(
    task: str, quality: Quality, count: int, first_seed: int, engine: Engine = "compiled"
) -> list[Episode]:
    """Demonstrations of the scripted expert, collected on all cores with a progress bar."""
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
    """Path at which ``train`` keeps the demonstrations that it collects itself.

    The name holds a digest of the experts and the environment: another version of them does not reuse old episodes.
    """
    from sacflow_robot.envs import experts, fast, robosuite_env, tasks  # they import the simulator

    digest = hashlib.sha256()
    modules = sorted(Path(str(experts.__file__)).parent.glob("*.py"))
    if engine == "compiled":
        modules += sorted(Path(str(fast.__file__)).parent.glob("*.py"))
    for module in (*modules, Path(str(robosuite_env.__file__)), Path(str(tasks.__file__))):
        digest.update(module.read_bytes())
    return cache_root() / "demos" / f"{task}-{quality}-{count}-{digest.hexdigest()[:10]}.zarr"
