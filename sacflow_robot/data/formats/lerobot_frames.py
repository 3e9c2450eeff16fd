"""Frames of a LeRobotDataset's episodes as arrays, once the columns that number and time them agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sacflow_robot.data.formats.checks import check_frames
from sacflow_robot.data.formats.lerobot_files import BOOKKEEPING, INFO, Dataset, EpisodeRow, Feature
from sacflow_robot.errors import DataError

Columns = Mapping[str, npt.NDArray[Any]]


class Frames(NamedTuple):
    """One episode: its columns, its row of the episodes table, and what is said of it in messages."""

    columns: Mapping[str, npt.NDArray[Any]]
    row: EpisodeRow
    fps: float


def origin_of(dataset: Dataset, row: EpisodeRow) -> str:
    return f"{dataset.path / row.file}, episode {row.index}"


def read_frames(dataset: Dataset, wanted: list[str]) -> Iterator[Frames]:
    """Episodes in order, once what numbers and times their frames was found to agree.

    Raises:
        DataError: It does not, or files are missing or damaged; the message names file, episode and frame.
    """
    numbering = [name for name in BOOKKEEPING if name in dataset.features and name != "task_index"]
    names = list(dict.fromkeys([*numbering, *wanted]))
    least_index = 0
    for row, table in dataset.frames(names):
        try:
            columns = {name: _to_array(table[name], dataset.features[name]) for name in names}
            flat = {name: columns[name].reshape(len(columns[name])) for name in numbering}
            _check_order(flat, row, least_index)
        except DataError as error:
            raise DataError(f"{origin_of(dataset, row)}, {error}") from None
        if "timestamp" in flat:
            check_frames(flat["timestamp"], dataset.fps, origin_of(dataset, row))
        if "index" in flat:
            least_index = int(flat["index"][-1]) + 1
        yield Frames(columns, row, dataset.fps)


def _to_array(column: pa.ChunkedArray, feature: Feature) -> npt.NDArray[Any]:
    """A feature of T frames: (T,) where a frame holds one value, else (T, size).

    Raises:
        DataError: A frame lacks a value, or has another number of them than ``meta/info.json`` says.
    """
    values = column.combine_chunks()
    if isinstance(values, pa.ChunkedArray):  # what an empty column stays
        values = pa.concat_arrays(values.chunks) if values.chunks else pa.array([], values.type)
    frames, per_frame, nested = len(values), 1, False
    while _is_list(values.type):
        nested = True
        _check_complete(values, feature.name, per_frame)
        widths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
        width = int(widths[0]) if len(widths) else 1
        if (unequal := np.flatnonzero(widths != width)).size:
            # The first row may be the odd one out.
            odd = unequal[0] if feature.shape[-1] == width else 0
            raise _wrong_width(feature, int(odd) // per_frame, int(widths[odd]))
        values, per_frame = values.flatten(), per_frame * width
    if per_frame != feature.size:
        raise _wrong_width(feature, 0, per_frame)
    _check_complete(values, feature.name, per_frame)
    flat = np.asarray(values.to_numpy(zero_copy_only=False))
    if flat.dtype.kind not in "biuf":
        raise DataError(f"frame 0: {feature.name} holds {values.type}, {INFO} says {feature.dtype}")
    return flat.reshape(frames, per_frame) if nested else flat


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _check_complete(values: pa.Array, name: str, per_frame: int) -> None:
    if values.null_count:
        absent = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"frame {absent // per_frame}: {name} has no value; leave the episode out")


def _wrong_width(feature: Feature, frame: int, found: int) -> DataError:
    return DataError(f"frame {frame}: {feature.name} has {found} values, expected {feature.size} as {INFO} says")


def _check_order(columns: Columns, row: EpisodeRow, least_index: int) -> None:
    """Refuse frames that are not those of the episode, in order, as the columns that number them say.

    Args:
        columns: ``episode_index``, ``index`` and ``frame_index``, as far as there are any; (T,) each.
        row: What the episodes table says.
        least_index: The least global index that a dataset of v2, whose table names none, leaves for the first frame.

    Raises:
        DataError: They are not.
    """
    numbers = np.arange(row.length)
    first = row.first
    if "index" in columns and first is None:
        first = max(int(columns["index"][0]), least_index)
    expected = {"episode_index": np.full(row.length, row.index), "frame_index": numbers}
    if first is not None:
        expected["index"] = first + numbers
    for name, right in expected.items():
        if name in columns and (wrong := np.flatnonzero(columns[name] != right)).size:
            frame = int(wrong[0])
            raise DataError(
                f"frame {frame}: {name} is {columns[name][frame]}, expected {right[frame]}: the frames are out of order "
                "or do not match the episodes table; sort or export the dataset again"
            )
