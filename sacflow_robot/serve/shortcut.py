"""The short way through the checks, for a client that asks again with arrays of the same names, shapes and types.

A control loop sends the same layout every time. Once one such request has passed all checks, what is left to check of the
next is the frames' sizes, that every number is finite, in one pass over all arrays, and that a mask is one. What fails here
goes the long way, which says why: the short one accepts nothing that the long one refuses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sacflow_robot.export.metadata import is_mask
from sacflow_robot.serve import protocol as wire
from sacflow_robot.spec import FloatArray, all_finite

_MOST_BYTES = 16 * 1024  # up to here copying the arrays into one piece is quicker than looking at each
_FLOAT = np.dtype("<f4")
_OPTIONAL = {wire.PREFIX, wire.PREFIX_MASK}  # where a request has none, the same zeros every time


class Packed(NamedTuple):
    """All numbers that one request brings, one after another, and how they are to be taken."""

    values: FloatArray
    shortcut: Shortcut

    def arrays(self) -> dict[str, FloatArray]:
        """What the policy takes, by name."""
        return self.shortcut.arrays(self.values)

    def run(self) -> FloatArray:
        """The policy's actions (B, H, A); may hold NaN or infinity.

        Raises:
            PolicyFileError: The graph cannot be evaluated.
        """
        return self.shortcut.run(self.values)


class Shortcut:
    """How to read frames laid out as those of a request that passed, and have the policy evaluate them.

    Args:
        layout: The request's ``arrays``.
        inputs: What was made of it, by name: what the policy takes.
        bind: The policy's; see :meth:`~sacflow_robot.export.onnx_policy.OnnxPolicy.bind`.
    """

    def __init__(
        self,
        layout: Sequence[Sequence[Any]],
        inputs: Mapping[str, FloatArray],
        bind: Callable[[Mapping[str, FloatArray]], Callable[[], FloatArray]],
    ) -> None:
        places = {entry[0]: i for i, entry in enumerate(layout, 1)}
        self._layout, self.rows = layout, len(next(iter(inputs.values())))
        self._sizes = [np.dtype(kind).itemsize * math.prod(shape) for _, kind, shape in layout]
        self._places: list[int] = []
        self._mask: slice | None = None
        self._views: list[tuple[str, int, int, tuple[int, ...]]] = []
        start = 0
        self._fixed = {name: array for name, array in inputs.items() if name not in places}
        for name, array in inputs.items():
            if name in self._fixed:
                continue
            self._places.append(places[name])
            if name == wire.PREFIX_MASK:
                self._mask = slice(start, start + array.size)
            self._views.append((name, start, start + array.size, array.shape))
            start += array.size
        self._values = np.zeros(start, np.float32)
        self._evaluate = bind(self.arrays(self._values))

    @staticmethod
    def applies(layout: Sequence[Sequence[Any]], inputs: Mapping[str, FloatArray]) -> bool:
        """Whether there is a short way: few float32 values, each array given once, as the policy takes it."""
        names = [entry[0] for entry in layout]
        return (
            len(set(names)) == len(names)
            and inputs.keys() - set(names) <= _OPTIONAL
            and all(entry[1] == "<f4" for entry in layout if entry[0] in inputs)
            and all(array.dtype == _FLOAT for array in inputs.values())
            and sum(array.nbytes for array in inputs.values()) <= _MOST_BYTES
        )

    def fits(self, layout: Any) -> bool:
        """Whether a request's ``arrays`` are like those of the one that passed."""
        # True and 1.0 equal 1, but no extent may be one of them.
        if layout != self._layout:
            return False
        for _, _, shape in layout:
            for extent in shape:
                if type(extent) is not int:
                    return False
        return True

    def read(self, frames: Sequence[Any]) -> Packed | None:
        """What is in the frames (header first); None where the long way has to say what is wrong."""
        if [len(frame) for frame in frames[1:]] != self._sizes:
            return None
        values = np.frombuffer(b"".join([frames[place] for place in self._places]), _FLOAT)
        if not all_finite(values) or (self._mask is not None and not is_mask(values[self._mask])):
            return None
        return Packed(values, self)

    def arrays(self, values: FloatArray) -> dict[str, FloatArray]:
        """Views of all the numbers, by name."""
        return {**self._fixed, **{name: values[i:j].reshape(shape) for name, i, j, shape in self._views}}

    def run(self, values: FloatArray) -> FloatArray:
        """The policy's actions for them."""
        self._values[:] = values
        return self._evaluate()
