"""``sacflow-robot train``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from sacflow_robot.cli import common
from sacflow_robot.errors import UsageError
from sacflow_robot.learn.config import TrainConfig, check_given, extended
from sacflow_robot.learn.presets import preset
from sacflow_robot.spec import NO_ENVIRONMENT

if TYPE_CHECKING:
    from sacflow_robot.learn.run_folder import RunFolder
    from sacflow_robot.learn.trainer import Trainer


@dataclass(frozen=True)
class Train:
    """Train a flow policy offline to online, or from scratch, and export it.

    Attributes:
        full: Take the published sizes and budgets, meant for a GPU, as defaults.
        config: The run's configuration.
        out: Run folder to make; by default the first free runs/<env>-<velocity>-s<seed>.
        resume: Run folder to go on with; with --profile or --replay a copy of it is fitted to one robot (docs/learning.md).
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
        given = options_given(arguments)
        resume = Path(given["resume"][0]) if "resume" in given else None
        if resume is not None:
            from sacflow_robot.learn.finetune import check_resumed

            check_resumed(resume, given)
        env, history = None, 0
        if resume is None:
            from sacflow_robot.learn.demo_source import what_recorded

            env, history = what_recorded([*given.get("demos", ()), *given.get("replay", ())])
        named = {name: given[name][0] for name in ("env", "velocity", "algo") if name in given}
        scratch = True if "from-scratch" in given else False if "no-from-scratch" in given else None
        config = preset(**{"env": env or "lift", **named}, from_scratch=scratch, full="full" in given)
        check_given(config, {name.replace(".no-", ".") for name in given})
        if resume is not None and "profile" in given:
            from sacflow_robot.learn.finetune import FITTING_STEPS

            profile = given["profile"][0]
            config = replace(config, randomize="profile", profile=profile, online_steps=FITTING_STEPS)
        elif resume is not None and "replay" not in given:
            from sacflow_robot.learn.run_folder import RunFolder

            return Train(config=RunFolder.open(resume)[1], unchanged=True)
        return Train(config=replace(config, action_history=history))

    def run(self) -> int:
        if self.resume is not None and self.config.replay and not self.unchanged:
            return self._fine_tune(self.resume)
        from sacflow_robot.learn.compile import pick_device
        from sacflow_robot.learn.finetune import copy_to_fit
        from sacflow_robot.learn.progress import TrainingProgress
        from sacflow_robot.learn.run_folder import RunFolder
        from sacflow_robot.learn.trainer import Trainer
        from sacflow_robot.learn.training_data import load_training_episodes, robot_without_environment
        from sacflow_robot.learn.training_envs import training_envs
        from sacflow_robot.learn.training_guards import Interrupted, memory_is_explained

        began = time.monotonic()
        folder: RunFolder | None = None
        config = self.config
        if self.resume is None:
            if config.action_history:
                common.console().print(f"the policy sees its last {config.action_history} actions")
            RunFolder.check_free(self.out)
        elif self.unchanged:
            folder, config = self._opened(self.resume)
        else:
            folder, config = copy_to_fit(self.resume, config.profile, config.online_steps, self.out)
        pick_device(config.device)
        robot = folder.robot if folder is not None else robot_without_environment(config)
        demos, logged = load_training_episodes(config, robot) if folder is None else ([], [])
        with training_envs(config, robot) as (envs, eval_envs):
            if folder is None:
                folder = RunFolder.create(self.out, config, robot)
            common.console().print(f"run folder: {folder.path}")
            with TrainingProgress() as progress, memory_is_explained(config, folder):
                trainer = Trainer(config, folder, envs, eval_envs, progress)
                if self.resume is not None:
                    trainer.resume(same_robots=self.unchanged)
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

    def _fine_tune(self, run: Path) -> int:
        from sacflow_robot.learn.finetune import fine_tune
        from sacflow_robot.learn.training_guards import Interrupted

        try:
            folder, learner = fine_tune(run, self.config.replay, self.tune_updates, self.out)
        except Interrupted:
            common.console().print(f"stopped; no copy of {run} was made, and it is as it was")
            return 130
        common.results(self.json).print(f"fine-tuned run: {folder.path}\npolicy:         {folder.policy}")
        if self.json:
            figures = {"env_steps": learner.trainer.env_steps, "updates": learner.trainer.agent.updates}
            common.print_json({"run_dir": str(folder.path), "policy": str(folder.policy), **figures})
        return 0

    def _finish(self, trainer: Trainer, folder: RunFolder, began: float) -> int:
        from sacflow_robot.envs.collector import evaluation_envs
        from sacflow_robot.export.onnx_policy import OnnxPolicy
        from sacflow_robot.learn.trained_run import export_agent, export_notes
        from sacflow_robot.learn.training_envs import training_limiter

        config, out = trainer.config, common.results(self.json)
        notes = export_notes(config, trainer.done.offline_steps, trainer.env_steps)
        difference = export_agent(trainer.agent, notes, folder.policy)
        policy = OnnxPolicy(folder.policy)
        seeds = range(common.EVAL_SEED, common.EVAL_SEED + config.final_eval_episodes)
        final = []
        if seeds:
            limiter = training_limiter(config)
            with evaluation_envs(config.env, len(seeds), config.env_engine, config.action_history, limiter) as envs:
                final = common.evaluate(policy, envs, seeds)
        solved = sum(e.success for e in final)
        cloning = trainer.done.evaluations[0] if trainer.done.evaluations else None
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
                    "wall_s": round(trainer.done.wall_s + time.monotonic() - began, 1),
                    "env_steps": trainer.env_steps,
                    "success_rate": solved / len(final) if final else None,
                    "bc_success_rate": cloning.success_rate if cloning and not config.from_scratch else None,
                    "mean_return": mean_return,
                }
            )
        return 0


def options_given(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Values of the options on a command line, by name with hyphens; of one given twice the last counts.

    Raises:
        UsageError: One that decides over the defaults of others has no value.
    """
    given: dict[str, list[str]] = {}
    values: list[str] = []
    for argument in arguments:
        if argument in ("-h", "--help"):
            continue
        if not argument.startswith("--"):
            values.append(argument)
            continue
        name, equals, value = argument.removeprefix("--").partition("=")
        values = given[name.replace("_", "-")] = [value] if equals else []
    for name in ("env", "velocity", "algo", "resume", "profile"):
        if given.get(name) == []:
            raise UsageError(f"argument --{name}: expected one argument")
    return given
