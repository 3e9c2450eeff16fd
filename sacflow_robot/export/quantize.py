"""Weights of an exported graph in fewer bits.

float16 and bf16 are how weights are stored: the file is half as large, and a ``Cast`` in front of each product, which ONNX
Runtime does once when it loads the file, makes float32 of them again. Products are in float32, for on x86 its CPU provider has
no others. int8 computes in int8: ``MatMulNBits`` with blocks of 32 along the sum, each with a scale of its own, of the weights
and of what they are multiplied with. Unlike ``DynamicQuantizeLinear``, whose one scale is of the whole batch, a row's result does
not depend on the rows beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper

from sacflow_robot.errors import ExportError
from sacflow_robot.export.metadata import WeightsKind

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


def _weights(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Initializers that are the second factor of a product, by name."""
    seconds = {node.input[1] for node in model.graph.node if node.op_type in ("Gemm", "MatMul")}
    return {t.name: t for t in model.graph.initializer if t.name in seconds}


def _to_half(model: onnx.ModelProto, kind: WeightsKind) -> None:
    dtype, number = _HALVES[kind]
    casts = []
    for name, tensor in _weights(model).items():
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
