"""Exported graphs side by side: as a plain export makes them, folded, with fewer bits, with other Euler steps.

A plain export (:class:`NaiveFlow`) holds the networks as published, called K times with (time, action, observation): time is
embedded and the observation encoded at every step, and Flow-T's attentions have queries and keys, at torch's initial weights,
for the result does not depend on them. All other weights are those of the policy measured.
"""

import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sacflow_robot.export import metadata as policyfile
from sacflow_robot.export.graph import ExportedGraph
from sacflow_robot.export.metadata import WeightsKind
from sacflow_robot.export.to_onnx import export_policy, to_onnx
from sacflow_robot.learn.config import VelocityName
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.networks.policy import squash
from sacflow_robot.learn.networks.velocity import FlowG, FlowT, Mlp, embed_time
from sacflow_robot.learn.presets import preset
from sacflow_robot.spec import FloatArray, RobotSpec

_BURST = 50  # evaluations of one graph in succession, which find its weights where those before left them
_WARM_UP = 5
_BATCH = 256
_HEADS = 4


class _Variant(NamedTuple):
    name: str
    policy: FlowPolicy
    path: Path


def measure(robot: RobotSpec, velocity: VelocityName, euler_steps: Sequence[int], bursts: int) -> list[dict[str, Any]]:
    """A row per variant of an untrained policy of the size that training makes it by default, and per further K.

    Each graph takes ``bursts`` turns of 50 evaluations of one row on one thread. ``bytes`` is the file's size, ``nodes`` those
    left after ONNX Runtime's own optimization, ``p50_us`` and ``p99_us`` microseconds an evaluation, ``max_abs_error`` the
    largest difference of any action from torch with the same K, of 256 rows.
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
            rows.append(
                {
                    "velocity": velocity,
                    "variant": variant.name,
                    "euler_steps": variant.policy.euler_steps,
                    "bytes": variant.path.stat().st_size,
                    "nodes": _count_nodes(variant.path),
                    "p50_us": p50,
                    "p99_us": p99,
                    "max_abs_error": _error(session, variant.policy, robot),
                }
            )
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


class NaiveFlow(nn.Module):
    """``FlowPolicy.forward`` without any of the policy's own savings; for velocities mlp, flow-g, flow-t and flow-l."""

    def __init__(self, policy: FlowPolicy) -> None:
        super().__init__()
        self.normalizer, self._steps = policy, policy.euler_steps
        self.velocity = _published(policy.velocity)

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Actions (B, D) for raw observations (B, O) and noise (B, D)."""
        latent = noise
        for i in range(self._steps):
            time = torch.full_like(noise[:, :1], i / self._steps)
            latent = latent + self.velocity(time, latent, self.normalizer.normalize(observation)) / self._steps
        return squash(latent)


class _Whole(nn.Module):
    def __init__(self, velocity: Any) -> None:
        super().__init__()
        self.velocity = velocity

    def forward(self, time: Tensor, action: Tensor, observation: Tensor) -> Tensor:
        return cast(Tensor, self.velocity(time, action, self.velocity.encode(observation)))


class _Stacked(nn.Module):
    """An MLP on time, action and observation, stacked."""

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        parts = trunk.from_time, trunk.from_action, trunk.from_observation
        self.first = nn.Linear(sum(p.in_features for p in parts), trunk.from_action.out_features)
        with torch.no_grad():
            self.first.weight.copy_(torch.cat([p.weight for p in parts], 1))
            self.first.bias.copy_(trunk.from_observation.bias)
        self.hidden, self.head = trunk.hidden, trunk.head

    def forward(self, time: Tensor, action: Tensor, observation: Tensor) -> Tensor:
        x = F.silu(self.first(torch.cat([embed_time(time), action, observation], -1)))
        for layer in self.hidden:
            x = F.silu(layer(x))
        return cast(Tensor, self.head(x))


class _FlowG(nn.Module):
    def __init__(self, velocity: Any) -> None:
        super().__init__()
        self.candidate, self.gate = _Stacked(velocity.candidate), _Stacked(velocity.gate)

    def forward(self, time: Tensor, action: Tensor, observation: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(time, action, observation))
        return cast(Tensor, gate * (self.candidate(time, action, observation) - action))


class _FlowT(nn.Module):
    def __init__(self, velocity: Any) -> None:
        super().__init__()
        self.parts = velocity
        self.layers = nn.ModuleList(map(_decoder_layer, velocity.layers))

    def forward(self, time: Tensor, action: Tensor, observation: Tensor) -> Tensor:
        parts = self.parts
        state = parts.from_observation(observation)
        token = (parts.from_action(action) + parts.from_time(embed_time(time))).unsqueeze(1)
        for layer, norm in zip(self.layers, [layer.cross_attention[0] for layer in parts.layers], strict=True):
            token = layer(token, norm(state).unsqueeze(1))
        return cast(Tensor, parts.head(token.squeeze(1)))


def _decoder_layer(ours: Any) -> nn.Module:
    """torch's own pre-norm decoder layer, queries, keys and all."""
    width = len(ours.self_norm.weight)
    layer = nn.TransformerDecoderLayer(width, _HEADS, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
    attentions = (layer.self_attn, ours.self_attention), (layer.multihead_attn, ours.cross_attention[1:])
    with torch.no_grad():
        for theirs, (value, out) in attentions:
            theirs.in_proj_weight[2 * width :] = value.weight
            theirs.in_proj_bias[2 * width :] = value.bias
            theirs.out_proj.load_state_dict(out.state_dict())
    layer.norm1.load_state_dict(ours.self_norm.state_dict())
    layer.norm3.load_state_dict(ours.feed_forward[0].state_dict())
    layer.linear1.load_state_dict(ours.feed_forward[1].state_dict())
    layer.linear2.load_state_dict(ours.feed_forward[3].state_dict())
    return layer


def _published(velocity: Any) -> nn.Module:
    match velocity:
        case Mlp():
            return _Stacked(velocity.trunk)
        case FlowG():
            return _FlowG(velocity)
        case FlowT():
            return _FlowT(velocity)
    return _Whole(velocity)
