"""The Zarr arrays of an episode log as its one writer changes them, with one atomic commit for all of them.

Readers that know nothing of this program demand that every array under ``data/`` is as long as the last entry of
``meta/episode_ends``, yet Zarr (format 2) keeps each array's shape in a ``.zarray`` file of its own. So while a log is
being written, every ``.zarray`` is a symbolic link that goes through one directory link:

    data/action/.zarray -> ../../.writing/commit/data.action        .writing/commit -> 000041

A commit happens in this order, each step finished before the next:

1. chunk files: new ones, and the partly filled last one, which keeps its old rows and gains new ones. Each is written
   under another name, flushed to the disk and renamed. The shapes in force do not reach the new rows yet.
2. a folder ``000042`` with the new ``.zarray`` of every array, and ``position``: how far into the recorder's stream of
   records the arrays have come.
3. one rename, which makes ``commit`` point to ``000042``. Before it all arrays have the old length, after it the new.

Whatever instant a process is killed at, the store is that of the last commit. Closing turns the links into plain files
of the same content, one by one, and removes ``.writing``: a finished log is an ordinary Zarr store that any tool copies.

A disk that is full or failing raises OSError: nothing that was staged counts then, and the writer rolls back.
"""

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import numpy.typing as npt

from sacflow_robot.data.log.columns import FILLS, Columns, current_name, whole_ends
from sacflow_robot.errors import DataError, LogWriteError, one_line
from sacflow_robot.utils import atomic_files
from sacflow_robot.utils.atomic_files import put, replacing, sync_folder

WRITING = ".writing"
_CHUNK_BYTES = 2_000_000
_CHUNK_ROWS = 4096
_COMPRESSOR = {"id": "zstd", "level": 1}


class StoredArray:
    """One array: what is on disk, and rows on their way there."""

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self.folder = folder
        self.stored_name = f"{folder.parent.name}.{folder.name}"
        self._description = description
        self.rows: int = description["shape"][0]
        self._shape = tuple(description["chunks"])
        self._dtype = np.dtype(description["dtype"])
        codec = description["compressor"]
        self._codec = None if codec is None else numcodecs.get_codec(codec)
        if description["filters"] or description["order"] != "C" or self._shape[1:] != tuple(description["shape"][1:]):
            raise ValueError(f"{folder.name} is not laid out as this program lays arrays out")
        self._tail: npt.NDArray[Any] | None = None  # the chunk that the next row goes into
        self._dirty = False
        self._surplus = True

    def describe(self) -> dict[str, Any]:
        return {**self._description, "shape": [self.rows, *self._shape[1:]]}

    def fits(self, values: npt.NDArray[Any]) -> bool:
        return values.shape[1:] == self._shape[1:] and values.dtype == self._dtype

    def cut(self, rows: int) -> None:
        self._surplus = True
        self.rows = rows
        self._tail = None
        self._dirty = False

    def read(self) -> npt.NDArray[Any]:
        """All rows, as far as they are on disk."""
        chunks = [self._read_chunk(i) for i in range(-(-self.rows // self._shape[0]))]
        rows: npt.NDArray[Any] = np.concatenate([*chunks, np.empty((0, *self._shape[1:]), self._dtype)])[: self.rows]
        return rows

    def append(self, values: npt.NDArray[Any], scratch: Path) -> None:
        while len(values):
            tail, at = self._load_tail(), self.rows % self._shape[0]
            count = min(len(values), self._shape[0] - at)
            tail[at : at + count] = values[:count]
            self._dirty, values = True, values[count:]
            if at + count == self._shape[0]:
                self._write_tail(self.rows // self._shape[0], scratch)
                self._tail = None
            self.rows += count

    def flush(self, scratch: Path) -> None:
        if self._dirty and self._tail is not None:
            self._write_tail(self.rows // self._shape[0], scratch)

    def remove_surplus(self) -> None:
        if self._surplus:
            for file in self.folder.iterdir():
                head = file.name.partition(".")[0]
                if head.isdigit() and int(head) * self._shape[0] >= self.rows:
                    file.unlink()
            self._surplus = False

    def _load_tail(self) -> npt.NDArray[Any]:
        if self._tail is None:
            at = self.rows % self._shape[0]
            self._tail = np.zeros(self._shape, self._dtype)
            if at:
                self._tail[:at] = self._read_chunk(self.rows // self._shape[0])[:at]
        return self._tail

    def _read_chunk(self, number: int) -> npt.NDArray[Any]:
        data = self._file(number).read_bytes()
        raw = data if self._codec is None else self._codec.decode(data)
        chunk: npt.NDArray[Any] = np.frombuffer(raw, self._dtype).reshape(self._shape)
        return chunk

    def _write_tail(self, number: int, scratch: Path) -> None:
        assert self._tail is not None
        data = self._tail.tobytes() if self._codec is None else self._codec.encode(self._tail)
        put(self._file(number), bytes(data), scratch)
        self._dirty = False

    def _file(self, number: int) -> Path:
        return self.folder / ".".join([str(number), *["0"] * (len(self._shape) - 1)])


def describe_array(like: npt.NDArray[Any]) -> dict[str, Any]:
    """The ``.zarray`` of an empty array for rows like these (N, ...)."""
    row_bytes = max(1, like.dtype.itemsize * int(np.prod(like.shape[1:])))
    rows = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // row_bytes))
    return {
        "shape": [0, *like.shape[1:]],
        "chunks": [rows, *like.shape[1:]],
        "dtype": like.dtype.str,
        "fill_value": False if like.dtype == bool else 0,
        "order": "C",
        "filters": None,
        "dimension_separator": ".",
        "compressor": _COMPRESSOR,
        "zarr_format": 2,
    }


class Store:
    """A log's arrays, open for writing; its maker holds the log's lock.

    Raises:
        DataError: The arrays there are damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writing = path / WRITING
        self._linked = False
        self._commits = 0
        self._load()

    def _load(self) -> None:
        """Take the arrays as they are committed."""
        try:
            folders = {
                f"{group}/{folder.name}": folder
                for group in ("data", "meta")
                for folder in sorted((self.path / group).iterdir())
                if (folder / ".zarray").exists()
            }
            self._arrays = {
                current_name(name, folders): StoredArray(folder, json.loads((folder / ".zarray").read_text()))
                for name, folder in folders.items()
            }
            self.ends = whole_ends(self._arrays["meta/episode_ends"].read().tolist())
            self.position: dict[str, Any] = {}
            with contextlib.suppress(FileNotFoundError):
                self.position = json.loads((self._writing / "commit" / "position").read_text())
            for name, array in self._arrays.items():
                if array.rows < self._length(name):
                    raise DataError(f"{name} is shorter than meta/episode_ends says")
            if not self.ends and "meta/info" in self._arrays and self._arrays["meta/info"].rows > 1:
                raise DataError(f"it has {self._arrays['meta/info'].rows} episodes' rows and no ends")
        except (KeyError, ValueError, TypeError, OSError, RuntimeError, DataError) as error:
            raise DataError(f"{self.path} is damaged: {one_line(error)}; see log verify, and log repair") from None
        for name, array in self._arrays.items():
            array.cut(self._length(name))

    def _length(self, name: str) -> int:
        return self.steps if name.startswith("data/") else len(self.ends)

    @property
    def steps(self) -> int:
        """Rows committed under ``data/``."""
        return self.ends[-1] if self.ends else 0

    def stage(self, group: str, columns: Columns) -> None:
        """Add rows that the next commit will make count. Full chunks are written at once, the rest with the commit."""
        self._link()
        held = {name.partition("/")[2]: a for name, a in self._arrays.items() if name.startswith(f"{group}/")}
        held.pop("episode_ends", None)
        if all(array.rows == 0 for array in held.values()):
            for key in held.keys() - columns.keys():
                del self._arrays[f"{group}/{key}"]
            held = {k: a for k, a in held.items() if k in columns and a.fits(columns[k])}
        rows = next((array.rows for array in held.values()), 0)
        missing = columns.keys() - held.keys()
        filled = rows and missing <= FILLS.keys()  # a log of an earlier version: nothing is known of its old rows
        different = {key for key in held if key not in columns or not held[key].fits(columns[key])}
        different |= missing if rows and not filled else set()
        if different:
            raise DataError(
                f"the episodes differ from those in {self.path} in {', '.join(sorted(different))}; log them to another path"
            )
        for key in missing:
            folder = self.path / group / key
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            array = self._arrays[f"{group}/{key}"] = StoredArray(folder, describe_array(columns[key]))
            if filled:
                array.append(np.full((rows, *columns[key].shape[1:]), FILLS[key], columns[key].dtype), self._writing)
        for key, values in columns.items():
            self._arrays[f"{group}/{key}"].append(values, self._writing)

    def end_episode(self, meta: Columns) -> None:
        """Stage the row of ``meta/`` for the episode whose steps have been staged."""
        self.stage("meta", meta)
        self._arrays["meta/episode_ends"].append(np.array([self._arrays["data/action"].rows]), self._writing)

    def commit(self, position: Mapping[str, Any] | None = None) -> None:
        """Make everything staged count, at once."""
        if position is None and all(array.rows == self._length(name) for name, array in self._arrays.items()):
            return
        self._link()
        for array in self._arrays.values():
            array.flush(self._writing)
            sync_folder(array.folder)
        self._swap(position or {})
        self.ends = whole_ends(self._arrays["meta/episode_ends"].read().tolist())

    def rollback(self) -> None:
        """Forget what was staged since the last commit."""
        self._load()

    def truncate(self, count: int) -> None:
        """Keep the first ``count`` episodes only."""
        self._link()
        self.ends = self.ends[:count]
        for name, array in self._arrays.items():
            array.cut(self._length(name))
        self._swap({})

    def close(self) -> None:
        """Make the log an ordinary Zarr store again, with nothing left in it but what was committed."""
        if not self._writing.exists():
            return
        self._link()
        for array in self._arrays.values():
            put(array.folder / ".zarray", self._written[array.stored_name], self._writing)
        kept = {array.folder for array in self._arrays.values()}
        for group in ("data", "meta"):
            for folder in (self.path / group).iterdir():
                if folder not in kept and folder.is_dir():
                    shutil.rmtree(folder)
        # Whoever finds this half done must not take the journal for steps that are yet to be committed.
        for file in (*self._writing.glob("journal.*"), self._writing / "session"):
            file.unlink(missing_ok=True)
        shutil.rmtree(self._writing)
        self._linked = False

    def _link(self) -> None:
        """Have every ``.zarray`` go through the one link."""
        if self._linked:
            return
        self._writing.mkdir(exist_ok=True)
        taken = [int(p.name) for p in self._writing.iterdir() if p.name.isdigit()]
        self._commits = max(taken, default=0)
        self._swap(self.position)
        for array in self._arrays.values():
            self._point(array)
        self._linked = True

    def _point(self, array: StoredArray) -> None:
        if not (array.folder / ".zarray").is_symlink():
            self._relink(array.folder / ".zarray", f"../../{WRITING}/commit/{array.stored_name}")

    def _relink(self, file: Path, target: str) -> None:
        link = self._writing / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        link.replace(file)

    def _swap(self, position: Mapping[str, Any]) -> None:
        """Put the arrays' present lengths in force, and remove commits that nobody looks at and chunks past the end."""
        folder = self._writing / f"{self._commits + 1:06}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        arrays = self._arrays.values()
        written = {array.stored_name: json.dumps(array.describe(), indent=4).encode() for array in arrays}
        for name, content in written.items():
            atomic_files.write_through(folder / name, content)
        atomic_files.write_through(folder / "position", json.dumps(dict(position)).encode())
        sync_folder(folder)
        if self._linked:
            for array in arrays:
                self._point(array)
        self._relink(self._writing / "commit", folder.name)
        self._commits += 1
        self._written = written
        self.position = dict(position)
        with contextlib.suppress(OSError):  # it counts already
            sync_folder(self._writing)
            for old in self._writing.iterdir():
                if old.name.isdigit() and int(old.name) < self._commits - 1:  # somebody may look at the one before
                    shutil.rmtree(old)
            for array in arrays:
                array.remove_surplus()


def create_store(path: Path, attributes: Mapping[str, Any]) -> None:
    """Make a log without episodes beside its final name, then move it there."""
    group = json.dumps({"zarr_format": 2}).encode()
    try:
        with replacing(path) as partial:
            (partial / "meta" / "episode_ends").mkdir(parents=True)
            (partial / "data").mkdir()
            for folder in (partial, partial / "data", partial / "meta"):
                atomic_files.write_through(folder / ".zgroup", group)
            atomic_files.write_through(partial / ".zattrs", json.dumps(dict(attributes), indent=4).encode())
            ends = json.dumps(describe_array(np.zeros(0, np.int64)), indent=4).encode()
            atomic_files.write_through(partial / "meta" / "episode_ends" / ".zarray", ends)
    except OSError as error:
        raise LogWriteError(f"cannot make an episode log at {path}: {one_line(error)}") from None
