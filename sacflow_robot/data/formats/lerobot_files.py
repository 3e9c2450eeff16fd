"""The files of a LeRobotDataset v2.0, v2.1 or v3.0: what ``meta/`` says, and the frames of each episode.

What is damaged, incomplete or of another version raises DataError, which names the file, episode and frame.

    v3.0          meta/episodes/chunk-000/file-000.parquet, data/chunk-000/file-000.parquet   many episodes a file
    v2.0, v2.1    meta/episodes.jsonl, data/chunk-000/episode_000000.parquet                  one episode a file

Layouts as in huggingface/lerobot: lerobot/common/datasets (v2.1) and src/lerobot/datasets (v3.0).
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sacflow_robot.data.formats.checks import check_frames
from sacflow_robot.data.log.columns import UNREADABLE
from sacflow_robot.errors import DataError, one_line

INFO = "meta/info.json"
OURS = "meta/sacflow_robot.json"
"""What datasets written here have beside LeRobot's own: JSON with the robot, and ``DemoSet.about``."""
OLDER_INFO = "meta_data/info.json"
"""Its place in versions before 2.0."""

VISUAL = ("video", "image")
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""Features that every dataset has."""

SUPPORTED = "v2.0, v2.1 and v3.0"
_V2_DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
_V3_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_CHUNKS_SIZE = 1000

DAMAGE = (*UNREADABLE, pa.ArrowException)


@dataclass(frozen=True)
class Feature:
    """One entry of ``features`` in ``meta/info.json``."""

    name: str
    dtype: str  # ``"float32"``, ``"video"``, ...
    shape: tuple[int, ...]  # of one frame
    names: tuple[str, ...]  # one name per dimension, or none

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_numeric(self) -> bool:
        return self.dtype == "bool" or self.dtype.startswith(("float", "int", "uint"))


@dataclass(frozen=True)
class EpisodeRow:
    """Entry of the episodes table for one episode."""

    index: int
    length: int
    tasks: tuple[str, ...]  # its tasks in words
    file: str  # file of its frames, relative to the dataset
    first: int | None  # global index of its first frame; None in v2, where the table does not say
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Dataset:
    """Contents of ``meta/``."""

    path: Path
    version: str  # ``codebase_version``, e.g. ``"v2.1"``
    fps: float
    robot_type: str | None  # the robot's name; None where the dataset does not name it
    features: Mapping[str, Feature]
    rows: tuple[EpisodeRow, ...]  # the episodes, by number

    @property
    def tasks(self) -> list[str]:
        """Every task in words, each once."""
        return list(dict.fromkeys(task for row in self.rows for task in row.tasks))

    def frames(self, wanted: list[str]) -> Iterator[tuple[EpisodeRow, pa.Table]]:
        """Each episode with the wanted columns of its frames; a file is read once for the episodes in it."""
        loaded, table, used = "", pa.table({}), 0
        for row in self.rows:
            if row.file != loaded:
                self._check_used(loaded, table, used)
                table, loaded, used = self._load(row, wanted), row.file, 0
            found = min(row.length, len(table) - used)
            if found < row.length:
                raise DataError(
                    f"{self.path / row.file}, episode {row.index} has {found} frames, expected {row.length}; "
                    "is it complete?"
                )
            yield row, table.slice(used, row.length)
            used += row.length
        self._check_used(loaded, table, used)

    def _load(self, row: EpisodeRow, wanted: list[str]) -> pa.Table:
        file = self.path / row.file
        try:
            if not file.is_file():
                raise DataError(f"{file} is missing, which holds episode {row.index}; is it complete?")
            present = pq.read_schema(file).names
            if absent := [name for name in wanted if name not in present]:
                raise DataError(f"{file} has no column {', '.join(absent)}, which {INFO} names; is it complete?")
            return pq.read_table(file, columns=wanted)
        except DAMAGE as error:
            raise DataError(f"{file} cannot be read ({one_line(error)}); is it complete?") from None

    def _check_used(self, file: str, table: pa.Table, used: int) -> None:
        if used != len(table):
            raise DataError(
                f"{self.path / file} has {len(table)} frames, the episodes table names {used}; is the table complete?"
            )


def open_dataset(path: Path) -> Dataset:
    """Read everything under ``meta/``."""
    info = _read_info(path)
    try:
        features = {}
        for name, entry in info["features"].items():
            shape = tuple(int(n) for n in entry["shape"] or (1,))
            features[name] = Feature(name, str(entry["dtype"]), shape, _names(entry.get("names"), math.prod(shape)))
        fps = float(info["fps"])
        if not 0 < fps < math.inf:
            raise ValueError(f"fps {info['fps']}")
    except DAMAGE as error:
        raise _damaged(path / INFO, error) from None
    rows = _rows_v3(path, info) if info["codebase_version"].startswith("v3.") else _rows_v2(path, info)
    for before, after in pairwise(rows):
        if before.index == after.index:
            raise DataError(f"{path}: the episodes table names episode {after.index} twice")
    if (total := info.get("total_episodes")) is not None and total != len(rows):
        raise DataError(f"{path}: {INFO} says {total} episodes, the episodes table has {len(rows)}; is it complete?")
    robot = info.get("robot_type")
    return Dataset(path, info["codebase_version"], fps, str(robot) if robot else None, features, tuple(rows))


def _read_info(path: Path) -> dict[str, Any]:
    """``meta/info.json``, of a version that can be read here."""
    file = path / INFO if (path / INFO).exists() or not (path / OLDER_INFO).exists() else path / OLDER_INFO
    try:
        info = json.loads(file.read_text())
        version = str(info["codebase_version"])
    except DAMAGE as error:
        raise _damaged(file, error) from None
    if not version.startswith(("v2.0", "v2.1", "v3.")) or file != path / INFO:
        older = version.startswith(("v1.", "1."))
        way = "convert it with LeRobot's own scripts" if older else "install a later version of this program"
        raise DataError(f"{path} is a LeRobotDataset {version}; supported are {SUPPORTED}: {way}")
    return {**info, "codebase_version": version}


def _damaged(file: Path, error: Exception) -> DataError:
    what = f"no {error.args[0]!r}" if isinstance(error, KeyError) and error.args else one_line(error)
    return DataError(f"{file} cannot be read as part of a LeRobotDataset ({what}); is it complete?")


def _names(names: Any, size: int) -> tuple[str, ...]:
    """Names of a feature's dimensions, which LeRobot keeps as a list, as a map to lists, or not at all.

    Names of axes, as images have them, are not those of dimensions.
    """
    if isinstance(names, Mapping):
        names = [name for group in names.values() for name in (group if isinstance(group, list) else [group])]
    found = tuple(str(name) for name in names) if isinstance(names, list) else ()
    return found if len(found) == size else ()


def _rows_v3(path: Path, info: Mapping[str, Any]) -> list[EpisodeRow]:
    template = str(info.get("data_path") or _V3_DATA)
    files = sorted((path / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise DataError(f"{path}/meta/episodes holds no chunk-*/file-*.parquet, which v3 has; is it complete?")
    rows = []
    for file in files:
        try:
            names = [name for name in pq.read_schema(file).names if not name.startswith("stats/")]
            rows += [_row_v3(row, template) for row in pq.read_table(file, columns=names).to_pylist()]
        except DAMAGE as error:
            raise _damaged(file, error) from None
    return sorted(rows, key=lambda row: row.index)


def _row_v3(row: Mapping[str, Any], template: str) -> EpisodeRow:
    first, length = int(row["dataset_from_index"]), int(row["length"])
    if length < 1 or row["dataset_to_index"] - first != length:
        raise ValueError(
            f"episode {row['episode_index']}: length {length}, but frames {first} to {row['dataset_to_index']}"
        )
    file = template.format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
    return EpisodeRow(int(row["episode_index"]), length, _tasks(row), file, first, row)


def _rows_v2(path: Path, info: Mapping[str, Any]) -> list[EpisodeRow]:
    template = str(info.get("data_path") or _V2_DATA)
    chunks_size = info.get("chunks_size", _CHUNKS_SIZE)
    file, rows = path / "meta" / "episodes.jsonl", []
    try:
        lines = file.read_text().splitlines()
    except FileNotFoundError:
        raise DataError(
            f"{path} has no meta/{file.name}, which {info['codebase_version']} has; is it complete?"
        ) from None
    except DAMAGE as error:
        raise _damaged(file, error) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            index, length = int(row["episode_index"]), int(row["length"])
            if length < 1 or index < 0:
                raise ValueError(f"episode {index}: length {length}")
            data = template.format(episode_chunk=index // int(chunks_size), episode_index=index)
            rows.append(EpisodeRow(index, length, _tasks(row), data, None, row))
        except DAMAGE as error:
            raise DataError(f"{file}, line {number} is damaged ({one_line(error)}); is it complete?") from None
    return sorted(rows, key=lambda row: row.index)


def dimension_names(key: str, size: int) -> list[str]:
    """Names of an observation's dimensions within a feature that joins several observations."""
    return [f"{key}_{i}" for i in range(size)]


def _tasks(row: Mapping[str, Any]) -> tuple[str, ...]:
    tasks = row.get("tasks") or ()
    return (tasks,) if isinstance(tasks, str) else tuple(str(task) for task in tasks)


class Frames(NamedTuple):
    """One episode: its columns, its row of the episodes table, and its name in messages."""

    columns: Mapping[str, npt.NDArray[Any]]
    row: EpisodeRow
    origin: str


def read_frames(dataset: Dataset, wanted: list[str]) -> Iterator[Frames]:
    """Episodes in order, once what numbers and times their frames was found to agree."""
    numbering = [name for name in BOOKKEEPING if name in dataset.features and name != "task_index"]
    names = list(dict.fromkeys([*numbering, *wanted]))
    least_index = 0
    for row, table in dataset.frames(names):
        origin = f"{dataset.path / row.file}, episode {row.index}"
        try:
            columns = {name: _to_array(table[name], dataset.features[name]) for name in names}
            flat = {name: columns[name].reshape(len(columns[name])) for name in numbering}
            _check_order(flat, row, least_index)
        except DataError as error:
            raise DataError(f"{origin}, {error}") from None
        if "timestamp" in flat:
            check_frames(flat["timestamp"], dataset.fps, origin)
        if "index" in flat:
            least_index = int(flat["index"][-1]) + 1
        yield Frames(columns, row, origin)


def _to_array(column: pa.ChunkedArray, feature: Feature) -> npt.NDArray[Any]:
    """A feature of T frames: (T, size)."""
    values = column.combine_chunks()
    if isinstance(values, pa.ChunkedArray):  # what an empty column stays
        values = pa.concat_arrays(values.chunks) if values.chunks else pa.array([], values.type)
    frames, per_frame = len(values), 1
    while isinstance(values.type, (pa.ListType, pa.LargeListType, pa.FixedSizeListType)):
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
    return flat.reshape(frames, per_frame)


def _check_complete(values: pa.Array, name: str, per_frame: int) -> None:
    if values.null_count:
        absent = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"frame {absent // per_frame}: {name} has no value; leave the episode out")


def _wrong_width(feature: Feature, frame: int, found: int) -> DataError:
    return DataError(f"frame {frame}: {feature.name} has {found} values, expected {feature.size} as {INFO} says")


def _check_order(columns: Mapping[str, npt.NDArray[Any]], row: EpisodeRow, least_index: int) -> None:
    """Refuse frames that are not those of the episode, in order, as the columns that number them (T,) say.

    ``least_index`` is what a dataset of v2, whose table names none, leaves for the global index of the first frame.
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
