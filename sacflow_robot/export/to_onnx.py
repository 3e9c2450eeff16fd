"""Export of a torch policy as one checked ONNX file."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from sacflow_robot.errors import ExportError, one_line
from sacflow_robot.export import metadata as policyfile
from sacflow_robot.export.graph import ExportablePolicy, ExportedGraph
from sacflow_robot.export.metadata import WeightsKind
from sacflow_robot.export.quantize import store_weights
from sacflow_robot.spec import FloatArray, PolicySpec
from sacflow_robot.utils.atomic_files import replacing

_CHECKED_BATCHES = (1, 7, 64)
_OPSET = 20


def export_policy(
    policy: nn.Module, spec: PolicySpec, path: Path, *, weights: WeightsKind = "float32", prefix: bool = True
) -> float:
    """Write a policy to ``path``, whole or not at all, checked against torch.

    Args:
        policy: Raw observations (B, O) and noise (B, D) to actions (B, D); an :class:`ExportablePolicy` gives its twin.
        spec: Its contract; weights other than float32 are noted in it, with their error.
        path: File to write, replaced if it exists.
        weights: How to keep the weights.
        prefix: Whether a policy that can take what is committed already does.

    Returns:
        Largest absolute difference between ONNX Runtime and torch at batch 1, 7 and 64, where an action's half range is 1.

    Raises:
        ExportError: The difference exceeds 1e-5 with weights in float32, or the file cannot be written.
    """
    plain = copy.deepcopy(policy).to("cpu").eval()
    twin = plain.twin(prefix=prefix) if isinstance(plain, ExportablePolicy) else plain
    trained = ExportedGraph(plain, spec.robot, spec.chunk_length).eval()
    graph = ExportedGraph(twin, spec.robot, spec.chunk_length).eval()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        model = to_onnx(graph, spec)
        worst = _compare(trained, graph, spec, model, _CHECKED_BATCHES)
        if not worst <= policyfile.TOLERANCE:
            raise ExportError(
                f"ONNX Runtime differs from torch by {worst:.2e}, allowed is {policyfile.TOLERANCE:.0e}; {path} not written"
            )
        if weights != "float32":
            model = store_weights(model, weights)
            worst = _compare(trained, graph, spec, model, (*_CHECKED_BATCHES, 1024))
            if not worst < np.inf:
                raise ExportError(f"with weights in {weights} the policy puts out NaN or infinity; {path} not written")
            spec = replace(spec, notes={**spec.notes, "weights": weights, "max_action_error": worst})
        golden = _inputs(graph, spec, 4, prefix=graph.takes_prefix)
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


def to_onnx(graph: ExportedGraph, spec: PolicySpec) -> onnx.ModelProto:
    """The graph as ONNX, without metadata; a prefix that it takes is optional."""
    example = _random_inputs(spec, 2, graph.takes_prefix)
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
    if graph.takes_prefix:
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
def _inputs(graph: ExportedGraph, spec: PolicySpec, batch: int, *, prefix: bool) -> dict[str, FloatArray]:
    """Random inputs for which rounding decides no choice between candidates: the clearest of more than enough."""
    many = _random_inputs(spec, 8 * batch, prefix)
    margin = graph.margin(*map(torch.from_numpy, many.values()))
    if margin is None:
        return _random_inputs(spec, batch, prefix)
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


def _compare(
    trained: ExportedGraph, graph: ExportedGraph, spec: PolicySpec, model: onnx.ModelProto, batches: Sequence[int]
) -> float:
    """Largest difference of the file's actions from the trained policy's and, given a prefix, from those of its twin."""
    session, worst = _open(model), 0.0
    cases = [(trained, False), *([(graph, True)] if graph.takes_prefix else [])]
    for batch in batches:
        for original, prefix in cases:
            inputs = _inputs(original, spec, batch, prefix=prefix)
            difference = policyfile.action_error(spec, session.run(None, inputs)[0], _run_torch(original, inputs))
            worst = max(worst, difference) if np.isfinite(difference) else float("inf")
    return worst
