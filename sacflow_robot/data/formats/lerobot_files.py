"""The files of a LeRobotDataset v2.0, v2.1 or v3.0: what ``meta/`` says, and the frames of each episode.

    v3.0          meta/episodes/chunk-000/file-000.parquet, data/chunk-000/file-000.parquet   many episodes a file
    v2.0, v2.1    meta/episodes.jsonl, data/chunk-000/episode_000000.parquet                  one episode a file

Layouts as in huggingface/lerobot: lerobot/common/datasets (v2.1) and src/lerobot/datasets (v3.0).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sacflow_robot.errors import DataError, one_line

INFO = "meta/info.json"
OLDER_INFO = "meta_data/info.json"
"""Its place in versions before 2.0."""

VISUAL = ("video", "image")
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""Features that every dataset has."""

SUPPORTED = "v2.0, v2.1 and v3.0"
_V2_DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
_V3_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_CHUNKS_SIZE = 1000

UNREADABLE = (OSError, KeyError, ValueError, TypeError, AttributeError, IndexError, pa.ArrowException)
"""Errors that reading damaged files raises."""


@dataclass(frozen=True)
class Feature:
    """One entry of ``features`` in ``meta/info.json``.

    Attributes:
        name: Its name.
        dtype: ``"float32"``, ``"video"``, ...
        shape: Of one frame.
        names: One name per dimension, or none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_numeric(self) -> bool:
        return self.dtype == "bool" or self.dtype.startswith(("float", "int", "uint"))


@dataclass(frozen=True)
class EpisodeRow:
    """Entry of the episodes table for one episode.

    Attributes:
        index: Its number.
        length: Its frames.
        tasks: Its tasks in words.
        file: File of its frames, relative to the dataset.
        first: Global index of its first frame; None in v2, where the table does not say.
        row: The whole row.
    """

    index: int
    length: int
    tasks: tuple[str, ...]
    file: str
    first: int | None
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Dataset:
    """Contents of ``meta/``.

    Attributes:
        path: Folder of the dataset.
        version: ``codebase_version``, e.g. ``"v2.1"``.
        fps: Frames per second.
        robot_type: The robot's name; None where the dataset does not name it.
        features: By name.
        rows: The episodes, by number.
    """

    path: Path
    version: str
    fps: float
    robot_type: str | None
    features: Mapping[str, Feature]
    rows: tuple[EpisodeRow, ...]

    @property
    def tasks(self) -> list[str]:
        """Every task in words, each once."""
        return list(dict.fromkeys(task for row in self.rows for task in row.tasks))

    def frames(self, wanted: list[str]) -> Iterator[tuple[EpisodeRow, pa.Table]]:
        """Each episode with the wanted columns of its frames; a file is read once for the episodes in it.

        Raises:
            DataError: A file is missing or damaged, lacks a column, or has other frames than the episodes table says.
        """
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
        except UNREADABLE as error:
            raise DataError(f"{file} cannot be read ({one_line(error)}); is it complete?") from None

    def _check_used(self, file: str, table: pa.Table, used: int) -> None:
        if used != len(table):
            raise DataError(
                f"{self.path / file} has {len(table)} frames, the episodes table names {used}; is the table complete?"
            )


def open_dataset(path: Path) -> Dataset:
    """Read everything under ``meta/``.

    Raises:
        DataError: It is no LeRobotDataset, is of an unsupported version, or ``meta/`` is damaged or incomplete.
    """
    info = _read_info(path)
    try:
        features = {name: _feature(name, entry) for name, entry in info["features"].items()}
        fps = float(info["fps"])
        if not 0 < fps < math.inf:
            raise ValueError(f"fps {info['fps']}")
    except UNREADABLE as error:
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
    except UNREADABLE as error:
        raise _damaged(file, error) from None
    if not version.startswith(("v2.0", "v2.1", "v3.")) or file != path / INFO:
        older = version.startswith(("v1.", "1."))
        way = "convert it with LeRobot's own scripts" if older else "install a later version of this program"
        raise DataError(f"{path} is a LeRobotDataset {version}; supported are {SUPPORTED}: {way}")
    return {**info, "codebase_version": version}


def _damaged(file: Path, error: Exception) -> DataError:
    what = f"no {error.args[0]!r}" if isinstance(error, KeyError) and error.args else one_line(error)
    return DataError(f"{file} cannot be read as part of a LeRobotDataset ({what}); is it complete?")


def _feature(name: str, entry: Mapping[str, Any]) -> Feature:
    shape = tuple(int(n) for n in entry["shape"] or (1,))
    return Feature(name, str(entry["dtype"]), shape, _names(entry.get("names"), math.prod(shape)))


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
        except UNREADABLE as error:
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
    if not file.exists():
        raise DataError(f"{path} has no meta/episodes.jsonl, which {info['codebase_version']} has; is it complete?")
    try:
        lines = file.read_text().splitlines()
    except UNREADABLE as error:
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
        except (*UNREADABLE, ZeroDivisionError) as error:
            raise DataError(f"{file}, line {number} is damaged ({one_line(error)}); is it complete?") from None
    return sorted(rows, key=lambda row: row.index)


def _tasks(row: Mapping[str, Any]) -> tuple[str, ...]:
    tasks = row.get("tasks") or ()
    return (tasks,) if isinstance(tasks, str) else tuple(str(task) for task in tasks)
