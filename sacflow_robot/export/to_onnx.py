"""Export of a policy as one ONNX graph: a flow with its K Euler steps unrolled, the best of N with the critic inside."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from sacflow_robot.errors import ExportError, UsageError, one_line
from sacflow_robot.export import metadata as policyfile
from sacflow_robot.export.fuse import FoldedFlow
from sacflow_robot.export.quantize import store_weights
from sacflow_robot.learn.algorithms.agent import Agent
from sacflow_robot.learn.config import WeightsKind
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.networks.policies import QC, GaussianPolicy
from sacflow_robot.learn.networks.policy import PolicyNetwork
from sacflow_robot.learn.networks.velocity import fold_weights
from sacflow_robot.spec import FloatArray, PolicySpec, RobotSpec
from sacflow_robot.utils.atomic_files import replacing

_CHECKED_BATCHES = (1, 7, 64)
_OPSET = 20
_MOST = 100


@dataclass(frozen=True)
class ExportOptions:
    """What to choose when a trained policy is exported.

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


class ExportedGraph(nn.Module):
    """The policy as its file sees it: observation arrays and noise in, what is committed where it takes that, chunks out."""

    over_steps: Tensor
    middle: Tensor
    half_range: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, policy: nn.Module, robot: RobotSpec, chunk_length: int) -> None:
        super().__init__()
        self.policy, self._keys, self._shape = policy, len(robot.observations), (-1, chunk_length, robot.action_dim)
        over_steps = torch.eye(chunk_length).repeat_interleave(robot.action_dim, 1)
        self.register_buffer("over_steps", over_steps)  # (H, D): a product with it is cheaper than repeating entries
        self._scaled = not robot.has_unit_actions
        for name, values in zip(
            ("middle", "half_range", "low", "high"), (*robot.action_scale, *robot.action_bounds), strict=True
        ):
            self.register_buffer(name, torch.from_numpy(values) if self._scaled else None)

    def forward(self, *arrays: Tensor) -> Tensor:
        """Actions (B, H, A) from one array (B, *shape) per observation key, noise (B, H, A), prefix and its mask (B, H)."""
        actions: Tensor = self.policy(*self._flat(arrays))
        actions = actions.reshape(self._shape)
        if not self._scaled:
            return actions
        actions = torch.minimum(torch.maximum(self.middle + self.half_range * actions, self.low), self.high)
        committed = arrays[self._keys + 1 :]
        if not committed:
            return actions
        prefix, mask = committed  # scaled there and back it would differ in its last bit
        return torch.where(mask.unsqueeze(-1) > 0, prefix, actions)

    def margin(self, *arrays: Tensor) -> Tensor:
        """By how much the action chosen is better than the next (B,), where there is a choice; else infinity."""
        if not isinstance(self.policy, QC):
            return torch.full(arrays[0].shape[:1], torch.inf)
        _, values = self.policy.candidates(*self._flat(arrays))
        best = values.topk(2, -1).values
        return best[:, 0] - best[:, 1]

    def _flat(self, arrays: Sequence[Tensor]) -> list[Tensor]:
        observation, (noise, *committed) = arrays[: self._keys], arrays[self._keys :]
        flat = [torch.cat([x.flatten(1) for x in observation], -1), noise.flatten(1)]
        if committed:
            prefix, mask = committed
            prefix = (prefix - self.middle) / self.half_range if self._scaled else prefix
            flat += [prefix.flatten(1), mask @ self.over_steps]
        return flat


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
    spec = make_spec(policy, agent.commanded_robot, policy.name, {**notes, **more})
    return export_policy(exported, spec, path, weights=options.weights, prefix=options.prefix)


def make_spec(policy: PolicyNetwork, robot: RobotSpec, velocity: str, notes: Mapping[str, Any]) -> PolicySpec:
    """The contract of a policy."""
    return PolicySpec(
        robot=robot,
        chunk_length=policy.action_dim // robot.action_dim,
        euler_steps=policy.euler_steps,
        velocity=velocity,
        observation_mean=tuple(policy.observation_mean.tolist()),
        observation_std=tuple(policy.observation_std.tolist()),
        notes=notes,
    )


def export_policy(
    policy: nn.Module, spec: PolicySpec, path: Path, *, weights: WeightsKind = "float32", prefix: bool = True
) -> float:
    """Write the policy to ``path``, folded (see learn/folded.py), complete or not at all.

    Args:
        policy: The policy to export: a ``PolicyNetwork``, or the best of several of its samples.
        spec: Its contract; weights other than float32 are noted in it, with their error.
        path: File to write, replaced if it exists.
        weights: How to keep the weights.
        prefix: Whether a flow is to take what is committed already; other policies never do.

    Returns:
        Largest absolute difference between ONNX Runtime and torch at batch 1, 7 and 64, where an action's half range is 1.

    Raises:
        ExportError: The difference exceeds 1e-5 with weights in float32, or the file cannot be written.
    """
    plain = copy.deepcopy(policy).to("cpu").eval()
    fold_weights(plain)
    folded = _folded(plain, prefix)
    prefix = folded is not plain and prefix
    made = (ExportedGraph(p, spec.robot, spec.chunk_length).eval() for p in (plain, folded))
    graphs = _Graphs(next(made), next(made), prefix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        model = to_onnx(graphs.folded, spec, prefix)
        worst = _compare(graphs, spec, model, _CHECKED_BATCHES)
        if not worst <= policyfile.TOLERANCE:
            raise ExportError(
                f"ONNX Runtime differs from torch by {worst:.2e}, allowed is {policyfile.TOLERANCE:.0e}; {path} not written"
            )
        if weights != "float32":
            model = store_weights(model, weights)
            worst = _compare(graphs, spec, model, (*_CHECKED_BATCHES, 1024))
            if not worst < np.inf:
                raise ExportError(f"with weights in {weights} the policy puts out NaN or infinity; {path} not written")
            spec = replace(spec, notes={**spec.notes, "weights": weights, "max_action_error": worst})
        golden = _inputs(graphs.folded, spec, 4, prefix)
        golden[policyfile.ACTIONS] = _open(model).run(None, golden)[0]
        metadata = {
            policyfile.SPEC_KEY: spec.to_json(),
            policyfile.FINGERPRINT_KEY: spec.fingerprint,
            policyfile.GOLDEN_KEY: policyfile.pack_arrays(golden),
        }
        onnx.helper.set_model_props(model, metadata)
        with replacing(path) as partial:
            onnx.save(model, partial)
        return worst
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from None
    except (ValueError, RuntimeError, onnx.onnx_cpp2py_export.checker.ValidationError) as error:
        raise ExportError(f"the policy cannot be exported: {one_line(error)}; {path} not written") from None


class _Graphs(NamedTuple):
    """The policy as it was trained, and folded."""

    plain: ExportedGraph
    folded: ExportedGraph
    prefix: bool


def _folded(policy: nn.Module, prefix: bool) -> nn.Module:
    """The policy folded, where it is a flow or the best of one's samples; else itself."""
    if isinstance(policy, FlowPolicy):
        return FoldedFlow(policy, with_prefix=prefix)
    if isinstance(policy, QC) and isinstance(policy.policy, FlowPolicy):
        best = copy.deepcopy(policy)
        best.policy = FoldedFlow(policy.policy, with_prefix=prefix)
        return best
    return policy


def to_onnx(graph: ExportedGraph, spec: PolicySpec, prefix: bool) -> onnx.ModelProto:
    """The graph as ONNX, without metadata; with ``prefix`` it takes what is committed, and need not be given it."""
    example = _random_inputs(spec, 2, prefix)
    batch = torch.export.Dim("batch", min=1)
    for name in ("torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter warns about its own deprecated internals
        program = torch.onnx.export(
            graph,
            tuple(map(torch.from_numpy, example.values())),
            input_names=list(example),
            output_names=[policyfile.ACTIONS],
            dynamic_shapes=(tuple({0: batch} for _ in example),),
            opset_version=_OPSET,
            dynamo=True,
        )
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:  # the exporter notes this machine's source paths in every node
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        if hasattr(value, "metadata_props"):
            del value.metadata_props[:]
    if prefix:
        _make_optional(model, spec)
    return model


def _make_optional(model: onnx.ModelProto, spec: PolicySpec) -> None:
    """Give the inputs of a prefix a default, one row of zeros for all: nothing is committed."""
    h, a = spec.noise_shape
    for name, shape in (policyfile.PREFIX, (1, h, a)), (policyfile.PREFIX_MASK, (1, h)):
        declared = next(value for value in model.graph.input if value.name == name)
        declared.type.tensor_type.shape.dim[0].dim_param = "prefix_batch"
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))
    for node in model.graph.node:  # where the batch's size is asked for, it is not to be asked of them
        if node.op_type == "Shape" and node.input[0] in (policyfile.PREFIX, policyfile.PREFIX_MASK):
            node.input[0] = policyfile.NOISE
    del model.graph.value_info[:]  # their shapes are of a batch as large as the others


def _random_inputs(spec: PolicySpec, batch: int, prefix: bool) -> dict[str, FloatArray]:
    """Inputs around the normalizer's mean, by name; the same for the same spec and batch.

    Of what is committed, the first row has nothing and the next have one step more each, up to all.
    """
    rng = np.random.default_rng(batch)
    spread = rng.standard_normal((batch, spec.robot.observation_dim)).astype(np.float32)
    flat = np.array(spec.observation_mean, np.float32) + np.array(spec.observation_std, np.float32) * spread
    inputs, start = {}, 0
    for array in spec.robot.observations:
        inputs[array.key] = np.ascontiguousarray(flat[:, start : start + array.size]).reshape(batch, *array.shape)
        start += array.size
    inputs[policyfile.NOISE] = rng.standard_normal((batch, *spec.noise_shape)).astype(np.float32)
    if prefix:
        committed = rng.uniform(-1, 1, (batch, *spec.noise_shape)).astype(np.float32)
        inputs[policyfile.PREFIX] = spec.robot.from_unit(committed)
        count = np.arange(batch)[:, None] % (spec.chunk_length + 1)
        inputs[policyfile.PREFIX_MASK] = (np.arange(spec.chunk_length) < count).astype(np.float32)
    return inputs


@torch.no_grad()
def _inputs(graph: ExportedGraph, spec: PolicySpec, batch: int, prefix: bool) -> dict[str, FloatArray]:
    """Random inputs for which rounding decides no choice between candidates: of more than enough, the clearest."""
    if not isinstance(graph.policy, QC):
        return _random_inputs(spec, batch, prefix)
    many = _random_inputs(spec, 8 * batch, prefix)
    margin = graph.margin(*map(torch.from_numpy, many.values()))
    clearest = margin.argsort(descending=True)[:batch].sort().values.numpy()
    return {name: x[clearest] for name, x in many.items()}


@torch.no_grad()
def _run_torch(graph: ExportedGraph, inputs: Mapping[str, FloatArray]) -> FloatArray:
    actions: FloatArray = graph(*map(torch.from_numpy, inputs.values())).numpy()
    return actions


def _open(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _compare(graphs: _Graphs, spec: PolicySpec, model: onnx.ModelProto, batches: Sequence[int]) -> float:
    """Largest difference of the file's actions from the trained policy's and, given a prefix, the folded one's in torch."""
    session, worst = _open(model), 0.0
    cases = [(graphs.plain, False), *([(graphs.folded, True)] if graphs.prefix else [])]
    for batch in batches:
        for graph, prefix in cases:
            inputs = _inputs(graph, spec, batch, prefix)
            difference = policyfile.action_error(spec, session.run(None, inputs)[0], _run_torch(graph, inputs))
            worst = max(worst, difference) if np.isfinite(difference) else float("inf")
    return worst
