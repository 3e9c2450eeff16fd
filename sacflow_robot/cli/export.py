"""``sacflow-robot export``."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sacflow_robot.cli import common
from sacflow_robot.errors import DataError, UsageError, one_line
from sacflow_robot.learn.config import WeightsKind
from sacflow_robot.spec import NO_ENVIRONMENT
from sacflow_robot.utils.atomic_files import check_output

if TYPE_CHECKING:
    from sacflow_robot.export.to_onnx import ExportOptions
    from sacflow_robot.learn.algorithms.agent import Agent
    from sacflow_robot.spec import Engine


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
        from sacflow_robot.export.to_onnx import ExportOptions

        if self.eval_episodes < 0:
            raise UsageError(f"--eval-episodes is {self.eval_episodes}; it must be at least 0")
        options = ExportOptions(self.weights, self.euler_steps, self.best_of, self.prefix)
        out = common.results(self.json)
        check_output(self.out)
        trained = TrainedRun(self.run_dir)
        if self.eval_episodes and trained.env == NO_ENVIRONMENT:
            raise UsageError(
                f"--eval-episodes is {self.eval_episodes}, but {self.run_dir} is a run without an environment; leave it out"
            )
        result = trained.export(options, self.out or trained.path)
        what = "differs from torch" if self.weights == "float32" else f"weights in {self.weights}: actions differ"
        out.print(f"wrote {result['policy']} ({what} by {result['max_action_error']:.1e} at most)")
        if self.eval_episodes:
            result |= trained.evaluate(Path(result["policy"]), self.eval_episodes)
            out.print(f"success {common.describe_success(result['successes'], self.eval_episodes)}")
            if options != ExportOptions(prefix=self.prefix):
                with tempfile.TemporaryDirectory() as folder:
                    plain = trained.export(ExportOptions(prefix=self.prefix), Path(folder) / "plain.onnx")
                    plain |= trained.evaluate(Path(plain.pop("policy")), self.eval_episodes)
                out.print(f"without these options {common.describe_success(plain['successes'], self.eval_episodes)}")
                result["plain"] = plain
        if self.json:
            common.print_json(result)
        return 0


class TrainedRun:
    """The agent that a run folder ends with.

    Raises:
        DataError: The folder holds no run, or its checkpoint does not fit its configuration.
    """

    def __init__(self, run_dir: Path) -> None:
        from sacflow_robot.cli.train import export_notes
        from sacflow_robot.envs.tasks import get_robot
        from sacflow_robot.learn.algorithms.registry import make_agent
        from sacflow_robot.learn.compile import pick_device
        from sacflow_robot.learn.run_folder import RunFolder

        folder, config = RunFolder.open(run_dir)
        self.path, self.env = folder.policy, config.env
        self._engine: Engine = config.env_engine
        robot = folder.robot or common.robot_with_history(get_robot(config.env), config.action_history)
        self._history = config.action_history
        self._agent: Agent = make_agent(robot, config, pick_device("cpu"))
        state = folder.load_checkpoint(config)
        try:
            self._agent.load_state_dict(state["agent"])
            done = json.loads(state["progress"])
            self._notes = export_notes(config, done["offline_steps"], done["env_steps"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{folder.checkpoint} does not fit the run's config.yaml: {one_line(error)}") from None

    def export(self, options: ExportOptions, path: Path) -> dict[str, Any]:
        """Write the policy; returns what it is, and by how much its actions differ."""
        from sacflow_robot.export.onnx_policy import OnnxPolicy
        from sacflow_robot.export.to_onnx import export_agent

        error = export_agent(self._agent, self._notes, path, options)
        policy = OnnxPolicy(path)
        return {
            "policy": str(path),
            "version": policy.version,
            "velocity": policy.spec.velocity,
            "bytes": path.stat().st_size,
            "weights": options.weights,
            "euler_steps": policy.spec.euler_steps,
            "best_of": policy.spec.notes.get("best_of", 1),
            "prefix": policy.takes_prefix,
            "max_action_error": error,
        }

    def evaluate(self, path: Path, episodes: int) -> dict[str, Any]:
        """Success on the seeds of ``sacflow-robot eval``."""
        from sacflow_robot.export.onnx_policy import OnnxPolicy

        seeds = range(common.EVAL_SEED, common.EVAL_SEED + episodes)
        found = common.evaluate(OnnxPolicy(path), self.env, seeds, self._engine, self._history)
        steps = sum(len(e) for e in found) / len(found)
        return {**common.success_json(sum(e.success for e in found), len(found)), "mean_steps": steps}
