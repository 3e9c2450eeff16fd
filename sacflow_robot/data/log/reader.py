"""Episode log: episodes kept in a Zarr store that diffusion_policy's reader can read too.

Layout (Zarr format 2). One row per step under ``data/``, one row per episode under ``meta/``:

    data/<observation key>      observation before the step      data/state      simulator state before the step
    data/action                 action sent                      data/time_ns    capture time of the observation
    data/policy_action, measured, source, reward, terminated, truncated
    data/received_ns, inferred_ns, sent_ns, flags, intervention_action        since version 2
    meta/episode_ends           exclusive end row of each episode, cumulative
    meta/last_<key>             the observation, state and time after the episode's last step
    meta/info                   the episode's info as JSON bytes

:mod:`sacflow_robot.data.log.store` says how it is written so that every array is as long as the last end at any instant;
:mod:`sacflow_robot.data.log.episode_writer` appends whole episodes, :mod:`sacflow_robot.data.log.recorder` steps.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from sacflow_robot.data.log import remote
from sacflow_robot.data.log.columns import (
    STEP_COLUMNS,
    UNREADABLE,
    current_name,
    parse_attributes,
    parse_info,
    stored_name,
    whole_ends,
)
from sacflow_robot.data.log.lock import LogLock
from sacflow_robot.data.log.store import WRITING
from sacflow_robot.data.log.write_ahead_log import recover
from sacflow_robot.episode import Episode, known_columns
from sacflow_robot.errors import DataError, LogWriteError, UsageError, one_line

_BLOCK_BYTES = 64 << 20
_LOOKS, _LOOK_AGAIN_S = 40, 0.05  # a busy machine may stop a closing writer between two files
_LOCK_PATIENCE_S = 0.5  # a reader that brings a killed writer's steps in holds the lock for a moment

_DAMAGE = (*UNREADABLE, MemoryError, DataError)


class EpisodeLog:
    """An episode log, open for reading; make one with :meth:`open`."""

    def __init__(
        self, path: Path | str, root: zarr.Group, ends: Callable[[EpisodeLog], list[int]] | None = None
    ) -> None:
        self.path = path
        self._root = root
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._written = False  # whether it was being written to when it was opened
        try:
            self.version, self.robot = parse_attributes(dict(root.attrs), path)
            self.ends = (ends or _recorded_ends)(self)
        except _DAMAGE as error:
            raise (
                error if type(error) is DataError and error.args[0].startswith(str(path)) else _damaged(path, error)
            ) from None

    @staticmethod
    def open(
        path: Path | str, *, heal: bool = True, ends: Callable[[EpisodeLog], list[int]] | None = None
    ) -> EpisodeLog:
        """Open for reading, also while another process appends.

        A log whose writers were killed gets the steps that they left behind first (``heal``), as SQLite does it, unless its
        folder may not be written to. ``ends`` finds the episodes' ends of a log that has lost them. A finished log may be
        on an object store, e.g. ``s3://bucket/episodes.zarr``.

        Raises:
            DataError: There is no log at the path, or it cannot be read.
        """
        if remote.is_url(path):
            return EpisodeLog(str(path), remote.open_group(str(path)), ends)
        path = Path(path)
        if not path.exists():
            raise DataError(f"no episode log at {path}; check the path")
        for look in range(_LOOKS):
            written = (path / WRITING).exists()
            try:
                if heal and written:
                    _heal(path)
                found = EpisodeLog(path, zarr.open_group(path, mode="r", zarr_format=2), ends)
                found._written = written
                return found
            except (FileNotFoundError, zarr.errors.GroupNotFoundError):
                raise DataError(
                    f"{path} is not an episode log; expected a folder written with --log or demos collect"
                ) from None
            except _DAMAGE as error:
                if not written or look == _LOOKS - 1:  # else its writer may have closed it between two files of ours
                    raise error if type(error) is DataError else _damaged(path, error) from None
                time.sleep(_LOOK_AGAIN_S)
        raise AssertionError

    def __len__(self) -> int:
        """Number of whole episodes."""
        return len(self.ends)

    @property
    def steps(self) -> int:
        """Number of steps in whole episodes."""
        return self.ends[-1] if self.ends else 0

    @property
    def state_size(self) -> int | None:
        """S of the simulator states, 0 for episodes without; None while there are no episodes."""
        if not self.ends:
            return None
        return int(self.array("data/state").shape[1]) if self.has("data/state") else 0

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
        step_bytes = sum(np.dtype(a.dtype).itemsize * a.size for a in self.robot.observations) + 1000
        first, most = 0, max(1, _BLOCK_BYTES // step_bytes)
        while first < len(self):
            before = self.ends[first - 1] if first else 0
            stop = first + 1
            while stop < len(self) and self.ends[stop] - before <= most:
                stop += 1
            yield from self._read(first, stop)
            first = stop

    def _read(self, first: int, stop: int) -> list[Episode]:
        """Episodes first to stop - 1; looks again where a writer may have closed the log between two files."""
        for look in range(_LOOKS):
            try:
                return self._read_now(first, stop)
            except DataError:
                if not self._written or look == _LOOKS - 1:
                    raise
            time.sleep(_LOOK_AGAIN_S)
            self._written = (Path(self.path) / WRITING).exists()
            with contextlib.suppress(*_DAMAGE):
                self._root = zarr.open_group(self.path, mode="r", zarr_format=2)
                self._arrays = {}
        raise AssertionError

    def _read_now(self, first: int, stop: int) -> list[Episode]:
        """Each column is read once."""
        bounds = [0, *self.ends][first : stop + 1]
        observed = [*(a.key for a in self.robot.observations), "time_ns"]
        try:
            if self.has("data/state"):
                observed.append("state")
            acted = [c for c in STEP_COLUMNS if c.fill is None or self.has(f"data/{c.log}")]
            data = {
                key: self.rows(f"data/{key}", bounds[0], bounds[-1]) for key in (*observed, *(c.log for c in acted))
            }
            last = {key: self.rows(f"meta/last_{key}", first, stop) for key in observed}
            infos = [parse_info(row) for row in self.rows("meta/info", first, stop)]
            episodes = []
            for i, (start, end) in enumerate(itertools.pairwise(bounds)):
                rows = slice(start - bounds[0], end - bounds[0])
                whole = {key: np.concatenate([data[key][rows], column[i][None]]) for key, column in last.items()}
                episodes.append(
                    Episode(
                        observations={a.key: whole[a.key] for a in self.robot.observations},
                        time_ns=whole["time_ns"],
                        states=whole.get("state"),
                        info=infos[i],
                        **{c.attribute: data[c.log][rows] for c in acted if c.fill is None},
                        **known_columns({c.attribute: data[c.log][rows] for c in acted if c.fill is not None}),
                    )
                )
            return episodes
        except _DAMAGE as error:
            raise DataError(f"{self.path} is damaged at episodes {first} to {stop - 1}: {one_line(error)}") from None

    def rows(self, name: str, first: int, stop: int) -> np.ndarray[Any, np.dtype[Any]]:
        """Rows first to stop - 1 of one array.

        Zarr reads a chunk whose file is missing as zeros; here every chunk has been written.

        Raises:
            DataError: The array is too short, or a chunk's file is missing.
        """
        array = self.array(name)
        if array.shape[0] < stop:
            raise DataError(f"{name} is shorter than meta/episode_ends says")
        size, rest = array.chunks[0], ["0"] * (array.ndim - 1)
        present = remote.names(self.path, array.path)
        for chunk in range(first // size, -(-stop // size)):
            file = ".".join([str(chunk), *rest])
            if file not in present:
                raise DataError(f"{name} lacks its chunk {file}")
        return np.asarray(array[first:stop])

    def arrays(self, group: str) -> list[str]:
        """Names of the arrays in a group, those of version 0.1 replaced by today's."""
        parent = self._root[group]
        assert isinstance(parent, zarr.Group)
        keys = sorted(parent.array_keys())
        return [f"{group}/{current_name(key, keys)}" for key in keys]

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the log as a whole."""
        return dict(self._root.attrs)

    def has(self, name: str) -> bool:
        """Return True if there is an array of that name, e.g. ``data/state``."""
        return stored_name(name, self._root) in self._root

    def array(self, name: str) -> zarr.Array[Any]:
        """The array of that name; looking one up costs a read of its metadata, so it is kept."""
        if name not in self._arrays:
            array = self._root[stored_name(name, self._root)]
            assert isinstance(array, zarr.Array)
            self._arrays[name] = array
        return self._arrays[name]


def _recorded_ends(log: EpisodeLog) -> list[int]:
    return whole_ends(log.rows("meta/episode_ends", 0, log.array("meta/episode_ends").shape[0]).tolist())


def _heal(path: Path) -> None:
    """Bring in what dead writers left behind, unless they live, or this process may not."""
    lock = LogLock(path)
    try:
        if not lock.acquire():
            return
    except OSError:
        return
    try:
        recover(path, EpisodeLog.open(path, heal=False).robot)
    except (OSError, LogWriteError):
        return
    finally:
        lock.release()


def _damaged(path: Path | str, error: Exception) -> DataError:
    return DataError(f"{path} is damaged: {one_line(error)}; see log verify, and log repair")
