"""Episodes as the columns of an episode log: rows per step, and rows per episode."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sacflow_robot.episode import STEP_TIMES, UNKNOWN_TIME, Episode, StepFlag
from sacflow_robot.errors import DataError, one_line
from sacflow_robot.spec import RobotSpec

Columns = dict[str, npt.NDArray[Any]]

FORMAT, VERSION = "sacflow-robot episodes", 2
INFO_BYTES = 1024


class Names(Protocol):
    """Names of the columns in a file."""

    def __contains__(self, name: str, /) -> bool: ...


# Columns that files of version 0.1 keep under another name.
OLD_NAMES = {"policy_action": "proposed", "intervention_action": "human"}


def stored_name(name: str, stored: Names) -> str:
    """Name under which a file that holds these names keeps a column, e.g. ``data/policy_action``."""
    group, slash, column = name.rpartition("/")
    if column not in OLD_NAMES or name in stored:
        return name
    old = f"{group}{slash}{OLD_NAMES[column]}"
    return old if old in stored else name


def current_name(name: str, stored: Names) -> str:
    """Name of the column that a file with these names keeps under a name; the inverse of :func:`stored_name`."""
    group, slash, column = name.rpartition("/")
    new = next((f"{group}{slash}{new}" for new, old in OLD_NAMES.items() if old == column), name)
    return name if new in stored else new


# Column of the log: attribute of Episode
STEP_COLUMNS = {
    "action": "action",
    "policy_action": "policy_action",
    "measured": "measured",
    "source": "source",
    "reward": "rewards",
    "terminated": "terminated",
    "truncated": "truncated",
}

# Columns that a log of an earlier version, or an episode made elsewhere, lacks: what stands there instead.
FILLS: dict[str, float] = {
    **dict.fromkeys(STEP_TIMES, UNKNOWN_TIME),
    "flags": int(StepFlag.UNKNOWN),
    "intervention_action": float("nan"),
}

STEP_DTYPES = {
    "action": "<f4",
    "policy_action": "<f4",
    "measured": "<f4",
    "source": "|u1",
    "reward": "<f4",
    "terminated": "|b1",
    "truncated": "|b1",
    "time_ns": "<i8",
    "state": "<f8",
    **dict.fromkeys(STEP_TIMES, "<i8"),
    "flags": "|u1",
    "intervention_action": "<f4",
}


def step_columns(episode: Episode, robot: RobotSpec) -> Columns:
    """Columns with one row per step (T, ...), for the group ``data``."""
    columns: Columns = {a.key: episode.observations[a.key][:-1].astype(a.dtype, copy=False) for a in robot.observations}
    columns |= {key: getattr(episode, name) for key, name in STEP_COLUMNS.items()}
    columns["time_ns"] = episode.time_ns[:-1]
    if episode.states is not None:
        columns["state"] = episode.states[:-1]
    for key, fill in FILLS.items():
        known = getattr(episode, key)
        shape = episode.action.shape if key == "intervention_action" else (len(episode),)
        columns[key] = np.full(shape, fill) if known is None else known
    return {key: np.asarray(rows, STEP_DTYPES.get(key, rows.dtype)) for key, rows in columns.items()}


def episode_columns(episode: Episode, robot: RobotSpec) -> Columns:
    """Columns with one row for the episode (1, ...), for the group ``meta``.

    Raises:
        DataError: The episode's info is too long.
    """
    columns: Columns = {
        f"last_{a.key}": episode.observations[a.key][-1:].astype(a.dtype, copy=False) for a in robot.observations
    }
    columns["last_time_ns"] = np.asarray(episode.time_ns[-1:], np.int64)
    if episode.states is not None:
        columns["last_state"] = np.asarray(episode.states[-1:], np.float64)
    columns["info"] = info_row(episode.info)[None]
    return columns


def info_row(info: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    """An episode's info as one row (1024,) of JSON bytes, deflated (RFC 1950) if it would not fit otherwise.

    Raises:
        DataError: It is too long even so, or not JSON.
    """
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
    """Ends of whole episodes: an interrupted append can leave zeros behind them, as room made but not filled.

    Raises:
        DataError: They are not increasing; such a log must be repaired, and not be written to.
    """
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
    """Version and robot of a log, from the attributes of its root.

    Raises:
        DataError: It is no log, or one of a later version.
    """
    if attributes.get("format") != FORMAT:
        raise DataError(f"{path} is a Zarr store but not an episode log; expected one written by this program")
    version: Any = attributes.get("version")
    if version not in range(1, VERSION + 1):
        raise DataError(f"{path} has log version {version}, this program reads 1 to {VERSION}; install a later one")
    return int(version), RobotSpec.from_dict(attributes["arm"])


def read_robot(path: Path) -> RobotSpec:
    """The robot of the log in a folder.

    Raises:
        DataError: It is no log.
        OSError: It cannot be read.
    """
    try:
        return parse_attributes(json.loads((path / ".zattrs").read_text()), path)[1]
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {one_line(error)}") from None
