"""``sacflow-robot export``."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sacflow_robot.cli import common
from sacflow_robot.errors import UsageError
from sacflow_robot.export.metadata import WeightsKind
from sacflow_robot.spec import NO_ENVIRONMENT
from sacflow_robot.utils.atomic_files import check_output

if TYPE_CHECKING:
    from sacflow_robot.learn.config import TrainConfig


@dataclass(frozen=True)
class Export:
    """Export the policy of a run folder, as of its last checkpoint.

    Attributes:
        run_dir: Run folder.
        out: ONNX file to write; by default <env>.onnx in the run folder.
        weights: How to keep weights: float32; float16 or bf16, half the size and computed in float32; or int8, also computed
            in int8. How far actions differ by it is measured, reported and noted in the file.
        euler_steps: Euler steps K, e.g. 1, 2, 4 or 8; by default as trained.
        best_of: Chunks among which the critic, which goes into the file, picks one; by default as trained.
        prefix: Whether a flow takes what is committed already and completes it (inputs prefix and prefix_mask).
        eval_episodes: Episodes to evaluate the file on, and beside it what would be exported without these options.
        json: Print the result as one JSON object.
    """

    run_dir: Annotated[Path, tyro.conf.Positional]
    out: Path | None = None
    weights: WeightsKind = "float32"
    euler_steps: int | None = None
    best_of: int | None = None
    prefix: bool = True
    eval_episodes: int = 0
    json: bool = False

    def run(self) -> int:
        from sacflow_robot.learn.trained_run import ExportOptions, TrainedRun

        if self.eval_episodes < 0:
            raise UsageError(f"--eval-episodes is {self.eval_episodes}; it must be at least 0")
        options = ExportOptions(self.weights, self.euler_steps, self.best_of, self.prefix)
        out = common.results(self.json)
        check_output(self.out)
        trained = TrainedRun(self.run_dir)
        if self.eval_episodes and trained.config.env == NO_ENVIRONMENT:
            raise UsageError(
                f"--eval-episodes is {self.eval_episodes}, but {self.run_dir} is a run without an environment; leave it out"
            )
        result = trained.export(options, self.out or trained.folder.policy)
        what = "differs from torch" if self.weights == "float32" else f"weights in {self.weights}: actions differ"
        out.print(f"wrote {result['policy']} ({what} by {result['max_action_error']:.1e} at most)")
        if self.eval_episodes:
            result |= success_of(trained.config, Path(result["policy"]), self.eval_episodes)
            out.print(f"success {common.describe_success(result['successes'], self.eval_episodes)}")
            if options != ExportOptions(prefix=self.prefix):
                with tempfile.TemporaryDirectory() as folder:
                    plain = trained.export(ExportOptions(prefix=self.prefix), Path(folder) / "plain.onnx")
                    plain |= success_of(trained.config, Path(plain.pop("policy")), self.eval_episodes)
                out.print(f"without these options {common.describe_success(plain['successes'], self.eval_episodes)}")
                result["plain"] = plain
        if self.json:
            common.print_json(result)
        return 0


def success_of(config: TrainConfig, path: Path, episodes: int) -> dict[str, Any]:
    """Success of a run's policy file on the seeds of ``sacflow-robot eval``."""
    from sacflow_robot.envs.collector import evaluation_envs
    from sacflow_robot.export.onnx_policy import OnnxPolicy

    seeds = range(common.EVAL_SEED, common.EVAL_SEED + episodes)
    with evaluation_envs(config.env, len(seeds), config.env_engine, config.action_history) as envs:
        found = common.evaluate(OnnxPolicy(path), envs, seeds)
    steps = sum(len(e) for e in found) / len(found)
    return {**common.success_json(sum(e.success for e in found), len(found)), "mean_steps": steps}
