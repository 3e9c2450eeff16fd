"""Episodes as the columns of an episode log, rows per step and rows per episode, and what other formats call them.

Anything that does not fit an episode log raises DataError.
"""

import json
import zlib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from sacflow_robot.episode import STEP_TIMES, UNKNOWN_TIME, Episode, StepFlag
from sacflow_robot.errors import DataError, one_line
from sacflow_robot.spec import RobotSpec

Columns = dict[str, npt.NDArray[Any]]

UNREADABLE = (
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
)
"""Errors that NumPy and the libraries of file formats raise on files that are damaged, or something else."""

FORMAT, VERSION = "sacflow-robot episodes", 2
INFO_BYTES = 1024


class Names(Protocol):
    """Names of the columns in a file."""

    def __contains__(self, name: str, /) -> bool: ...


# Columns that files of version 0.1 keep under another name.
OLD_NAMES = {"policy_action": "proposed", "intervention_action": "human"}
_NEW_NAMES = {old: new for new, old in OLD_NAMES.items()}


def stored_name(name: str, stored: Names) -> str:
    """Name under which a file that holds these names keeps a column, e.g. ``data/policy_action``."""
    group, slash, column = name.rpartition("/")
    old = group + slash + OLD_NAMES.get(column, column)
    return old if old in stored and name not in stored else name


def current_name(name: str, stored: Names) -> str:
    """Name of the column that a file with these names keeps under a name; the inverse of :func:`stored_name`."""
    group, slash, column = name.rpartition("/")
    new = group + slash + _NEW_NAMES.get(column, column)
    return name if new in stored else new


class Column(NamedTuple):
    """One column of :class:`Episode`, and its name in each format."""

    attribute: str  # of :class:`Episode`
    log: str  # array of an episode log
    hdf5: str  # dataset of a demonstration in robomimic's layout
    # feature; LeRobot takes every name that begins with ``action`` or ``observation`` for a policy's output or input,
    # so that only the action sent is called so
    lerobot: str
    dtype: str  # NumPy name of its type
    vector: bool = False  # whether each row is a vector, which formats that drop extents of 1 do not tell
    # what stands in a log for an episode that lacks it: one of an earlier version, or made elsewhere
    fill: float | None = None

    def typed(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Rows as they came out of a file, with an episode's type and number of axes."""
        shaped = rows.reshape(len(rows), -1) if self.vector else rows.reshape(len(rows))
        return shaped.astype(self.dtype, copy=False)


_INTERVENTION = ("intervention_action", "intervention_action", "intervention_action", "intervention_action")
STEP_COLUMNS = (
    Column("action", "action", "actions", "action", "float32", vector=True),
    Column("policy_action", "policy_action", "policy_action", "policy_action", "float32", vector=True),
    Column("measured", "measured", "measured", "measured", "float32", vector=True),
    Column("source", "source", "source", "source", "uint8"),
    Column("rewards", "reward", "rewards", "next.reward", "float32"),
    Column("terminated", "terminated", "dones", "next.terminated", "bool"),
    Column("truncated", "truncated", "truncated", "next.truncated", "bool"),
    *(Column(name, name, name, name, "int64", fill=UNKNOWN_TIME) for name in STEP_TIMES),
    Column("flags", "flags", "flags", "flags", "uint8", fill=int(StepFlag.UNKNOWN)),
    Column(*_INTERVENTION, "float32", vector=True, fill=float("nan")),
)
"""One row per step (T, ...). A column that joins Episode joins every format by one more row here."""

OBSERVATION_COLUMNS = (
    Column("time_ns", "time_ns", "time_ns", "time_ns", "int64"),
    Column("states", "state", "states", "sim_state", "float64", vector=True),
)
"""One row per observation (T + 1, ...), beside the observations themselves."""

FILLS = {column.log: column.fill for column in STEP_COLUMNS if column.fill is not None}
LOG_DTYPES = {column.log: column.dtype for column in (*STEP_COLUMNS, *OBSERVATION_COLUMNS)}


def step_columns(episode: Episode, robot: RobotSpec) -> Columns:
    """Columns with one row per step (T, ...), for the group ``data``."""
    columns: Columns = {key: rows[:-1] for key, rows in _observed(episode, robot).items()}
    for column in STEP_COLUMNS:
        rows = getattr(episode, column.attribute)
        if rows is None:
            rows = np.full(episode.action.shape if column.vector else len(episode), column.fill)
        columns[column.log] = np.asarray(rows, column.dtype)
    return columns


def episode_columns(episode: Episode, robot: RobotSpec) -> Columns:
    """Columns with one row for the episode (1, ...), for the group ``meta``."""
    last = {f"last_{key}": rows[-1:] for key, rows in _observed(episode, robot).items()}
    return {**last, "info": info_row(episode.info)[None]}


def _observed(episode: Episode, robot: RobotSpec) -> Columns:
    """Columns with one row per observation (T + 1, ...)."""
    columns: Columns = {a.key: episode.observations[a.key].astype(a.dtype, copy=False) for a in robot.observations}
    for column in OBSERVATION_COLUMNS:
        if (rows := getattr(episode, column.attribute)) is not None:
            columns[column.log] = np.asarray(rows, column.dtype)
    return columns


def info_row(info: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    """An episode's info as one row (1024,) of JSON bytes, deflated (RFC 1950) if it would not fit otherwise."""
    try:
        text = json.dumps(dict(info), separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"episode info is not JSON: {one_line(error)}") from None
    if len(text) > INFO_BYTES:
        text = zlib.compress(text, 9)
    if len(text) > INFO_BYTES:
        raise DataError(f"episode info takes {len(text)} bytes deflated, a log keeps {INFO_BYTES}; shorten it")
    return np.frombuffer(text.ljust(INFO_BYTES, b"\0"), np.uint8)


def whole_ends(ends: list[int]) -> list[int]:
    """Ends of whole episodes: an interrupted append can leave zeros behind them, as room made but not filled."""
    while ends and ends[-1] == 0:
        ends = ends[:-1]
    if any(later <= earlier for earlier, later in pairwise([0, *ends])):
        raise DataError("meta/episode_ends does not increase")
    return ends


def parse_info(row: npt.NDArray[np.uint8]) -> dict[str, Any]:
    """An episode's info from its row (1024,), which :func:`info_row` made; raises ValueError if it is not that."""
    text = bytes(row)
    try:
        info = json.loads(text.rstrip(b"\0") if text.startswith(b"{") else zlib.decompressobj().decompress(text))
    except zlib.error as error:
        raise ValueError(f"an episode's info is not JSON, deflated or not: {error}") from None
    if not isinstance(info, dict):
        raise ValueError("an episode's info is not a map")
    return info


def parse_attributes(attributes: Mapping[str, Any], path: Path | str) -> tuple[int, RobotSpec]:
    """Version and robot of a log, from the attributes of its root."""
    if attributes.get("format") != FORMAT:
        raise DataError(f"{path} is a Zarr store but not an episode log; expected one written by this program")
    version: Any = attributes.get("version")
    if version not in range(1, VERSION + 1):
        raise DataError(f"{path} has log version {version}, this program reads 1 to {VERSION}; install a later one")
    return int(version), RobotSpec.from_dict(attributes["arm"])


def read_robot(path: Path) -> RobotSpec:
    """The robot of the log in a folder."""
    try:
        return parse_attributes(json.loads((path / ".zattrs").read_text()), path)[1]
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {one_line(error)}") from None
