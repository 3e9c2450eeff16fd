"""``sacflow-robot follow``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sacflow_robot.cli import common
from sacflow_robot.utils.atomic_files import check_output


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
        if self.json:
            figures = {"env_steps": learner.trainer.env_steps, "updates": learner.trainer.agent.updates}
            common.print_json({**figures, "published": learner.gate.published, "refused": learner.gate.refused})
        return 0
