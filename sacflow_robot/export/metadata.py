"""ONNX metadata of a policy file.

Inputs of the graph: one per observation key (B, *shape) float32, and ``noise`` (B, H, A) float32. Output: ``actions``
(B, H, A) float32 in the robot's units. B is dynamic. Optional inputs, of flow policies: ``prefix`` (B, H, A) float32, actions,
and ``prefix_mask`` (B, H) float32, 1 where the step is committed already; ``actions`` equals ``prefix`` there, and the flow
completes the rest. Left out, nothing is committed. Metadata: ``sacflow_robot.spec``, the ``PolicySpec`` as JSON;
``sacflow_robot.fingerprint``, its SHA-256; ``sacflow_robot.golden``, inputs and the outputs that they must give.
"""

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from sacflow_robot.errors import DataError, PolicyFileError, one_line
from sacflow_robot.spec import FloatArray, PolicySpec

WeightsKind = Literal["float32", "float16", "bf16", "int8"]  # format of a file's weights; see ``to_onnx.store_weights``
SPEC_KEY = "sacflow_robot.spec"
FINGERPRINT_KEY = "sacflow_robot.fingerprint"
GOLDEN_KEY = "sacflow_robot.golden"
NOISE, ACTIONS = "noise", "actions"
PREFIX, PREFIX_MASK = "prefix", "prefix_mask"

# Largest absolute difference allowed between a graph's output and the original's, where an action's half range is 1.
TOLERANCE = 1e-5

MAX_BYTES = 2**30  # largest policy file that is read
_MOST_TOLERANCE = 0.1


def tolerance(spec: PolicySpec) -> float:
    """Largest absolute difference allowed between what a graph puts out and its golden vectors.

    ``TOLERANCE``; but products in int8 round what they multiply, and where a value lies between two codes, the last bit of
    another processor decides. There it is the error that int8 was measured to make, and 0.1 at most.
    """
    stated = spec.notes.get("max_action_error")
    if spec.notes.get("weights") != "int8" or not isinstance(stated, float):
        return TOLERANCE
    return min(max(stated, TOLERANCE), _MOST_TOLERANCE)


def action_error(spec: PolicySpec, actions: FloatArray, expected: FloatArray) -> float:
    """Largest absolute difference of actions (..., A), where the half range of each dimension is 1.

    Float32 rounds the values of a range far from zero by more than what it is short of; one rounding is not a difference.
    """
    difference = np.abs(actions - expected)
    if not spec.robot.has_unit_actions:
        _, half = spec.robot.action_scale
        rounding = np.spacing(np.abs(spec.robot.action_bounds).max(0))
        difference = np.maximum(difference - rounding, 0) / half
    return float(difference.max())


def pack_arrays(arrays: Mapping[str, FloatArray]) -> str:
    """Float32 arrays as JSON of shapes and base64 little-endian bytes."""
    packed = {
        name: {"shape": array.shape, "data": base64.b64encode(array.astype("<f4").tobytes()).decode()}
        for name, array in arrays.items()
    }
    return json.dumps(packed, separators=(",", ":"))


def unpack_arrays(text: str) -> dict[str, FloatArray]:
    """Inverse of :func:`pack_arrays`.

    Raises:
        DataError: The text is not what ``pack_arrays`` writes.
    """
    try:
        return {
            name: np.frombuffer(base64.b64decode(entry["data"], validate=True), "<f4").reshape(entry["shape"])
            for name, entry in json.loads(text).items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"packed arrays cannot be read: {error!r}") from None


def read_file(path: Path) -> bytes:
    """A policy file's content, read at once: the file may be replaced at any time.

    Raises:
        PolicyFileError: It is missing, cannot be read, or is larger than a policy file is.
    """
    if not path.is_file():
        raise PolicyFileError(f"no policy file at {path}; check the path, or make one with 'sacflow-robot train'")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(MAX_BYTES + 1) if size <= MAX_BYTES else b""
    except OSError as error:
        raise PolicyFileError(f"{path} cannot be read: {one_line(error)}") from None
    if max(size, len(content)) > MAX_BYTES:
        raise PolicyFileError(
            f"{path} has {max(size, len(content)) / 2**30:.1f} GiB, a policy file {MAX_BYTES / 2**30:g} GiB at most; "
            "is it the right file?"
        )
    return content


def content_version(content: bytes) -> str:
    """Policy version: the first 12 hexadecimal digits of the content's SHA-256."""
    return hashlib.sha256(content).hexdigest()[:12]


def file_version(path: Path) -> str:
    """:func:`content_version` of a file.

    Raises:
        PolicyFileError: As :func:`read_file`.
    """
    return content_version(read_file(path))
