"""Episode log: whole episodes appended to a Zarr store that diffusion_policy's reader can read too.

Layout (Zarr format 2). One row per step under ``data/``, one row per episode under ``meta/``:

    data/<observation key>      observation before the step      data/state      simulator state before the step
    data/action                 commanded action                 data/time_ns    capture time of the observation
    data/proposed, measured, source, reward, terminated, truncated
    meta/episode_ends           exclusive end row of each episode, cumulative
    meta/last_<key>             the observation, state and time after the episode's last step
    meta/info                   the episode's info as JSON bytes

An episode counts once its row of ``meta/episode_ends`` is written, which happens last. Every file of the store is
replaced atomically, so that an interrupted append leaves whole episodes and surplus rows behind them. Readers here ignore
such rows, and the next writer cuts them off; other readers may want that done first.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from filelock import FileLock, Timeout

from sacflow_robot.data.columns import (
    STEP_COLUMNS,
    Columns,
    concatenate,
    episode_columns,
    parse_info,
    step_columns,
    whole_ends,
)
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, LogWriteError, UsageError, one_line
from sacflow_robot.spec import ArmSpec

_FORMAT, _VERSION = "sacflow-robot episodes", 1
_CHUNK_BYTES, _CHUNK_ROWS = 2_000_000, 4096
_BLOCK_EPISODES = 256

# What zarr and numpy raise on a store whose files are damaged.
_DAMAGE = (
    *(KeyError, ValueError, TypeError, OSError, RuntimeError, AssertionError, IndexError),
    *(ZeroDivisionError, OverflowError, MemoryError, DataError),
)


class EpisodeLog:
    """An episode log on disk. Use :meth:`open` to read and :meth:`writer` to append."""

    def __init__(self, path: Path, root: zarr.Group, lock: FileLock | None = None) -> None:
        self.path, self._root, self._lock = path, root, lock
        self._arrays: dict[str, zarr.Array[Any]] = {}
        try:
            attributes: dict[str, Any] = dict(root.attrs)
        except _DAMAGE as error:
            raise _damaged(path, error) from None
        if attributes.get("format") != _FORMAT:
            raise DataError(f"{path} is a Zarr store but not an episode log; expected one written by this program")
        if attributes.get("version") != _VERSION:
            raise DataError(f"{path} has log version {attributes.get('version')}, this program reads {_VERSION}")
        try:
            self.arm = ArmSpec.from_dict(attributes["arm"])
            self.ends = whole_ends(np.asarray(_array(root, "meta/episode_ends")[:]).tolist())
            self._observed = {a.key for a in self.arm.observations} | {"time_ns", "state"}
        except _DAMAGE as error:
            raise _damaged(path, error) from None

    @staticmethod
    def open(path: Path) -> EpisodeLog:
        """Open for reading, also while another process appends.

        Raises:
            DataError: There is no log at the path, or it cannot be read.
        """
        if not path.exists():
            raise DataError(f"no episode log at {path}; check the path")
        try:
            return EpisodeLog(path, zarr.open_group(path, mode="r", zarr_format=2))
        except (FileNotFoundError, zarr.errors.GroupNotFoundError):
            raise DataError(
                f"{path} is not an episode log; expected a folder written with --log or demos collect"
            ) from None
        except _DAMAGE as error:
            raise error if type(error) is DataError else _damaged(path, error) from None

    @staticmethod
    def writer(path: Path, arm: ArmSpec) -> EpisodeLog:
        """Open for appending, making the log when there is none. Close it, or use it as a context manager.

        Raises:
            DataError: The path holds something else, or episodes of a different arm.
            LogWriteError: The log cannot be made there, or another process is appending to it.
        """
        # The lock file stays: were it removed, two writers could hold locks on two files of that name.
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise LogWriteError(f"{path} is being written by another process; give another path") from None
        except OSError as error:
            raise LogWriteError(f"cannot write at {path}: {one_line(error)}") from None
        try:
            if not path.exists():
                _create(path, arm)
            log = EpisodeLog.open(path)
            different = log.arm.differences(arm)
            if different:
                raise DataError(f"{path} holds episodes of another arm ({'; '.join(different)}); give another path")
            log._root, log._lock = zarr.open_group(path, mode="r+", zarr_format=2), lock
            log._check_not_emptied()
            log._cut(log.steps, len(log))
            return log
        except BaseException:
            lock.release()
            raise

    def __len__(self) -> int:
        """Number of whole episodes."""
        return len(self.ends)

    @property
    def steps(self) -> int:
        """Number of steps in whole episodes."""
        return self.ends[-1] if self.ends else 0

    def append(self, episode: Episode) -> None:
        """Append one episode; see :meth:`extend`."""
        self.extend([episode])

    def extend(self, episodes: Sequence[Episode]) -> None:
        """Append whole episodes at once; either all of them count afterwards, or none.

        Raises:
            DataError: An episode does not fit the log.
            LogWriteError: The disk is full or failing; what was logged before is intact.
        """
        if self._lock is None:
            raise UsageError(f"{self.path} is open for reading only")
        if not episodes:
            return
        for episode in episodes:
            episode.check_fits(self.arm, str(self.path))
        data = concatenate([step_columns(e, self.arm) for e in episodes])
        meta = concatenate([episode_columns(e, self.arm) for e in episodes])
        ends = self.steps + np.cumsum([len(e) for e in episodes])
        before = self.steps, len(self)
        self._check_columns(data, meta)
        try:
            self._write("data", data, self.steps)
            self._write("meta", meta, len(self))
            self._write("meta", {"episode_ends": ends.astype(np.int64)}, len(self))
        except OSError as error:
            self._cut(*before)
            raise LogWriteError(
                f"episode not logged: {one_line(error)}; the {len(self)} episodes in {self.path} are intact, free some space"
            ) from None
        self.ends += [int(end) for end in ends]

    def truncate(self, count: int) -> None:
        """Keep the first ``count`` episodes only."""
        self.ends = self.ends[:count]
        self._cut(self.steps, count)

    def read(self, index: int) -> Episode:
        """Read one episode; negative indices count from the end.

        Raises:
            UsageError: No such episode.
            DataError: Its rows cannot be read.
        """
        if not -len(self) <= index < len(self):
            raise UsageError(f"{self.path} has episodes 0 to {len(self) - 1}, there is no episode {index}")
        index %= len(self)
        return self._read(index, index + 1)[0]

    def episodes(self) -> Iterator[Episode]:
        """All whole episodes, oldest first, read in blocks."""
        for first in range(0, len(self), _BLOCK_EPISODES):
            yield from self._read(first, min(first + _BLOCK_EPISODES, len(self)))

    def close(self) -> None:
        """Let other processes append."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> EpisodeLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _read(self, first: int, stop: int) -> list[Episode]:
        """Episodes first to stop - 1, each column read once."""
        bounds = [0, *self.ends][first : stop + 1]
        try:
            names = {key: f"data/{key}" for key in _group(self._root, "data").array_keys()}
            data = {key: np.asarray(self._array(name)[bounds[0] : bounds[-1]]) for key, name in names.items()}
            for name in (*names.values(), "meta/info"):
                self._check_chunks(name)
            for key, column in data.items():
                if len(column) != bounds[-1] - bounds[0]:
                    raise DataError(f"{self.path} is damaged: data/{key} is shorter than meta/episode_ends says")
            last = {
                key: np.asarray(self._array(f"meta/last_{key}")[first:stop]) for key in data if key in self._observed
            }
            infos = [parse_info(row) for row in np.asarray(self._array("meta/info")[first:stop])]
            episodes = []
            for i, (start, end) in enumerate(itertools.pairwise(bounds)):
                rows = slice(start - bounds[0], end - bounds[0])
                whole = {key: np.concatenate([data[key][rows], column[i][None]]) for key, column in last.items()}
                episodes.append(
                    Episode(
                        observations={a.key: whole[a.key] for a in self.arm.observations},
                        time_ns=whole["time_ns"],
                        states=whole.get("state"),
                        info=infos[i],
                        **{name: data[key][rows] for key, name in STEP_COLUMNS.items()},
                    )
                )
            return episodes
        except _DAMAGE as error:
            raise DataError(f"{self.path} is damaged at episodes {first} to {stop - 1}: {one_line(error)}") from None

    def _check_chunks(self, name: str) -> None:
        """Zarr reads a chunk whose file is missing as zeros; here every chunk has been written.

        Raises:
            DataError: A chunk's file is missing.
        """
        array, width = self._array(name), self._array(name).ndim
        needed = self.steps if name.startswith("data/") else len(self)
        for chunk in range(-(-needed // array.chunks[0])):
            file = self.path / name / ".".join([str(chunk), *["0"] * (width - 1)])
            if not file.is_file():
                raise DataError(f"{name} lacks its chunk {file.name}")

    def _array(self, name: str) -> zarr.Array[Any]:
        """The array of that name; looking one up costs a read of its metadata, so it is kept."""
        if name not in self._arrays:
            # Chunks of nothing but zeros are written too, so that one whose file is missing is known to be lost.
            with zarr.config.set({"array.write_empty_chunks": True}):
                self._arrays[name] = _array(self._root, name)
        return self._arrays[name]

    def _check_not_emptied(self) -> None:
        """An interrupted first append leaves rows of one episode at most; more rows than that mean lost ends."""
        if len(self) or "meta/info" not in self._root:
            return
        rows = self._array("meta/info").shape[0]
        if rows > 1 and np.any(np.asarray(self._array("meta/info")[:])):
            raise DataError(f"{self.path} is damaged: it has {rows} episodes' rows and no ends; restore it from a copy")

    def _check_columns(self, data: Columns, meta: Columns) -> None:
        """Make the columns of an empty log; refuse rows that are not those of a log with episodes."""
        for group, columns in (("data", data), ("meta", meta)):
            parent = _group(self._root, group)
            if len(self) == 0:
                for key in set(parent.array_keys()) - {"episode_ends"}:
                    del parent[key]
                    self._arrays.pop(f"{group}/{key}", None)
                for key, values in columns.items():
                    _create_array(parent, key, values)
            found = {key: array.shape[1:] for key, array in parent.arrays() if key != "episode_ends"}
            given = {key: values.shape[1:] for key, values in columns.items()}
            different = sorted(key for key in found.keys() | given.keys() if found.get(key) != given.get(key))
            if different:
                raise DataError(
                    f"the episodes differ from those in {self.path} in {', '.join(different)}; log them to another path"
                )

    def _write(self, group: str, columns: Columns, at: int) -> None:
        for key, values in columns.items():
            array = self._array(f"{group}/{key}")
            array.resize((at + len(values), *array.shape[1:]))
            array[at:] = values

    def _cut(self, steps: int, episodes: int) -> None:
        """Drop rows past those counts. Readers ignore such rows, so failing here does no harm."""
        for group, length in (("meta", episodes), ("data", steps)):
            for key in list(_group(self._root, group).array_keys()):
                try:
                    array = self._array(f"{group}/{key}")
                    if array.shape[0] > length:
                        array.resize((length, *array.shape[1:]))
                except OSError:
                    continue


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is damaged: {one_line(error)}; restore it from a copy")


def _create(path: Path, arm: ArmSpec) -> None:
    """Make an empty log beside its final name, then move it there."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        root = zarr.open_group(partial, mode="w", zarr_format=2)
        root.attrs.update({"format": _FORMAT, "version": _VERSION, "arm": json.loads(arm.to_json())})
        root.create_group("data")
        _create_array(root.create_group("meta"), "episode_ends", np.zeros(0, np.int64))
        partial.rename(path)
    except OSError as error:
        raise LogWriteError(f"cannot make an episode log at {path}: {one_line(error)}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _create_array(parent: zarr.Group, key: str, like: npt.NDArray[Any]) -> None:
    row_bytes = max(1, like.dtype.itemsize * int(np.prod(like.shape[1:])))
    rows = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // row_bytes))
    parent.create_array(key, shape=(0, *like.shape[1:]), chunks=(rows, *like.shape[1:]), dtype=like.dtype)


def _group(root: zarr.Group, name: str) -> zarr.Group:
    group = root[name]
    assert isinstance(group, zarr.Group)
    return group


def _array(root: zarr.Group, name: str) -> zarr.Array[Any]:
    array = root[name]
    assert isinstance(array, zarr.Array)
    return array


def write_log(path: Path, arm: ArmSpec, episodes: Iterable[Episode]) -> None:
    """Write a new log with these episodes, under its final name only once it is whole.

    Raises:
        UsageError: Something is at the path already.
        LogWriteError: It cannot be written there.
    """
    if path.exists():
        raise UsageError(f"{path} exists already; give another path or remove it")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with EpisodeLog.writer(partial, arm) as log:
            log.extend(list(episodes))
        partial.rename(path)
    except OSError as error:
        raise LogWriteError(f"cannot write {path}: {one_line(error)}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        partial.with_name(f".{partial.name}.lock").unlink(missing_ok=True)
