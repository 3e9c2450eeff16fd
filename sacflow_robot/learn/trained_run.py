"""The policy that a run ends with, and its export."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sacflow_robot import __version__
from sacflow_robot.envs.registry import get_robot
from sacflow_robot.errors import DataError, UsageError, one_line
from sacflow_robot.export.metadata import WeightsKind
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.export.to_onnx import export_policy
from sacflow_robot.learn.algorithms.agent import Agent
from sacflow_robot.learn.algorithms.registry import make_agent
from sacflow_robot.learn.compile import pick_device
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.networks.policies import QC, GaussianPolicy
from sacflow_robot.learn.run_folder import RunFolder
from sacflow_robot.utils.action_history import robot_with_history

_MOST = 100


@dataclass(frozen=True)
class ExportOptions:
    """Choices when a trained policy is exported.

    Attributes:
        weights: How to keep the weights.
        euler_steps: K; None for that of the training.
        best_of: Chunks among which the critic picks one; None for that of the training.
        prefix: Whether a flow takes what is committed already.
    """

    weights: WeightsKind = "float32"
    euler_steps: int | None = None
    best_of: int | None = None
    prefix: bool = True

    def __post_init__(self) -> None:
        for name, value in ("euler-steps", self.euler_steps), ("best-of", self.best_of):
            if value is not None and not 1 <= value <= _MOST:
                raise UsageError(f"--{name} is {value}; it must be from 1 to {_MOST}")


def export_agent(agent: Agent, notes: Mapping[str, Any], path: Path, options: ExportOptions | None = None) -> float:
    """Write what an agent acts with to ``path``; see :func:`export_policy`.

    Raises:
        ExportError: As :func:`export_policy`.
        UsageError: The agent has no such policy.
    """
    options = options or ExportOptions()
    policy, learner = copy.deepcopy(agent.average_policy), agent.config.learner
    if options.euler_steps is not None:
        if not isinstance(policy, FlowPolicy):
            raise UsageError(
                f"--euler-steps is {options.euler_steps}, but a {policy.name} policy has none; leave it out"
            )
        policy.euler_steps = options.euler_steps
    best_of = learner.best_of if options.best_of is None else options.best_of
    if best_of > 1 and (agent.config.algo == "bc" or isinstance(policy, GaussianPolicy)):
        why = (
            "learns no critic that could choose" if agent.config.algo == "bc" else "plays its mean, the only candidate"
        )
        raise UsageError(f"--best-of is {best_of}, but {agent.config.algo} {why}; leave it out")
    more = {"best_of": best_of} if best_of > 1 else {}
    exported = policy if best_of == 1 else QC(policy, agent.target_critic, best_of, learner.critic_aggregate)
    spec = policy.make_spec(agent.commanded_robot, {**notes, **more})
    return export_policy(exported, spec, path, weights=options.weights, prefix=options.prefix)


def export_notes(config: TrainConfig, offline_steps: int, online_steps: int) -> dict[str, object]:
    """Origin of a policy, for its specification."""
    return {
        "algo": config.algo,
        "seed": config.seed,
        "offline_steps": offline_steps,
        "online_steps": online_steps,
        "made_by": f"sacflow-robot {__version__}",
    }


class TrainedRun:
    """The agent that a run folder ends with.

    Attributes:
        folder: The run folder.
        config: Its configuration.

    Raises:
        DataError: The folder holds no run, or its checkpoint does not fit its configuration.
    """

    def __init__(self, run_dir: Path) -> None:
        self.folder, self.config = RunFolder.open(run_dir)
        robot = self.folder.robot or robot_with_history(get_robot(self.config.env), self.config.action_history)
        self._agent = make_agent(robot, self.config, pick_device("cpu"))
        state = self.folder.load_checkpoint(self.config)
        try:
            self._agent.load_state_dict(state["agent"])
            done = json.loads(state["progress"])
            self._notes = export_notes(self.config, done["offline_steps"], done["env_steps"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{self.folder.checkpoint} does not fit the run's config.yaml: {one_line(error)}") from None

    def export(self, options: ExportOptions, path: Path) -> dict[str, Any]:
        """Write the policy; returns its figures, among them by how much its actions differ from torch's."""
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
