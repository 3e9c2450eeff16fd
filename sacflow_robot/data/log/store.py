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
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.data.log.columns import FILLS, Columns, current_name, whole_ends
from sacflow_robot.data.log.stored_array import StoredArray, describe_array
from sacflow_robot.errors import DataError, LogWriteError, one_line
from sacflow_robot.utils import atomic_files
from sacflow_robot.utils.atomic_files import put, replacing, sync_folder

WRITING = ".writing"


class Store:
    """A log's arrays, open for writing; whoever makes one holds the log's lock.

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
        """Add rows that the next commit will make count. Full chunks are written at once, the rest with the commit.

        Raises:
            DataError: The columns are not those of the log.
            OSError: The disk is full or failing; roll back.
        """
        self._link()
        held = {name.partition("/")[2]: a for name, a in self._arrays.items() if name.startswith(f"{group}/")}
        held.pop("episode_ends", None)
        if all(array.rows == 0 for array in held.values()):
            for key in held.keys() - columns.keys():
                del self._arrays[f"{group}/{key}"]
            held = {k: a for k, a in held.items() if k in columns and a.fits(columns[k])}
        rows = next((array.rows for array in held.values()), 0)
        missing = columns.keys() - held.keys()
        if rows and missing <= FILLS.keys():  # a log of an earlier version: nothing is known of these for its old rows
            extra = {key: np.full((rows, *columns[key].shape[1:]), FILLS[key], columns[key].dtype) for key in missing}
        else:
            extra = {}
        different = sorted(
            {k for k in held.keys() ^ columns.keys() if k not in extra and (rows or k in held)}
            | {k for k in held.keys() & columns.keys() if not held[k].fits(columns[k])}
        )
        if different:
            raise DataError(
                f"the episodes differ from those in {self.path} in {', '.join(different)}; log them to another path"
            )
        for key in missing:
            folder = self.path / group / key
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            self._arrays[f"{group}/{key}"] = StoredArray(folder, describe_array(columns[key]))
            if key in extra:
                self._arrays[f"{group}/{key}"].append(extra[key], self._writing)
        for key, values in columns.items():
            self._arrays[f"{group}/{key}"].append(values, self._writing)

    def end_episodes(self, lengths: npt.NDArray[np.int64], meta: Columns) -> None:
        """Stage the rows of ``meta/`` for episodes of these lengths (N,), whose steps have been staged."""
        ends = self._arrays["meta/episode_ends"]
        last = int(ends.read_staged()[-1]) if ends.rows else 0
        self.stage("meta", meta)
        ends.append(last + np.cumsum(lengths, dtype=np.int64), self._writing)

    def commit(self, position: Mapping[str, Any] | None = None) -> None:
        """Make everything staged count, at once.

        Raises:
            OSError: The disk is full or failing; nothing of it counts. Roll back.
        """
        if position is None and all(array.rows == self._length(name) for name, array in self._arrays.items()):
            return
        self._link()
        for array in self._arrays.values():
            array.flush(self._writing)
            sync_folder(array.folder)
        before = self._swap(position or {})
        self.ends = whole_ends(self._arrays["meta/episode_ends"].read_staged().tolist())
        with contextlib.suppress(OSError):  # it counts already
            self._prune(before)

    def rollback(self) -> None:
        """Forget what was staged since the last commit."""
        self._load()

    def truncate(self, count: int) -> None:
        """Keep the first ``count`` episodes only.

        Raises:
            OSError: The disk is full or failing; all of them are kept. Roll back.
        """
        self._link()
        self.ends = self.ends[:count]
        for name, array in self._arrays.items():
            array.cut(self._length(name))
        before = self._swap({})
        with contextlib.suppress(OSError):  # it counts already
            self._prune(before)

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
        self._prune(self._commits - 1)

    def _point(self, array: StoredArray) -> None:
        target = f"../../{WRITING}/commit/{array.stored_name}"
        file = array.folder / ".zarray"
        if file.is_symlink():
            return
        link = self._writing / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        link.replace(file)

    def _swap(self, position: Mapping[str, Any]) -> int:
        """Put the arrays' present lengths in force; returns the number of the commit before."""
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
        link = self._writing / "commit.next"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        link.replace(self._writing / "commit")
        self._commits += 1
        self._written = written
        self.position = dict(position)
        with contextlib.suppress(OSError):  # it counts already
            sync_folder(self._writing)
        return self._commits - 1

    def _prune(self, before: int) -> None:
        """Remove commits older than ``before``, which somebody may be looking at, and chunks past the end."""
        for folder in self._writing.iterdir():
            if folder.name.isdigit() and int(folder.name) < before:
                shutil.rmtree(folder)
        for array in self._arrays.values():
            array.remove_surplus()


def create_store(path: Path, attributes: Mapping[str, Any]) -> None:
    """Make a log without episodes beside its final name, then move it there.

    Raises:
        LogWriteError: It cannot be made there.
    """
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
