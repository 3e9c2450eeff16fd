"""Export of a torch policy as one checked ONNX file, its weights perhaps in fewer bits.

float16 and bf16 are how weights are stored: the file is half as large, and a ``Cast`` in front of each product, which ONNX
Runtime does once when it loads the file, makes float32 of them again. Products are in float32, for on x86 its CPU provider has
no others. int8 computes in int8: ``MatMulNBits`` with blocks of 32 along the sum, each with a scale of its own, of the weights
and of what they are multiplied with. Unlike ``DynamicQuantizeLinear``, whose one scale is of the whole batch, a row's result does
not depend on the rows beside it.
"""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import nn

from sacflow_robot.errors import ExportError, one_line
from sacflow_robot.export import metadata as policyfile
from sacflow_robot.export.graph import ExportablePolicy, ExportedGraph
from sacflow_robot.export.metadata import WeightsKind
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
    inputs = {key: np.ascontiguousarray(rows) for key, rows in spec.robot.unflatten(flat).items()}
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


def _open(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def _compare(
    trained: ExportedGraph, graph: ExportedGraph, spec: PolicySpec, model: onnx.ModelProto, batches: Sequence[int]
) -> float:
    """Largest difference of the file's actions from the trained policy's and, given a prefix, from those of its twin."""
    session, worst = _open(model), 0.0
    cases = [(trained, False), *([(graph, True)] if graph.takes_prefix else [])]
    for batch in batches:
        for original, prefix in cases:
            inputs = _inputs(original, spec, batch, prefix=prefix)
            expected = original(*map(torch.from_numpy, inputs.values())).numpy()
            difference = policyfile.action_error(spec, session.run(None, inputs)[0], expected)
            worst = max(worst, difference) if np.isfinite(difference) else float("inf")
    return worst


_HALVES = {"float16": (torch.float16, onnx.TensorProto.FLOAT16), "bf16": (torch.bfloat16, onnx.TensorProto.BFLOAT16)}
_BLOCK = 32
_LEAST_SUM = 64  # observations and actions themselves are narrower, and are not rounded to 8 bits
_CONTRIB = "com.microsoft"

Array = npt.NDArray[np.float32]
Arrays = dict[str, npt.NDArray[Any]]


def store_weights(model: onnx.ModelProto, kind: WeightsKind) -> onnx.ModelProto:
    """A copy of the graph with the weights of its matrix products in ``kind``; biases and all else stay float32.

    Raises:
        ExportError: A weight is too large for float16.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    if kind == "int8":
        _to_int8(changed)
    elif kind != "float32":
        _to_half(changed, kind)
    return changed


def _to_half(model: onnx.ModelProto, kind: WeightsKind) -> None:
    dtype, number = _HALVES[kind]
    factors = {node.input[1] for node in model.graph.node if node.op_type in ("Gemm", "MatMul")}
    casts = []
    for tensor in (t for t in model.graph.initializer if t.name in factors):
        name = tensor.name
        value = torch.from_numpy(numpy_helper.to_array(tensor).copy()).to(dtype)
        if not bool(value.isfinite().all()):
            raise ExportError(f"weight {name} is too large for {kind}; export with --weights bf16 or float32")
        raw = value.view(torch.int16).numpy().astype("<i2").tobytes()
        stored = onnx.TensorProto(name=f"{name}_{kind}", data_type=number, dims=tensor.dims, raw_data=raw)
        tensor.CopyFrom(stored)
        casts.append(onnx.helper.make_node("Cast", [stored.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _to_int8(model: onnx.ModelProto) -> None:
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    made: Arrays = {}
    for node in model.graph.node:
        weight = values.get(node.input[1]) if node.op_type in ("Gemm", "MatMul") else None
        if weight is None or weight.ndim != 2:
            nodes.append(node)
            continue
        options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        matrix = weight.T if options.get("transB") else weight
        if len(matrix) < _LEAST_SUM or options.get("transA"):
            nodes.append(node)
            continue
        nodes += _int8_product(node, matrix, options, values, made)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [t for t in model.graph.initializer if t.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, *(numpy_helper.from_array(v, k) for k, v in made.items())])
    if _CONTRIB not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(_CONTRIB, 1))


def _int8_product(
    node: onnx.NodeProto, matrix: Array, options: dict[str, float], values: Arrays, made: Arrays
) -> list[onnx.NodeProto]:
    """Nodes that compute alpha x W + beta C as ``node`` does, with W (in, out) in int8."""
    alpha, beta = options.get("alpha", 1.0), options.get("beta", 1.0)
    name, out = f"{node.input[1]}_int8_{node.output[0]}" if alpha != 1 else f"{node.input[1]}_int8", node.output[0]
    codes, scales = _blocks(alpha * matrix)
    made[name], made[f"{name}_scale"] = codes, scales
    inputs = [node.input[0], name, f"{name}_scale"]
    added = node.input[2] if len(node.input) > 2 else ""
    bias = values.get(added)
    if bias is not None and bias.size == matrix.shape[1]:
        made[f"{out}_bias"] = (beta * bias).astype(np.float32).reshape(-1)
        inputs, added = [*inputs, "", "", f"{out}_bias"], ""
    product = onnx.helper.make_node(
        "MatMulNBits", inputs, [f"{out}_product" if added else out], domain=_CONTRIB,
        K=len(matrix), N=matrix.shape[1], bits=8, block_size=_BLOCK, accuracy_level=4,
    )  # fmt: skip
    if not added:
        return [product]
    nodes = [product]
    if beta != 1:
        made[f"{out}_beta"] = np.array(beta, np.float32)
        nodes.append(onnx.helper.make_node("Mul", [added, f"{out}_beta"], [f"{out}_added"]))
        added = f"{out}_added"
    return [*nodes, onnx.helper.make_node("Add", [f"{out}_product", added], [out])]


def _blocks(matrix: Array) -> tuple[npt.NDArray[np.uint8], Array]:
    """Codes (out, blocks, 32), 128 standing for 0, and scales (out * blocks,) of a weight (in, out)."""
    count = -(-len(matrix) // _BLOCK)
    rows = np.zeros((matrix.shape[1], count * _BLOCK), np.float32)
    rows[:, : len(matrix)] = matrix.T
    blocks = rows.reshape(-1, count, _BLOCK)
    scales = np.maximum(np.abs(blocks).max(-1, keepdims=True) / 127, np.finfo(np.float32).tiny)
    codes = (np.rint(blocks / scales) + 128).astype(np.uint8)
    return codes, scales.astype(np.float32).reshape(-1)
