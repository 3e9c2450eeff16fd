"""Check of a policy file's graph against its specification: names, types and shapes of inputs and outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime

from sacflow_robot.errors import PolicyFileError
from sacflow_robot.export.metadata import ACTIONS, NOISE, PREFIX, PREFIX_MASK
from sacflow_robot.spec import PolicySpec

_TYPES = {"float32": "float", "float64": "double"}


def check_graph(session: onnxruntime.InferenceSession, spec: PolicySpec) -> None:
    """Compare the graph with the specification; the first dimension of everything is the batch.

    Raises:
        PolicyFileError: Names every input and output that differs.
    """
    noise = NOISE, "float32", spec.noise_shape
    wanted = {name: (kind, shape) for name, kind, shape in (*_observations(spec), noise)}
    if len(wanted) <= len(spec.robot.observations) or {PREFIX, PREFIX_MASK} & set(wanted):
        raise PolicyFileError(f"an observation has the name {NOISE}, {PREFIX} or {PREFIX_MASK}, which the graph needs")
    prefix = {PREFIX: ("float32", spec.noise_shape), PREFIX_MASK: ("float32", spec.noise_shape[:1])}
    inputs = {i.name: i for i in session.get_inputs()}
    optional = {i.name: i for i in session.get_overridable_initializers() if i.name in prefix}
    outputs = {o.name: o for o in session.get_outputs()}
    taken = {name: prefix[name] for name in prefix if name in {**inputs, **optional}}
    problems = [
        *_differences("input", {**wanted, **taken}, {**inputs, **optional}),
        *_differences("output", {ACTIONS: ("float32", spec.noise_shape)}, outputs),
    ]
    if len(taken) == 1:
        problems.append(f"it takes {next(iter(taken))} alone; {PREFIX} and {PREFIX_MASK} go together")
    unknown = sorted(inputs.keys() - wanted.keys() - prefix.keys())
    if unknown:
        problems.append(f"it needs an input {', '.join(map(repr, unknown))} that the specification does not know")
    if problems:
        raise PolicyFileError(f"its graph is not what its specification says: {'; '.join(problems)}")


def _observations(spec: PolicySpec) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(array.key, array.dtype, array.shape) for array in spec.robot.observations]


def _differences(what: str, wanted: dict[str, tuple[str, tuple[int, ...]]], there: dict[str, Any]) -> list[str]:
    problems = []
    for name, (dtype, shape) in wanted.items():
        if name not in there:
            have = ", ".join(there) or "none"
            problems.append(f"it has no {what} {name!r}, but {have}")
            continue
        kind = f"tensor({_TYPES.get(dtype, np.dtype(dtype).name)})"
        if there[name].type != kind:
            problems.append(f"{what} {name!r} is {there[name].type}, expected {kind}")
        if not _fits(there[name].shape, shape):
            has = ", ".join(str(extent) for extent in there[name].shape)
            problems.append(f"{what} {name!r} has shape ({has}), expected (B, {', '.join(map(str, shape))}) for any B")
    return problems


def _fits(declared: list[int | str | None], shape: tuple[int, ...]) -> bool:
    """True if a declared shape admits (B, *shape) for every B; names and None stand for any extent."""
    if not declared:
        return True  # nothing is declared
    batch, *rest = declared
    if isinstance(batch, int) or len(rest) != len(shape):
        return False
    return all(not isinstance(extent, int) or extent == wanted for extent, wanted in zip(rest, shape, strict=True))
