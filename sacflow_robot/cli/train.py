"""``sacflow-robot train`` and ``export``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from sacflow_robot import __version__
from sacflow_robot.cli import common
from sacflow_robot.cli.demo_source import Recorded, what_recorded
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, LogWriteError, UsageError
from sacflow_robot.interfaces import VectorEnv
from sacflow_robot.learn.config import TrainConfig, check_given, extended
from sacflow_robot.learn.presets import preset
from sacflow_robot.spec import NO_ENVIRONMENT, RobotSpec
from sacflow_robot.utils.action_history import robot_with_history, with_action_history

if TYPE_CHECKING:
    from sacflow_robot.data.formats.demonstrations import DemoOptions
    from sacflow_robot.envs.randomized_env import Draws
    from sacflow_robot.learn.run_folder import RunFolder
    from sacflow_robot.learn.trainer import Trainer


_FITTING_STEPS = 8000
"""Environment steps, unless told otherwise, in which a run is made to fit the robot of a profile."""

_CHANGEABLE = (
    "device", "threads", "compile", "precision", "replay-memory-gb", "learner.batch-size", "learner.best-of",
    "learner.policy-lr", "learner.critic-lr", "learner.max-grad-norm",
)  # fmt: skip
"""Options that a run may go on with other values of: what is saved has none of them in its shape."""


@dataclass(frozen=True)
class Train:
    """Train a flow policy offline to online, or from scratch, and export it.

    Attributes:
        full: Take the published sizes and budgets, meant for a GPU, as defaults.
        config: The run's configuration.
        out: Run folder to make; by default the first free runs/<env>-<velocity>-s<seed>.
        resume: Run folder to go on with; its own configuration then holds, and no option may say otherwise, but for where and
            how it is computed, batch size, best-of, step sizes and clipping, for a run that ended with an error, and for a
            larger total of --online-steps, which extends it. With --profile FILE
            a copy of it (--out) goes on in simulation for --online-steps more, on robots drawn around that profile: one policy is
            made to fit one measured robot. With --replay LOG a copy is fine-tuned on that log alone, without a simulator: no
            robot moves, no state is read (settings chosen on Lift).
        tune_updates: Updates for each step of the log when fine-tuning.
        json: Print one JSON object as the last line.
        unchanged: The run to resume goes on as what it is, and ``config`` is its own.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    out: Path | None = None
    resume: Path | None = None
    tune_updates: float = 0.25
    json: bool = False
    full: bool = False
    unchanged: Annotated[bool, tyro.conf.Suppress] = False

    @staticmethod
    def default(arguments: Sequence[str]) -> Train:
        """Defaults from the preset of the task, velocity and algorithm that the arguments name."""
        parser = common.OneLineParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--env", default=argparse.SUPPRESS)
        parser.add_argument("--velocity", default=argparse.SUPPRESS)
        parser.add_argument("--algo", default=argparse.SUPPRESS)
        parser.add_argument("--from-scratch", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
        parser.add_argument("--full", action=argparse.BooleanOptionalAction, default=False)
        parser.add_argument("--resume", type=Path)
        parser.add_argument("--json", action="store_true")
        parser.add_argument("--demos", nargs="+", action="append", default=[])
        parser.add_argument("--replay", nargs="+", action="append", default=[])
        parser.add_argument("--out", type=Path, default=argparse.SUPPRESS)
        parser.add_argument("--tune-updates", type=float, default=argparse.SUPPRESS)
        parser.add_argument("--profile", default="")
        parser.add_argument("--online-steps", type=int, default=argparse.SUPPRESS)
        for name in _CHANGEABLE:
            parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", dest=name, default=argparse.SUPPRESS)
        known, others = parser.parse_known_args([_spelled(argument) for argument in arguments])
        if known.resume is not None:
            _check_going_on(known, [o for o in others if o not in ("-h", "--help")])
        named = {name: getattr(known, name) for name in ("env", "velocity", "algo", "from_scratch") if name in known}
        if known.resume is not None:
            _check_same_run(known.resume, named, full=known.full)
        scratch = named.pop("from_scratch", None)
        found = Recorded() if known.resume is not None else what_recorded(_flat([*known.demos, *known.replay]))
        config = preset(**{"env": found.env or "lift", **named}, from_scratch=scratch, full=known.full)
        given = {a.split("=")[0].removeprefix("--").replace("_", "-").replace(".no-", ".") for a in arguments}
        check_given(config, given)
        if known.resume is not None and not known.profile and not known.replay:
            return Train(config=_own_config(known.resume), unchanged=True)
        if known.resume is not None and known.profile:
            config = replace(config, randomize="profile", profile=known.profile, online_steps=_FITTING_STEPS)
        return Train(config=replace(config, action_history=found.history))

    def run(self) -> int:
        from sacflow_robot.cli.go_on import copy_to_fit, fine_tune
        from sacflow_robot.envs.vector_env import core_count
        from sacflow_robot.learn.compile import pick_device
        from sacflow_robot.learn.progress import TrainingProgress
        from sacflow_robot.learn.run_folder import RunFolder
        from sacflow_robot.learn.trainer import Trainer
        from sacflow_robot.learn.training_guards import Interrupted, memory_is_explained

        if self.config.action_history and self.resume is None:
            common.console().print(f"the policy sees its last {self.config.action_history} actions")
        if self.resume is not None and self.config.replay and not self.unchanged:
            return fine_tune(self.resume, self.config.replay, self.tune_updates, self.out, as_json=self.json)
        began = time.monotonic()
        folder: RunFolder | None = None
        fitting = self.resume is not None and not self.unchanged
        if self.resume is not None:
            folder, config = (
                copy_to_fit(self.resume, self.config.profile, self.config.online_steps, self.out)
                if fitting
                else self._opened(self.resume)
            )
        else:
            config = self.config
            RunFolder.check_free(self.out)
        pick_device(config.device)
        robot = folder.robot if folder is not None else robot_without_environment(config)
        demos, logged = load_training_episodes(config, robot) if folder is None else ([], [])
        draws = training_draws(config)
        with (
            training_robots(config, config.num_envs, draws, robot) as envs,
            training_robots(config, max(1, min(core_count(), config.eval_episodes)), draws, robot) as eval_robots,
        ):
            if folder is None:
                folder = RunFolder.create(self.out, config, robot)
            common.console().print(f"run folder: {folder.path}")
            with TrainingProgress() as progress, memory_is_explained(config, folder):
                trainer = Trainer(config, folder, envs, eval_robots, progress)
                if self.resume is not None:
                    trainer.resume(same_robots=not fitting)
                else:
                    trainer.load(demos, logged)
                try:
                    trainer.run()
                except Interrupted:
                    progress.say(f"saved; go on with:\n  {common.command_line('train --resume', folder.path)}")
                    return 130
        return self._finish(trainer, folder, began)

    def _opened(self, path: Path) -> tuple[RunFolder, TrainConfig]:
        """The run to go on with, with what was said to change from now on."""
        from sacflow_robot.learn.run_folder import RunFolder

        folder, own = RunFolder.open(path)
        folder.claim()
        config = extended(replace(self.config, online_steps=own.online_steps), self.config.online_steps, path)
        if config != own:
            folder.write_config(config)
        return folder, config

    def _finish(self, trainer: Trainer, folder: RunFolder, began: float) -> int:
        from sacflow_robot.export.onnx_policy import OnnxPolicy

        config, out = trainer.config, common.results(self.json)
        difference = export_trainer(trainer, folder.policy)
        policy = OnnxPolicy(folder.policy)
        seeds = range(common.EVAL_SEED, common.EVAL_SEED + config.final_eval_episodes)
        final = []
        if seeds:
            with common.evaluation_robots(config.env, len(seeds), config.env_engine, config.action_history) as envs:
                final = common.evaluate_on([limited(each, config) for each in envs], policy, seeds)
        solved = sum(e.success for e in final)
        cloning = trainer.evaluations[0] if trainer.evaluations else None
        if cloning is not None and not config.from_scratch:
            out.print(f"cloning alone:  {common.describe_success(cloning.successes, cloning.episodes)}")
        mean_return = sum(float(e.rewards.sum()) for e in final) / len(final) if final else None
        if final:
            returned = f"return {mean_return:.4g} over {len(final)} episodes"
            out.print(
                f"final policy:   {returned if config.from_scratch else common.describe_success(solved, len(final))}"
            )
        if folder.curve.exists():
            out.print(f"curve:          {folder.curve}")
        out.print(f"policy:         {folder.policy} (differs from torch by {difference:.1e} at most)")
        common.console().print(f"serve it with:\n  {common.command_line('serve --policy', folder.policy)}")
        if config.env == NO_ENVIRONMENT:
            common.console().print(
                "not evaluated, because there is no environment; measure it on the robot with 'sacflow-robot run'"
            )
        if self.json:
            common.print_json(
                {
                    "run_dir": str(folder.path),
                    "policy": str(folder.policy),
                    "wall_s": round(trainer.earlier_wall_s + time.monotonic() - began, 1),
                    "env_steps": trainer.env_steps,
                    "success_rate": solved / len(final) if final else None,
                    "bc_success_rate": cloning.success_rate if cloning and not config.from_scratch else None,
                    "mean_return": mean_return,
                }
            )
        return 0


def limited(envs: VectorEnv, config: TrainConfig) -> VectorEnv:
    """The robots under the safety limits of the profile that the configuration names, if it does.

    Raises:
        UsageError: The profile has none, or the robot is not one that a safety filter knows.
        DataError: It cannot be read.
    """
    if config.safety is None:
        return envs
    from sacflow_robot.calibrate.profile import load_profile
    from sacflow_robot.envs.safety_wrapper import LimitedVectorEnv
    from sacflow_robot.robot.safety.filter import SafetyFilter

    profile = load_profile(Path(config.safety))
    if profile.safety is None:
        raise UsageError(f"--safety {config.safety}: the profile has no section 'safety'")
    limits = profile.safety_limits(envs.spec)
    return LimitedVectorEnv(envs, lambda: SafetyFilter(envs.spec, limits))


def training_draws(config: TrainConfig) -> Draws | None:
    """How the training robots are drawn; None for the nominal robot.

    Raises:
        UsageError, DataError: The profile cannot be used.
    """
    if config.randomize == "none":
        return None
    from sacflow_robot.calibrate.profile import load_profile
    from sacflow_robot.envs.randomized_env import Draws

    measured = load_profile(Path(config.profile)).measured if config.randomize == "profile" else {}
    return Draws(config.randomize, measured, history=config.action_history)


@contextmanager
def training_robots(
    config: TrainConfig, count: int, draws: Draws | None, robot: RobotSpec | None = None
) -> Iterator[VectorEnv]:
    """Robots that training or its evaluations move, drawn and limited as the configuration says.

    Without an environment none is moved, and they are the ``robot``.
    """
    from sacflow_robot.envs.registry import NoRobots

    if robot is not None:
        yield NoRobots(robot)
        return
    if draws is None:
        from sacflow_robot.envs.vector_env import make_vector_env

        with make_vector_env(config.env, count, config.env_engine, history=config.action_history) as made:
            yield limited(made, config)
        return
    from sacflow_robot.envs.randomized_env import RandomizedVectorEnv

    with RandomizedVectorEnv(config.env, count, draws) as drawn:
        yield limited(drawn, config)


def _spelled(argument: str) -> str:
    """An argument whose option, if it is one, is spelled with hyphens."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _flat(groups: Sequence[Sequence[str]]) -> list[str]:
    return [value for group in groups for value in group]


def _check_going_on(known: argparse.Namespace, others: Sequence[str]) -> None:
    """Refuse options beside ``--resume`` that the run, or what is to be done with it, leaves no room for.

    Raises:
        UsageError: There is one.
    """
    if known.replay and known.profile:
        raise UsageError(
            "--resume with both --profile and --replay; fit the run to the profile first, then fine-tune what comes of it"
        )
    copies = bool(known.replay or known.profile)
    takes = ["out"] * copies + ["tune_updates"] * bool(known.replay) + ["online_steps"] * (not known.replay)
    wrong = [
        f"--{n.replace('_', '-')}" for n in ("out", "tune_updates", "online_steps") if n in known and n not in takes
    ]
    wrong += [f"--demos {' '.join(_flat(known.demos))}"] * bool(known.demos)
    named = [*_CHANGEABLE] * copies
    wrong += [*others, *(f"--{n} {getattr(known, n)}" for n in named if n in known)]
    if wrong:
        raise UsageError(f"--resume goes on with the run's own configuration; leave out {' '.join(wrong)}")


def _own_config(path: Path) -> TrainConfig:
    """The configuration of a run folder.

    Raises:
        DataError: It is none.
    """
    from sacflow_robot.learn.run_folder import RunFolder

    return RunFolder.open(path)[1]


def _check_same_run(path: Path, named: Mapping[str, object], *, full: bool) -> None:
    """Refuse to resume a run under options that are not its own.

    Raises:
        UsageError: An option names something else than the run is of, or sizes for a run that has some.
    """
    if full:
        raise UsageError(f"--full sizes a new run, and {path} has its sizes; leave it out, or leave out --resume")
    own = _own_config(path) if named else None
    for name, value in named.items():
        theirs = getattr(own, name)
        if value == theirs:
            continue
        option, no = name.replace("_", "-"), "" if value else "no-"
        given, of = (
            (f"--{no}{option}", f"{option} {str(theirs).lower()}")
            if isinstance(value, bool)
            else (
                f"--{option} {value}",
                f"{option} {theirs}",
            )
        )
        raise UsageError(
            f"{given} with --resume {path}, a run of {of}; leave it out, or start a new run without --resume"
        )


def robot_without_environment(config: TrainConfig) -> RobotSpec | None:
    """The robot that demonstrations and logs are of, where there is no environment of it; else None.

    Raises:
        UsageError: They do not say which it is, or there are none.
        DataError: They cannot be read.
    """
    from sacflow_robot.cli import demo_source
    from sacflow_robot.envs.registry import why_no_environment

    if config.env != NO_ENVIRONMENT:
        return None
    sources = [source for source in (config.demos, *config.replay) if source != "none"]
    robot = demo_source.recorded_robot(sources, config.rate)
    common.console().print(
        f"robot: {robot.robot}, {robot.task}; no environment of it is known here, so that nothing is evaluated "
        f"({why_no_environment(robot)})"
    )
    return robot_with_history(robot, config.action_history)


def load_training_episodes(config: TrainConfig, robot: RobotSpec | None = None) -> tuple[list[Episode], list[Episode]]:
    """Everything that ``--demos`` names, and everything that ``--replay`` does.

    Args:
        config: The run's configuration.
        robot: The robot of a run without an environment.

    Raises:
        UsageError: They name nothing.
        DataError: Something cannot be read or does not fit.
    """
    from sacflow_robot.cli import demo_source
    from sacflow_robot.data.formats.sources import load_demos, with_recorded_history
    from sacflow_robot.data.robomimic_download import parse_name

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
        common.console().print(
            f"read {len(found)} episodes ({solved} successful, {steps:,} steps) from {path}{assumed}"
        )
        return found

    chosen = load(demos, options) if demos else []
    whole = replace(options, agreement=replace(config, filter_key=None))  # a subset is one of the demonstrations
    return chosen, [episode for path in config.replay for episode in load(path, whole)]


def check_seeds(episodes: Sequence[Episode], config: TrainConfig, path: Path | str) -> None:
    """Refuse episodes that began where evaluation begins: their success would be no evidence.

    Raises:
        DataError: An episode's seed is one that this run evaluates on.
    """
    from sacflow_robot.learn.trainer import CURVE_SEED

    evaluated = {
        *range(common.EVAL_SEED, common.EVAL_SEED + config.final_eval_episodes),
        *range(CURVE_SEED, CURVE_SEED + config.eval_episodes),
    }
    for i, episode in enumerate(episodes):
        if episode.info.get("seed") in evaluated:
            raise DataError(
                f"{path}, episode {i}, has seed {episode.info['seed']}, on which this run evaluates; log episodes to "
                f"learn from with other seeds, as 'run' and 'demos collect' do by default"
            )


def _cached_demos(config: TrainConfig) -> Path:
    from sacflow_robot.data.log.episode_writer import write_log
    from sacflow_robot.envs.tasks import get_robot
    from sacflow_robot.learn.trainer import TRAINING_SEED

    if config.demo_episodes < 1:
        raise UsageError("--demo-episodes is 0; it must be at least 1, or give --demos none and --replay LOG")
    path = common.demo_cache(config.env, config.demo_quality, config.demo_episodes, config.env_engine)
    if not path.exists():
        common.console().print(f"collecting {config.demo_episodes} demonstrations, once; they are kept in {path}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"cannot make the cache folder {path.parent}: {error.strerror}; set SACFLOW_ROBOT_CACHE"
            ) from None
        episodes = common.collect_demos(
            config.env, config.demo_quality, config.demo_episodes, TRAINING_SEED, config.env_engine
        )
        try:
            write_log(path, get_robot(config.env), episodes)
        except (LogWriteError, UsageError):
            if not path.exists():  # else another run collected the same episodes meanwhile
                raise
    return path


def export_trainer(trainer: Trainer, path: Path) -> float:
    """Export the policy that a trainer ended with; see ``export_policy``."""
    from sacflow_robot.export.to_onnx import export_agent

    return export_agent(trainer.agent, export_notes(trainer.config, trainer.offline_steps, trainer.env_steps), path)


def export_notes(config: TrainConfig, offline_steps: int, online_steps: int) -> dict[str, object]:
    """How a policy was made, for its specification."""
    return {
        "algo": config.algo,
        "seed": config.seed,
        "offline_steps": offline_steps,
        "online_steps": online_steps,
        "made_by": f"sacflow-robot {__version__}",
    }
