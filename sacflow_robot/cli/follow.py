"""``sacflow-robot follow``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sacflow_robot.cli import common
from sacflow_robot.episode import Episode
from sacflow_robot.errors import PolicyFileError, UsageError
from sacflow_robot.spec import NO_ENVIRONMENT
from sacflow_robot.utils.atomic_files import check_output

if TYPE_CHECKING:
    from sacflow_robot.learn.online_learner import FollowConfig, FollowingTrainer


@dataclass(frozen=True)
class Follow:
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
        json: Print one JSON object as the last line.
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
    json: bool = False

    def run(self) -> int:
        from sacflow_robot.learn.online_learner import FollowConfig
        from sacflow_robot.learn.run_folder import RunFolder
        from sacflow_robot.learn.training_guards import Interrupted

        if self.publish_every < 1 or (self.gate_episodes or 0) < 0 or self.inject_bad_candidate < 0:
            raise UsageError(
                "--publish-every must be at least 1, --gate-episodes and --inject-bad-candidate not negative"
            )
        check_output(self.publish, "--publish")
        named = {"utd_ratio": self.utd_ratio, "warmup_steps": self.warmup_steps}
        folder, config = RunFolder.open(self.run_dir)
        publish = folder.policy if self.publish is None else self.publish
        gate = self.gate_episodes
        if gate is None:
            gate = 0 if config.env == NO_ENVIRONMENT else FollowConfig.gate_episodes
        if gate and config.env == NO_ENVIRONMENT:
            raise UsageError(
                f"--gate-episodes is {gate}, but {self.run_dir} is a run without an environment; leave it out"
            )
        follow = FollowConfig(
            self.log, publish, self.publish_every, gate, self.stop_after, inject_bad_candidate=self.inject_bad_candidate
        )
        try:
            trainer = follow_log(self.run_dir, follow, {n: v for n, v in named.items() if v is not None})
        except Interrupted:
            common.console().print(f"saved in {self.run_dir}")
            return 130
        if self.json:
            figures = {"env_steps": trainer.env_steps, "updates": trainer.agent.updates}
            common.print_json({**figures, "published": trainer.published, "refused": trainer.refused})
        return 0


def follow_log(run_dir: Path, follow: FollowConfig, learner: Mapping[str, Any]) -> FollowingTrainer:
    """Go on with a run from a log, with other settings of the learner where given.

    Raises:
        Interrupted: Ctrl-C was pressed and the run has been saved.
    """
    from sacflow_robot.cli.train import check_seeds, training_draws, training_robots
    from sacflow_robot.envs.vector_env import core_count
    from sacflow_robot.export.onnx_policy import OnnxPolicy
    from sacflow_robot.learn.online_learner import FollowingTrainer
    from sacflow_robot.learn.progress import TrainingProgress
    from sacflow_robot.learn.run_folder import RunFolder

    folder, config = RunFolder.open(run_dir)
    folder.claim()
    config = replace(config, learner=replace(config.learner, **learner), eval_episodes=follow.gate_episodes)
    if config.compile == "auto":  # a robot is being moved meanwhile, and compiling takes every core for up to a minute
        config = replace(config, compile="off")
    draws = training_draws(config)
    with (
        training_robots(config, 1, draws, folder.robot) as envs,
        training_robots(config, max(1, min(core_count(), follow.gate_episodes)), draws, folder.robot) as eval_robots,
        TrainingProgress() as progress,
    ):
        trainer = FollowingTrainer(config, folder, envs, eval_robots, progress)
        trainer.follow = follow
        trainer.accept = check_policy
        trainer.load_policy = lambda path: OnnxPolicy(path).infer

        def check(episode: Episode) -> None:
            episode.check_fits(envs.spec, str(follow.log))
            check_seeds([episode], config, follow.log)

        trainer.check = check
        trainer.resume(same_robots=False)  # they are not moved any more
        trainer.run()
    return trainer


def check_policy(path: Path) -> None:
    """Hold a candidate against its golden vectors as a server would, and ask it about inputs of many sizes.

    Raises:
        PolicyFileError: It must not be served.
    """
    import numpy as np

    from sacflow_robot.export.metadata import NOISE, PREFIX, PREFIX_MASK
    from sacflow_robot.export.onnx_policy import OnnxPolicy

    policy, rng = OnnxPolicy(path), np.random.default_rng(0)
    low, high = policy.spec.robot.action_bounds
    for scale in (0.1, 1.0, 3.0):
        inputs = policy.blank_inputs(32)
        for name in sorted(inputs.keys() - {PREFIX, PREFIX_MASK}):
            inputs[name][...] = rng.normal(0, 1.0 if name == NOISE else scale, inputs[name].shape)
        actions = policy.run(inputs)
        if not np.isfinite(actions).all() or (actions < low - 1e-3).any() or (actions > high + 1e-3).any():
            raise PolicyFileError(f"{path} puts out NaN, infinity, or an action out of bounds")
