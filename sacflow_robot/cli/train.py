"""``sacflow-robot train`` and ``export``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from sacflow_robot.cli import common
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, UsageError
from sacflow_robot.learn.config import TrainConfig, preset

if TYPE_CHECKING:
    from sacflow_robot.learn.run_folder import RunFolder
    from sacflow_robot.learn.train import Trainer


@dataclass(frozen=True)
class Train:
    """Train a flow policy offline to online, and export it.

    Attributes:
        config: The run's configuration.
        out: Run folder to make; by default the first free runs/<env>-<velocity>-s<seed>.
        resume: Run folder to go on with; its own configuration then holds, and no other option but --json.
        json: Print one JSON object as the last line.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    out: Path | None = None
    resume: Path | None = None
    json: bool = False

    @staticmethod
    def default(arguments: Sequence[str]) -> Train:
        """Defaults from the preset of the task and velocity that the arguments name."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--env", default="lift")
        parser.add_argument("--velocity", default="flow-g")
        known, _ = parser.parse_known_args(list(arguments))
        return Train(config=preset(known.env, known.velocity))

    def run(self) -> int:
        from sacflow_robot.envs.workers import ArmPool, core_count
        from sacflow_robot.learn.progress import TrainingProgress
        from sacflow_robot.learn.run_folder import RunFolder
        from sacflow_robot.learn.train import Interrupted, Trainer

        began = time.monotonic()
        out = common.console()
        if self.resume is not None:
            folder, config = RunFolder.open(self.resume)
            episodes = None
        else:
            config = self.config
            episodes = load_training_episodes(config)
            folder = RunFolder.create(self.out, config)
        out.print(f"run folder: {folder.path}")
        with (
            ArmPool(config.env, config.arms) as arms,
            ArmPool(config.env, max(1, min(core_count(), config.eval_episodes))) as eval_arms,
            TrainingProgress() as progress,
        ):
            trainer = Trainer(config, folder, arms, eval_arms, progress)
            if episodes is None:
                trainer.resume()
            else:
                trainer.load(episodes)
            try:
                trainer.run()
            except Interrupted:
                progress.say(f"saved; go on with:\n  {common.command_line('train --resume', folder.path)}")
                return 130
        return self._finish(trainer, folder, began)

    def _finish(self, trainer: Trainer, folder: RunFolder, began: float) -> int:
        from sacflow_robot.serve.policy import OnnxPolicy

        config, out = trainer.config, common.console()
        difference = export_trainer(trainer, folder.policy)
        policy = OnnxPolicy(folder.policy)
        seeds = range(common.EVAL_SEED, common.EVAL_SEED + config.final_eval_episodes)
        final = common.evaluate(policy, config.env, seeds)
        solved = sum(e.success for e in final)
        cloning = trainer.evaluations[0] if trainer.evaluations else None
        if cloning is not None:
            out.print(f"cloning alone:  {common.describe_success(cloning.successes, cloning.episodes)}")
        if final:
            out.print(f"final policy:   {common.describe_success(solved, len(final))}")
        out.print(f"curve:          {folder.curve}")
        out.print(f"policy:         {folder.policy} (differs from torch by {difference:.1e} at most)")
        out.print(f"serve it with:\n  {common.command_line('serve --policy', folder.policy)}")
        if self.json:
            common.print_json(
                {
                    "run_dir": str(folder.path),
                    "policy": str(folder.policy),
                    "wall_s": round(time.monotonic() - began, 1),
                    "env_steps": trainer.env_steps,
                    "success_rate": solved / len(final) if final else None,
                    "bc_success_rate": cloning.success_rate if cloning else None,
                }
            )
        return 0


@dataclass(frozen=True)
class Export:
    """Export the policy of a run folder, as of its last checkpoint.

    Attributes:
        run_dir: Run folder.
        out: ONNX file to write; by default <env>.onnx in the run folder.
    """

    run_dir: Annotated[Path, tyro.conf.Positional]
    out: Path | None = None

    def run(self) -> int:
        from sacflow_robot.envs.tasks import get_task
        from sacflow_robot.learn.agent import Agent
        from sacflow_robot.learn.export import export_policy, make_spec
        from sacflow_robot.learn.run_folder import RunFolder
        from sacflow_robot.learn.train import pick_device

        folder, config = RunFolder.open(self.run_dir)
        arm = get_task(config.env).arm
        agent = Agent(arm, config, pick_device("cpu"))
        state = folder.load_checkpoint()
        agent.load_state_dict(state["agent"])
        notes = export_notes(config, state["progress"])
        path = self.out or folder.policy
        difference = export_policy(
            agent.average_policy, make_spec(agent.average_policy, arm, config.velocity, notes), path
        )
        common.console().print(f"wrote {path} (differs from torch by {difference:.1e} at most)")
        return 0


def load_training_episodes(config: TrainConfig) -> list[Episode]:
    """Everything that ``--demos`` and ``--replay`` name.

    Raises:
        UsageError: They name nothing.
        DataError: Something cannot be read or does not fit.
    """
    from sacflow_robot.data.hdf5 import Hdf5Options
    from sacflow_robot.data.sources import load_episodes
    from sacflow_robot.envs.robosuite_env import RobosuiteEnv
    from sacflow_robot.envs.tasks import get_task

    task = get_task(config.env)
    env: RobosuiteEnv | None = None

    def observe(state):  # type: ignore[no-untyped-def]
        nonlocal env
        env = env or RobosuiteEnv(task.name)
        return env.observe_state(state)

    options = Hdf5Options(task.arm, task.robosuite_name, observe, config.trim_idle)
    paths = list(config.replay)
    if config.demos == "auto":
        paths.insert(0, _cached_demos(config))
    elif config.demos != "none":
        paths.insert(0, Path(config.demos))
    if not paths:
        raise UsageError("nothing to learn from: --demos none needs at least one --replay LOG")
    episodes = []
    for path in paths:
        found = load_episodes(path, options)
        solved, steps = sum(e.success for e in found), sum(map(len, found))
        common.console().print(f"read {len(found)} episodes ({solved} successful, {steps:,} steps) from {path}")
        episodes += found
    return episodes


def _cached_demos(config: TrainConfig) -> Path:
    from sacflow_robot.data.log import write_log
    from sacflow_robot.envs.tasks import get_task
    from sacflow_robot.learn.train import TRAINING_SEED

    if config.demo_episodes < 1:
        raise UsageError("--demo-episodes is 0; it must be at least 1, or give --demos none and --replay LOG")
    path = common.demo_cache(config.env, config.demo_episodes)
    if not path.exists():
        common.console().print(f"collecting {config.demo_episodes} demonstrations, once; they are kept in {path}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"cannot make the cache folder {path.parent}: {error.strerror}; set SACFLOW_ROBOT_CACHE"
            ) from None
        write_log(path, get_task(config.env).arm, common.collect_demos(config.env, config.demo_episodes, TRAINING_SEED))
    return path


def export_trainer(trainer: Trainer, path: Path) -> float:
    """Export the policy that a trainer ended with; see ``export_policy``."""
    import json

    from sacflow_robot.learn.export import export_policy, make_spec

    config, policy = trainer.config, trainer.agent.average_policy
    progress = json.dumps({"offline_steps": trainer.offline_steps, "env_steps": trainer.env_steps})
    spec = make_spec(policy, trainer.agent.arm, config.velocity, export_notes(config, progress))
    return export_policy(policy, spec, path)


def export_notes(config: TrainConfig, progress: str) -> dict[str, object]:
    """How a policy was made, for its specification; ``progress`` is the JSON of a checkpoint."""
    import json

    from sacflow_robot import __version__

    done = json.loads(progress)
    return {
        "algo": config.algo,
        "seed": config.seed,
        "offline_steps": done["offline_steps"],
        "online_steps": done["env_steps"],
        "made_by": f"sacflow-robot {__version__}",
    }
