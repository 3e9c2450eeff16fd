"""``sacflow-robot eval``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sacflow_robot.cli import common
from sacflow_robot.errors import UsageError
from sacflow_robot.spec import NO_ENVIRONMENT, Engine
from sacflow_robot.utils.atomic_files import check_output

if TYPE_CHECKING:
    from sacflow_robot.export.onnx_policy import OnnxPolicy


@dataclass(frozen=True)
class Eval:
    """Success rate of a policy file on held-out seeds, on all cores.

    Attributes:
        policy: Policy file.
        env: Task, any Gymnasium id, or an environment of one's own as MODULE:CLASS or FILE.py:CLASS; by default the policy's own
            task.
        episodes: Episodes to run.
        env_engine: What steps the robots: compiled, or robosuite's own (stock).
        seed: First environment seed; training never uses seeds below 1 000 000.
        robustness: Measure success against delay, noise, mass, friction, gain and lost messages instead: a table and a figure.
        plot: That figure.
        json: Print the result as one JSON object.
    """

    policy: Path
    env: str | None = None
    episodes: int = 100
    env_engine: Engine = "compiled"
    seed: int = common.EVAL_SEED
    robustness: bool = False
    plot: Path = Path("robustness.png")
    json: bool = False

    def run(self) -> int:
        import time

        import numpy as np

        from sacflow_robot.envs.collector import evaluation_envs
        from sacflow_robot.export.onnx_policy import OnnxPolicy

        if self.episodes < 1 or self.seed < 0:
            raise UsageError("--episodes must be at least 1 and --seed not negative")
        if self.robustness:
            check_output(self.plot, "--plot", parents=False)
        policy = OnnxPolicy(self.policy)
        env, history = self._environment(policy), common.history_of(policy.spec.robot)
        seeds = range(self.seed, self.seed + self.episodes)
        if self.robustness:
            return self._perturb(policy, env, history, seeds)
        with evaluation_envs(env, self.episodes, self.env_engine, history) as envs:
            for each in envs:
                each.begin({0: self.seed})  # returns when it has been built
            start = time.perf_counter()
            episodes = common.evaluate(policy, envs, seeds)
            wall_s = time.perf_counter() - start
        solved, mean_steps = sum(e.success for e in episodes), float(np.mean([len(e) for e in episodes]))
        mean_return = float(np.mean([e.rewards.sum() for e in episodes]))
        common.results(self.json).print(
            f"{self.policy} on {env}: success {common.describe_success(solved, len(episodes))}, "
            f"{mean_steps:.0f} steps and a return of {mean_return:.4g} on average, in {wall_s:.1f} s"
        )
        if self.json:
            result = {
                **common.success_json(solved, len(episodes)),
                "mean_steps": mean_steps,
                "mean_return": mean_return,
                "wall_s": wall_s,
            }
            common.print_json({**result, "env_engine": episodes[0].info["env_engine"]})
        return 0

    def _environment(self, policy: OnnxPolicy) -> str:
        """Environment to evaluate in: the one given, or the one that the policy was made for."""
        from sacflow_robot.envs.registry import check_environment, environment_of, why_no_environment

        robot = policy.spec.robot
        if self.env is not None:
            check_environment(self.env, robot, str(self.policy))
            return self.env
        env = environment_of(robot)
        if env == NO_ENVIRONMENT:
            raise UsageError(
                f"{self.policy} is for {robot.robot}, {robot.task}, and no environment of it is known here "
                f"({why_no_environment(robot)}); on the robot, 'run' measures it"
            )
        return env

    def _perturb(self, policy: OnnxPolicy, env: str, history: int, seeds: range) -> int:
        from sacflow_robot.cli.robustness import robustness
        from sacflow_robot.envs.tasks import TASKS

        if env not in TASKS:
            raise UsageError(
                f"--robustness changes the simulated robot of a robosuite task, and {env} is none; leave it out"
            )
        rows = robustness(policy, env, history, seeds, self.plot)
        lines = [("perturbation", "value", "success", "95 % interval", "")]
        for r in rows:
            interval = f"{r['ci_low']:.0%} to {r['ci_high']:.0%}"
            lines.append(
                (r["perturbation"], f"{r['value']:g}", f"{r['successes']}/{r['episodes']}", interval, r["unit"])
            )
        out = common.results(self.json)
        for line in common.aligned(lines):
            out.print(line)
        out.print(f"figure: {self.plot}")
        if self.json:
            common.print_json({"rows": rows})
        return 0
