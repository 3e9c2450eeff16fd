"""Export of a policy as one ONNX graph: a flow with its K Euler steps unrolled, the best of N with the critic inside."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from sacflow_robot import policyfile
from sacflow_robot.errors import ExportError, one_line
from sacflow_robot.learn.agent import Agent
from sacflow_robot.learn.policies import BestOf
from sacflow_robot.learn.policy import PolicyNetwork
from sacflow_robot.learn.velocity import fold_weights
from sacflow_robot.spec import ArmSpec, FloatArray, PolicySpec

_CHECKED_BATCHES = (1, 7, 64)
_OPSET = 20


class ExportedGraph(nn.Module):
    """The policy as its file sees it: observation arrays and noise in, action chunks out."""

    def __init__(self, policy: nn.Module, arm: ArmSpec) -> None:
        super().__init__()
        self.policy, self._sizes = policy, [a.size for a in arm.observations]

    def forward(self, *arrays: Tensor) -> Tensor:
        """Actions (B, H, A) from one array (B, *shape) per observation key, and noise (B, H, A) last."""
        *observation, noise = arrays
        flat = torch.cat([x.flatten(1) for x in observation], -1)
        actions: Tensor = self.policy(flat, noise.flatten(1))
        return actions.reshape(noise.shape)

    def margin(self, *arrays: Tensor) -> Tensor:
        """By how much the action chosen is better than the next (B,), where there is a choice; else infinity."""
        *observation, noise = arrays
        if not isinstance(self.policy, BestOf):
            return torch.full(noise.shape[:1], torch.inf)
        _, values = self.policy.candidates(torch.cat([x.flatten(1) for x in observation], -1), noise.flatten(1))
        best = values.topk(2, -1).values
        return best[:, 0] - best[:, 1]


def export_agent(agent: Agent, notes: Mapping[str, Any], path: Path) -> float:
    """Write what an agent acts with to ``path``; see :func:`export_policy`."""
    policy = agent.average_policy
    best_of = agent.config.learner.best_of
    more = {"best_of": best_of} if best_of > 1 else {}
    return export_policy(agent.exported, make_spec(policy, agent.arm, policy.name, {**notes, **more}), path)


def make_spec(policy: PolicyNetwork, arm: ArmSpec, velocity: str, notes: Mapping[str, Any]) -> PolicySpec:
    """The contract of a policy."""
    return PolicySpec(
        arm=arm,
        chunk_length=policy.action_dim // arm.action_dim,
        euler_steps=policy.euler_steps,
        velocity=velocity,
        observation_mean=tuple(policy.observation_mean.tolist()),
        observation_std=tuple(policy.observation_std.tolist()),
        notes=notes,
    )


def export_policy(policy: nn.Module, spec: PolicySpec, path: Path) -> float:
    """Write the policy to ``path``, complete or not at all.

    Args:
        policy: The policy to export: a ``PolicyNetwork``, or the best of several of its samples.
        spec: Its contract.
        path: File to write, replaced if it exists.

    Returns:
        Largest absolute difference between ONNX Runtime and torch at batch 1, 7 and 64.

    Raises:
        ExportError: The difference exceeds 1e-5, or the file cannot be written.
    """
    graph = ExportedGraph(copy.deepcopy(policy), spec.arm).to("cpu").eval()
    fold_weights(graph)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        model = _to_onnx(graph, spec)
        golden = _decided_inputs(graph, spec, 4)
        golden[policyfile.ACTIONS] = _run_torch(graph, golden)
        metadata = {
            policyfile.SPEC_KEY: spec.to_json(),
            policyfile.FINGERPRINT_KEY: spec.fingerprint,
            policyfile.GOLDEN_KEY: policyfile.pack_arrays(golden),
        }
        onnx.helper.set_model_props(model, metadata)
        onnx.save(model, partial)
        worst = _compare(graph, spec, partial)
        if not worst <= policyfile.TOLERANCE:
            raise ExportError(
                f"ONNX Runtime differs from torch by {worst:.2e}, allowed is {policyfile.TOLERANCE:.0e}; {path} not written"
            )
        partial.replace(path)
        return worst
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from None
    except (ValueError, RuntimeError, onnx.onnx_cpp2py_export.checker.ValidationError) as error:
        raise ExportError(f"the policy cannot be exported: {one_line(error)}; {path} not written") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _to_onnx(graph: ExportedGraph, spec: PolicySpec) -> onnx.ModelProto:
    names = [*(a.key for a in spec.arm.observations), policyfile.NOISE]
    example = _random_inputs(spec, 2)
    batch = torch.export.Dim("batch", min=1)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter warns about its own deprecated internals
        program = torch.onnx.export(
            graph,
            tuple(torch.from_numpy(example[name]) for name in names),
            input_names=names,
            output_names=[policyfile.ACTIONS],
            dynamic_shapes=(tuple({0: batch} for _ in names),),
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
    return model


def _random_inputs(spec: PolicySpec, batch: int) -> dict[str, FloatArray]:
    """Inputs around the normaliser's mean, by name; the same for the same spec and batch."""
    rng = np.random.default_rng(batch)
    spread = rng.standard_normal((batch, spec.arm.observation_dim)).astype(np.float32)
    flat = np.array(spec.observation_mean, np.float32) + np.array(spec.observation_std, np.float32) * spread
    inputs, start = {}, 0
    for array in spec.arm.observations:
        inputs[array.key] = np.ascontiguousarray(flat[:, start : start + array.size]).reshape(batch, *array.shape)
        start += array.size
    inputs[policyfile.NOISE] = rng.standard_normal((batch, *spec.noise_shape)).astype(np.float32)
    return inputs


@torch.no_grad()
def _decided_inputs(graph: ExportedGraph, spec: PolicySpec, batch: int) -> dict[str, FloatArray]:
    """Random inputs for which rounding decides no choice between candidates: of more than enough, the clearest."""
    if not isinstance(graph.policy, BestOf):
        return _random_inputs(spec, batch)
    many = _random_inputs(spec, 8 * batch)
    margin = graph.margin(*(torch.from_numpy(x) for x in many.values()))
    clearest = margin.argsort(descending=True)[:batch].sort().values.numpy()
    return {name: x[clearest] for name, x in many.items()}


@torch.no_grad()
def _run_torch(graph: ExportedGraph, inputs: Mapping[str, FloatArray]) -> FloatArray:
    actions: FloatArray = graph(*(torch.from_numpy(x) for x in inputs.values())).numpy()
    return actions


def _compare(graph: ExportedGraph, spec: PolicySpec, path: Path) -> float:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in _CHECKED_BATCHES:
        inputs = _decided_inputs(graph, spec, batch)
        difference = np.abs(session.run(None, inputs)[0] - _run_torch(graph, inputs)).max()
        worst = max(worst, float(difference)) if np.isfinite(difference) else float("inf")
    return worst
