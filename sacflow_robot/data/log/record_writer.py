"""Write steps into the records of a ring."""

from __future__ import annotations

import struct
from mmap import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.data.log.ring import HEAD, HEADER_BYTES, Kind, Layout, Ring
from sacflow_robot.episode import Step
from sacflow_robot.errors import DataError
from sacflow_robot.spec import RobotSpec

# Found once: writing a step has no time to look things up.
_pack_head = struct.Struct(HEAD).pack_into
_isfinite = np.isfinite

_Place = tuple[str, np.dtype[Any], tuple[int, ...], int, int]
"""Name, dtype, shape and byte range of an array in a record."""


def _copy(memory: mmap, base: int, array: npt.NDArray[Any], place: _Place) -> None:
    """Copy an array to its place in the record that begins at ``base``."""
    name, dtype, shape, start, stop = place
    if array.shape != shape:
        raise DataError(f"{name} has shape {array.shape}, expected {shape}; the step was not logged")
    content: Any = array if array.dtype is dtype else np.ascontiguousarray(array, dtype)
    try:
        memory[base + start : base + stop] = content
    except (BufferError, ValueError):  # it does not lie in one piece
        content = np.ascontiguousarray(array)
        memory[base + start : base + stop] = content


class RecordWriter:
    """Fill the records of a ring.

    Args:
        ring: The ring.
        layout: How a record lies in memory.
        robot: The robot whose steps they hold.
        state_size: S of the simulator's state; 0 for none.
    """

    def __init__(self, ring: Ring, layout: Layout, robot: RobotSpec, state_size: int) -> None:
        self.state_size = state_size
        self.bytes = layout.bytes
        self._ring = ring
        self._unmeasured = np.full(robot.action_dim, np.nan, np.float32)
        fields = layout.step.fields
        assert fields is not None

        def place(name: str) -> _Place:
            dtype, start = fields[name][:2]
            return name, dtype.base, dtype.shape, start, start + dtype.itemsize

        self._places = [place(a.key) for a in robot.observations]
        self._actions = [place(name) for name in ("action", "policy_action", "measured", "intervention_action")]
        self._state = place("state") if state_size else None
        self._finite = [self._finite_check("<f4", layout.finite_floats, self._actions[0][3])]
        if self._state is not None:
            self._finite.append(self._finite_check("<f8", state_size, self._state[3]))

    def _finite_check(
        self, dtype: str, count: int, start: int
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_], bytearray]:
        """View of what must be finite in each record, room for the answer, and that room as bytes, which are quickly searched."""
        memory = bytearray(count)
        return self._ring.columns(dtype, count, start), np.frombuffer(memory, np.bool_), memory

    def write_info(self, kind: Kind, text: npt.NDArray[np.uint8], index: int) -> None:
        """Fill the record of that number with an episode's info; it does not count yet."""
        record = self._ring.infos[index % self._ring.capacity]
        record["index"] = index
        record["kind"] = kind
        record["info"] = text

    def write_step(self, kind: int, step: Step, index: int) -> None:
        """Fill the record of that number; it does not count yet.

        This is what the control loop pays, mostly in cache misses: plain copies, and little code on the common path.
        """
        ring = self._ring
        result, action, time_ns, policy_action, source, flags, received_ns, inferred_ns, sent_ns, by_hand = step
        memory, place = ring.map, index % ring.capacity
        base = HEADER_BYTES + place * self.bytes
        # fmt: off
        _pack_head(
            memory, base, index, 0, kind, time_ns, received_ns, inferred_ns, sent_ns,
            result.reward, source, flags, result.terminated, result.truncated,
        )
        # fmt: on
        measured, (sent, asked, done, intervened) = result.measured, self._actions
        _copy(memory, base, action, sent)
        _copy(memory, base, action if policy_action is None else policy_action, asked)
        _copy(memory, base, self._unmeasured if measured is None else measured, done)
        _copy(memory, base, self._unmeasured if by_hand is None else by_hand, intervened)
        for array in self._places:
            _copy(memory, base, result.observation[array[0]], array)
        if self._state is not None:
            if result.state is None:
                raise DataError("a simulator state is missing; the step was not logged")
            _copy(memory, base, result.state, self._state)
        for rows, finite, answer in self._finite:
            _isfinite(rows[place], finite)
            if 0 in answer:
                raise DataError("an observation, action or state holds NaN or infinity; the step was not logged")
