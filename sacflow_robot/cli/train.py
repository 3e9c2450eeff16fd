"""``sacflow-robot train`` and ``follow``."""

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
from sacflow_robot.utils.atomic_files import check_output

if TYPE_CHECKING:
    from sacflow_robot.learn.run_folder import RunFolder
    from sacflow_robot.learn.trainer import Trainer


@dataclass(frozen=True)
class Train(common.JsonOptions):
    """Train a flow policy offline to online, or from scratch, and export it.

    Attributes:
        full: Take the published sizes and budgets, meant for a GPU, as defaults.
        config: The run's configuration.
        out: Run folder to make; by default the first free runs/<env>-<velocity>-s<seed>.
        resume: Run folder to go on with; with --profile or --replay a copy of it is fitted to one robot (docs/learning.md).
        tune_updates: Updates for each step of the log when fine-tuning.
        unchanged: The run to resume goes on as what it is, and ``config`` is its own.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    out: Path | None = None
    resume: Path | None = None
    tune_updates: float = 0.25
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
        self.say(f"fine-tuned run: {folder.path}\npolicy:         {folder.policy}")
        figures = {"env_steps": learner.trainer.env_steps, "updates": learner.trainer.agent.updates}
        return self.finish({"run_dir": str(folder.path), "policy": str(folder.policy), **figures})

    def _finish(self, trainer: Trainer, folder: RunFolder, began: float) -> int:
        from sacflow_robot.learn.trained_run import export_agent, export_notes
        from sacflow_robot.learn.training_envs import training_limiter

        config, hints = trainer.config, common.console()
        notes = export_notes(config, trainer.done.offline_steps, trainer.env_steps)
        difference = export_agent(trainer.agent, notes, folder.policy)
        count = config.final_eval_episodes
        final = common.evaluate_run(config, folder.policy, count, training_limiter(config)) if count else []
        success = common.success_json(final)
        cloning = trainer.done.evaluations[0] if trainer.done.evaluations and not config.from_scratch else None
        if cloning is not None:
            cloned = common.success_json([i < cloning.successes for i in range(cloning.episodes)])
            self.say(f"cloning alone:  {common.describe_success(cloned)}")
        mean_return = sum(float(e.rewards.sum()) for e in final) / len(final) if final else None
        if final:
            returned = f"return {mean_return:.4g} over {len(final)} episodes"
            self.say(f"final policy:   {returned if config.from_scratch else common.describe_success(success)}")
        if folder.curve.exists():
            self.say(f"curve:          {folder.curve}")
        self.say(f"policy:         {folder.policy} (differs from torch by {difference:.1e} at most)")
        hints.print(f"serve it with:\n  {common.command_line('serve --policy', folder.policy)}")
        if config.env == NO_ENVIRONMENT:
            hints.print(
                "not evaluated, because there is no environment; measure it on the robot with 'sacflow-robot run'"
            )
        return self.finish(
            {
                "run_dir": str(folder.path),
                "policy": str(folder.policy),
                "wall_s": round(trainer.done.wall_s + time.monotonic() - began, 1),
                "env_steps": trainer.env_steps,
                "success_rate": success["success_rate"],
                "bc_success_rate": None if cloning is None else cloning.success_rate,
                "mean_return": mean_return,
            }
        )


@dataclass(frozen=True)
class Follow(common.JsonOptions):
    """Go on with a training run from what a robot logs while it runs, and replace the policy that is being served.

    The server takes a new file between two episodes of a client (serve --reload); each logged episode names its policy's
    version. A candidate that is worse, damaged or not finite is not published.

    Attributes:
        run_dir: Run folder to go on with, as train leaves it; learning goes on in it.
        log: Episode log that 'run --log' appends to.
        publish: Policy file to replace; by default <env>.onnx in the run folder.
        publish_every: Environment steps taken from the log between two candidates.
        gate_episodes: Simulated episodes that a candidate is held against the best published policy with; by default 30, and
            0 for a run without an environment.
        stop_after: End once so many environment steps have been learned from.
        utd_ratio: Updates for each step of the log, in place of the run's own.
        warmup_steps: Steps of the log during which only the critic learns, likewise.
        inject_bad_candidate: To see the gate refuse one: corrupt the weights of the candidate of this number (1 for the first).
    """

    run_dir: Annotated[Path, tyro.conf.Positional]
    log: Path
    publish: Path | None = None
    publish_every: int = 1000
    gate_episodes: int | None = None
    stop_after: int | None = None
    utd_ratio: float | None = None
    warmup_steps: int | None = None
    inject_bad_candidate: int = 0

    def run(self) -> int:
        from sacflow_robot.learn.online_learner import OnlineConfig, learn_from_log
        from sacflow_robot.learn.training_guards import Interrupted

        online = OnlineConfig(
            self.log, self.publish, self.publish_every, self.gate_episodes, self.stop_after,
            inject_bad_candidate=self.inject_bad_candidate,
        )  # fmt: skip
        check_output(self.publish, "--publish")
        named = {"utd_ratio": self.utd_ratio, "warmup_steps": self.warmup_steps}
        try:
            learner = learn_from_log(self.run_dir, online, {n: v for n, v in named.items() if v is not None})
        except Interrupted:
            common.console().print(f"saved in {self.run_dir}")
            return 130
        figures = {"env_steps": learner.trainer.env_steps, "updates": learner.trainer.agent.updates}
        return self.finish({**figures, "published": learner.gate.published, "refused": learner.gate.refused})


def options_given(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Values of the options on a command line, by name with hyphens; of one given twice the last counts."""
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
