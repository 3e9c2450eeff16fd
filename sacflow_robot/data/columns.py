"""Episodes as the columns of an episode log: rows per step, and rows per episode."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError
from sacflow_robot.spec import ArmSpec

Columns = dict[str, npt.NDArray[Any]]

_INFO_BYTES = 1024

# Column of the log: attribute of Episode
STEP_COLUMNS = {
    "action": "commanded",
    "proposed": "proposed",
    "measured": "measured",
    "source": "source",
    "reward": "rewards",
    "terminated": "terminated",
    "truncated": "truncated",
}


def step_columns(episode: Episode, arm: ArmSpec) -> Columns:
    """Columns with one row per step (T, ...), for the group ``data``."""
    columns: Columns = {a.key: episode.observations[a.key][:-1] for a in arm.observations}
    columns |= {key: getattr(episode, name) for key, name in STEP_COLUMNS.items()}
    columns["time_ns"] = episode.time_ns[:-1]
    if episode.states is not None:
        columns["state"] = episode.states[:-1]
    return columns


def episode_columns(episode: Episode, arm: ArmSpec) -> Columns:
    """Columns with one row for the episode (1, ...), for the group ``meta``.

    Raises:
        DataError: The episode's info is too long.
    """
    columns: Columns = {f"last_{a.key}": episode.observations[a.key][-1:] for a in arm.observations}
    columns["last_time_ns"] = episode.time_ns[-1:]
    if episode.states is not None:
        columns["last_state"] = episode.states[-1:]
    info = json.dumps(dict(episode.info), separators=(",", ":")).encode()
    if len(info) > _INFO_BYTES:
        raise DataError(f"episode info takes {len(info)} bytes, a log keeps {_INFO_BYTES}; shorten it")
    columns["info"] = np.frombuffer(info.ljust(_INFO_BYTES, b"\0"), np.uint8)[None]
    return columns


def concatenate(parts: Sequence[Columns]) -> Columns:
    """The rows of several episodes, one after another.

    Raises:
        DataError: They do not have the same columns.
    """
    if any(part.keys() != parts[0].keys() for part in parts):
        raise DataError("episodes with and without simulator states cannot share a log; give another path")
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def whole_ends(ends: list[int]) -> list[int]:
    """Ends of whole episodes: an interrupted append can leave zeros behind them, as room made but not filled.

    Raises:
        DataError: They are not increasing; such a log must be mended by hand, and not be written to.
    """
    while ends and ends[-1] == 0:
        ends = ends[:-1]
    if any(later <= earlier for earlier, later in pairwise([0, *ends])):
        raise DataError("meta/episode_ends does not increase")
    return ends


def parse_info(row: npt.NDArray[np.uint8]) -> dict[str, Any]:
    """An episode's info from its row (1024,) of JSON bytes, padded with zeros; raises ValueError if it is not that."""
    info = json.loads(bytes(row).rstrip(b"\0"))
    if not isinstance(info, dict):
        raise ValueError("an episode's info is not a map")
    return info
