"""Exported graphs side by side: as a plain export makes them, folded, with fewer bits, with other Euler steps."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from torch import nn

from sacflow_robot.bench.naive import NaiveFlow
from sacflow_robot.export import metadata as policyfile
from sacflow_robot.export.graph import ExportedGraph
from sacflow_robot.export.metadata import WeightsKind
from sacflow_robot.export.to_onnx import export_policy, to_onnx
from sacflow_robot.learn.config import VelocityName
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.presets import preset
from sacflow_robot.spec import FloatArray, RobotSpec

_BURST = 50  # evaluations of one graph in succession, which find its weights where those before left them
_WARM_UP = 5
_BATCH = 256


@dataclass(frozen=True)
class Row:
    """One graph.

    Attributes:
        velocity: Velocity network.
        variant: How it was exported.
        euler_steps: K.
        bytes: Size of the file.
        nodes: Nodes that are evaluated, after ONNX Runtime's own optimization.
        p50_us: Median time of one evaluation, one row, one thread (microseconds).
        p99_us: 99th percentile.
        max_abs_error: Largest difference of any action from torch, with the same K, of 256 rows.
    """

    velocity: VelocityName
    variant: str
    euler_steps: int
    bytes: int
    nodes: int
    p50_us: float
    p99_us: float
    max_abs_error: float


class _Variant(NamedTuple):
    name: str
    policy: FlowPolicy
    path: Path


def measure(robot: RobotSpec, velocity: VelocityName, euler_steps: Sequence[int], bursts: int) -> list[Row]:
    """A row per variant of an untrained policy of the size that training makes it by default.

    Args:
        robot: The robot.
        velocity: Name of the velocity network.
        euler_steps: Further variants' K.
        bursts: Turns that each graph takes, 50 evaluations each.
    """
    torch.manual_seed(0)
    config = preset("lift", velocity)
    size = config.chunk_length * robot.action_dim
    policy = FlowPolicy(velocity, robot.observation_dim, size, config.flow, robot.quaternions).eval()
    with torch.no_grad():
        for parameter in policy.parameters():  # a head that starts at zero would hide errors of what is before it
            parameter.add_(0.02 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        variants = list(_variants(policy, robot, euler_steps, Path(folder)))
        sessions = [_open(variant.path) for variant in variants]
        times = _time(sessions, _inputs(robot, policy, 1), bursts)
        rows = []
        for variant, session, own in zip(variants, sessions, times, strict=True):
            p50, p99 = (round(float(value), 1) for value in np.percentile(own, [50, 99]))
            error, size = _error(session, variant.policy, robot), variant.path.stat().st_size
            nodes, steps = _count_nodes(variant.path), variant.policy.euler_steps
            rows.append(Row(velocity, variant.name, steps, size, nodes, p50, p99, error))
    return rows


def _variants(policy: FlowPolicy, robot: RobotSpec, euler_steps: Sequence[int], folder: Path) -> Iterator[_Variant]:
    def spec(of: FlowPolicy) -> Any:
        return of.make_spec(robot, {"untrained": True})

    unfolded: dict[str, nn.Module] = {"naive": NaiveFlow(policy), "as trained": policy}
    for name, module in unfolded.items():
        graph = ExportedGraph(module, robot, policy.action_dim // robot.action_dim).eval()
        path = folder / f"{name}.onnx"
        onnx.save(to_onnx(graph, spec(policy)), path)
        yield _Variant(name, policy, path)
    for weights in get_args(WeightsKind):
        path = folder / f"{weights}.onnx"
        export_policy(policy, spec(policy), path, weights=weights, prefix=False)
        yield _Variant("folded" if weights == "float32" else f"folded, {weights}", policy, path)
    path = folder / "prefix.onnx"
    export_policy(policy, spec(policy), path)
    yield _Variant("folded, prefix", policy, path)
    for steps in euler_steps:
        other = copy.deepcopy(policy)
        other.euler_steps = steps
        path = folder / f"{steps}.onnx"
        export_policy(other, spec(other), path, prefix=False)
        yield _Variant(f"folded, K = {steps}", other, path)


def _open(path: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = 1, 1, 4
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _count_nodes(path: Path) -> int:
    optimized = path.with_suffix(".optimized")
    _open(path, optimized)
    return len(onnx.load(optimized, load_external_data=False).graph.node)


def _inputs(robot: RobotSpec, policy: FlowPolicy, batch: int) -> dict[str, FloatArray]:
    rng = np.random.default_rng(0)
    shapes = {a.key: a.shape for a in robot.observations}
    shapes[policyfile.NOISE] = (policy.action_dim // robot.action_dim, robot.action_dim)
    return {name: rng.standard_normal((batch, *shape)).astype(np.float32) for name, shape in shapes.items()}


@torch.no_grad()
def _error(session: onnxruntime.InferenceSession, policy: FlowPolicy, robot: RobotSpec) -> float:
    inputs = _inputs(robot, policy, _BATCH)
    noise = torch.from_numpy(inputs[policyfile.NOISE]).flatten(1)
    expected = policy(torch.from_numpy(robot.flatten(inputs)), noise).numpy()
    return float(np.abs(session.run(None, inputs)[0].reshape(_BATCH, -1) - expected).max())


def _time(
    sessions: Sequence[onnxruntime.InferenceSession], inputs: dict[str, FloatArray], bursts: int
) -> npt.NDArray[np.float64]:
    """Times (sessions, bursts * 50) of single evaluations (microseconds), the sessions taking turns."""
    times = np.empty((len(sessions), bursts, _BURST))
    outputs = [policyfile.ACTIONS]
    for burst in range(bursts):
        for session, own in zip(sessions, times[:, burst], strict=True):
            for _ in range(_WARM_UP):
                session.run(outputs, inputs)
            for i in range(_BURST):
                began = time.perf_counter_ns()
                session.run(outputs, inputs)
                own[i] = (time.perf_counter_ns() - began) / 1e3
    return times.reshape(len(sessions), -1)
