"""Steps on their way from the control loop to the log writer: fixed-size records in a ring in shared memory.

One process writes, one reads, neither waits for the other. A record counts once the writer has raised ``published``,
which it does last; its place may be reused once the reader has raised ``drained``. The ring is a file on tmpfs, so it
outlives both processes, though not the computer.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import mmap
import os
import struct
import time
import zlib
from enum import IntEnum
from pathlib import Path
from time import monotonic_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.data.log.columns import INFO_BYTES, LOG_DTYPES, STEP_COLUMNS
from sacflow_robot.episode import STEP_TIMES, Step
from sacflow_robot.errors import DataError, LogWriteError, one_line
from sacflow_robot.spec import RobotSpec

Records = npt.NDArray[np.void]
_Field = tuple[str, tuple[int, ...], npt.NDArray[Any]]
"""Name and shape of an array in a record, and a view of it in all records."""

_TMPFS = Path("/dev/shm")
HEADER = np.dtype(
    [
        *(("token", "S32"), ("capacity", "<u8"), ("published", "<u8"), ("drained", "<u8"), ("beat", "<u8")),
        *(("closed", "u1"), ("error", "S512")),
    ]
)
HEADER_BYTES = 4096
PUBLISHED, DRAINED, BEAT = 5, 6, 7  # as words of 8 bytes
QUIET_NS = 1_000_000_000
_LEAST_BYTES, _MOST_BYTES, _SECONDS = 1 << 20, 1 << 29, 4.0
_ACTIONS = [column.log for column in STEP_COLUMNS if column.vector]

# The scalars that every step's record starts with, for struct and for NumPy. What writing a step needs is found once.
_isfinite = np.isfinite
_pack_head = struct.Struct("@QIIqqqqfBB??").pack_into
_HEAD = [("index", "<u8"), ("crc", "<u4"), ("kind", "<u4")]
_SCALARS = ("time_ns", *STEP_TIMES, "reward", "source", "flags", "terminated", "truncated")


class Kind(IntEnum):
    """Kind of a record."""

    BEGIN = 1  # the episode's info so far
    START = 2  # the observation that the episode starts with
    STEP = 3  # an action, its story, and the observation that it led to
    END = 4  # the episode's final info


class Layout:
    """Layout of a record in memory: one dtype for steps and starts, one of the same size for infos."""

    def __init__(self, robot: RobotSpec, state_size: int) -> None:
        arrays = {a.key: (np.dtype(a.dtype).str, a.shape) for a in robot.observations}
        floats = {key: of for key, of in arrays.items() if of[0] == "<f4"}
        actions = dict.fromkeys(_ACTIONS, ("<f4", (robot.action_dim,)))
        state = {"state": ("<f8", (state_size,))} if state_size else {}
        # What must be finite lies side by side, so that one look finds a NaN in any of it.
        finite = {"action": actions.pop("action"), **floats}
        fields = [(key, *of) for key, of in {**finite, **actions, **arrays, **state}.items()]
        head = [*_HEAD, *((name, LOG_DTYPES[name]) for name in _SCALARS)]
        size = max(np.dtype([*head, *fields]).itemsize, np.dtype(_HEAD).itemsize + INFO_BYTES)
        self.robot = robot
        self.state_size = state_size
        self.finite_floats = sum(math.prod(shape) for _, shape in finite.values())
        self.observed = [*arrays, "time_ns", *state]
        self.acted = ["action", *actions, *(name for name in _SCALARS if name != "time_ns")]
        self.bytes = -(-size // 8) * 8
        self.step = _sized([*head, *fields], self.bytes)
        self.info = _sized([*_HEAD, ("info", "u1", (INFO_BYTES,))], self.bytes)


def _sized(fields: list[Any], size: int) -> np.dtype[np.void]:
    """A dtype filled up to that size by a field of its own: NumPy drops mere padding when it joins arrays."""
    left = size - np.dtype(fields).itemsize
    return np.dtype([*fields, ("left", f"V{left}")] if left else fields)


def _word(place: int) -> property:
    """A whole word of the header, which changes at once."""
    return property(lambda ring: ring.words[place], lambda ring, count: ring.words.__setitem__(place, count))


class Ring:
    """The mapped file. Use :meth:`create` in the writer and :meth:`attach` in the reader."""

    published = _word(PUBLISHED)
    drained = _word(DRAINED)

    def __init__(self, path: Path, layout: Layout, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        # Populated at once, so that no append waits for a page.
        self.map = mmap.mmap(descriptor, 0, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._header = np.frombuffer(self.map, HEADER, 1)
        self.words = memoryview(self.map).cast("Q")
        self.records: Records = np.frombuffer(self.map, layout.step, offset=HEADER_BYTES)
        self.capacity = len(self.records)
        self.layout = layout
        self._infos: Records = self.records.view(layout.info)
        self._unknown = np.full(layout.robot.action_dim, np.nan, np.float32)
        # Views of each array in all records, made once: writing a step has no time to look things up.
        self._actions = [self._field(name) for name in _ACTIONS]
        self._observed = [self._field(a.key) for a in layout.robot.observations]
        self._states = self._field("state") if layout.state_size else None
        first = self.records["action"]
        shape = self.capacity, layout.finite_floats
        checked = [np.lib.stride_tricks.as_strided(first, shape, first.strides)]
        if self._states is not None:
            checked.append(self.records["state"])
        # What must be finite in each record, and room for the answer, which is searched quickly as bytes.
        self._finite = [(rows, room := bytearray(rows.shape[1]), np.frombuffer(room, np.bool_)) for rows in checked]

    def _field(self, name: str) -> _Field:
        rows = self.records[name]
        return name, rows.shape[1:], rows

    @staticmethod
    def create(log: Path, token: str, layout: Layout) -> Ring:
        """Make a ring for some seconds of steps, in the log's own folder where shared memory lacks room."""
        wanted = _SECONDS * layout.robot.control_rate_hz * layout.bytes
        size = HEADER_BYTES + layout.bytes * int(max(16, min(max(wanted, _LEAST_BYTES), _MOST_BYTES) // layout.bytes))
        Ring.remove_orphans(log)
        for path in _places(log):
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                try:
                    os.posix_fallocate(descriptor, 0, size)
                    ring = Ring(path, layout, descriptor)
                except BaseException:
                    path.unlink()
                    os.close(descriptor)
                    raise
                ring._header["capacity"], ring._header["token"] = ring.capacity, token.encode()
                ring.beat()
                return ring
            except OSError as error:
                reason = one_line(error)
        raise LogWriteError(f"no room for {size >> 20} MiB of steps in {_TMPFS} or {log}: {reason}")

    @staticmethod
    def remove_orphans(log: Path) -> None:
        """Remove a ring whose writer was killed before it could put anything into it. The caller holds the log's lock."""
        for path in _places(log):
            with contextlib.suppress(OSError):  # a read-only file system says so even where there is nothing to remove
                path.unlink(missing_ok=True)

    @staticmethod
    def attach(path: Path, token: str, layout: Layout, patience_s: float = 10.0) -> Ring | None:
        """The ring at ``path`` for this process alone, or None when it is gone or another one is there."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LogWriteError(f"the steps in {path} cannot be read: {one_line(error)}") from None
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    raise LogWriteError("another process is still writing the log; wait for it to end") from None
                time.sleep(0.01)
        if not path.exists() or os.fstat(descriptor).st_size <= HEADER_BYTES:
            os.close(descriptor)
            return None
        ring = Ring(path, layout, descriptor)
        if bytes(ring._header["token"][0]) != token.encode():
            ring.close()
            return None
        return ring

    @property
    def closed(self) -> bool:
        """True once the writer publishes no more."""
        return bool(self._header["closed"][0])

    @closed.setter
    def closed(self, value: bool) -> None:
        self._header["closed"][0] = value

    def beat(self) -> None:
        """Say that the reader is alive."""
        self.words[BEAT] = monotonic_ns()

    @property
    def quiet(self) -> bool:
        """True if the reader has not said for a second that it is alive, or has failed."""
        return monotonic_ns() - self.words[BEAT] > QUIET_NS

    @property
    def error(self) -> str:
        """Reason why the reader stopped; empty while all is well."""
        return bytes(self._header["error"][0]).decode(errors="replace")

    @error.setter
    def error(self, text: str) -> None:
        self._header["error"][0] = text.encode()[:500]
        self.words[BEAT] = 0

    def write_info(self, kind: Kind, text: npt.NDArray[np.uint8], index: int) -> None:
        """Fill the record of that number with an episode's info; it does not count yet."""
        record = self._infos[index % self.capacity]
        record["index"] = index
        record["kind"] = kind
        record["info"] = text

    def write_step(self, kind: int, step: Step, index: int) -> None:
        """Fill the record of that number; it does not count yet. This is what the control loop pays."""
        result, action, time_ns, policy_action, source, flags, received_ns, inferred_ns, sent_ns, by_hand = step
        place, unknown, measured = index % self.capacity, self._unknown, result.measured
        # fmt: off
        _pack_head(
            self.map, HEADER_BYTES + place * self.layout.bytes, index, 0, kind, time_ns, received_ns, inferred_ns, sent_ns,
            result.reward, source, flags, result.terminated, result.truncated,
        )
        # fmt: on
        asked = action if policy_action is None else policy_action
        told = (action, asked, unknown if measured is None else measured, unknown if by_hand is None else by_hand)
        for field, array in zip(self._actions, told, strict=True):
            _fill(field, place, array)
        for field in self._observed:
            _fill(field, place, result.observation[field[0]])
        if self._states is not None:
            if result.state is None:
                raise DataError("a simulator state is missing; the step was not logged")
            _fill(self._states, place, result.state)
        for rows, answer, finite in self._finite:
            _isfinite(rows[place], finite)
            if 0 in answer:
                raise DataError("an observation, action or state contains NaN or infinity; the step was not logged")

    def copy(self, first: int, stop: int) -> Records:
        """Records first to stop - 1."""
        start = first % self.capacity
        part: Records = self.records[start : start + stop - first]
        rest = self.records[: stop - first - len(part)]
        return np.concatenate([part, rest])

    def close(self, remove: bool = False) -> None:
        """Let go of the ring's lock, and of its file where asked to."""
        if remove:
            self.path.unlink(missing_ok=True)
        if self._descriptor >= 0:
            # Closing alone would not unlock it: the mapping holds a descriptor of its own while anybody refers to it.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = -1


def _fill(field: _Field, place: int, array: npt.NDArray[Any]) -> None:
    name, shape, rows = field
    if array.shape != shape:
        raise DataError(f"{name} has shape {array.shape}, expected {shape}; the step was not logged")
    rows[place] = array


def _places(log: Path) -> tuple[Path, Path]:
    """Paths of a log's ring, the best one first."""
    name = f"sacflow-{hashlib.sha256(str(log.resolve()).encode()).hexdigest()[:16]}.ring"
    return _TMPFS / name, log / ".writing" / name


def checksum(records: Records) -> npt.NDArray[np.uint32]:
    """CRC-32 of each record (N,), its own field counted as zero."""
    blank = records.copy()
    blank["crc"] = 0
    return np.array([zlib.crc32(record.tobytes()) for record in blank], np.uint32)
