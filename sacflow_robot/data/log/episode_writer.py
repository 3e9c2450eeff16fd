"""Write whole episodes to a log, all at once or not at all."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import zarr

from sacflow_robot.data.log import remote
from sacflow_robot.data.log.columns import FORMAT, VERSION, episode_columns, step_columns
from sacflow_robot.data.log.lock import LogLock
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.data.log.store import WRITING, Store, create_store
from sacflow_robot.data.log.write_ahead_log import recover
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, LogWriteError, UsageError, one_line, reason_of
from sacflow_robot.spec import RobotSpec
from sacflow_robot.utils.atomic_files import put, replacing

_LOCK_PATIENCE_S = 0.5  # a reader that brings a killed writer's steps in holds the lock for a moment


def lock_for_writing(path: Path | str, robot: RobotSpec) -> tuple[LogLock, EpisodeLog]:
    """Lock a log, made if absent, and bring in what a killed writer left behind.

    Raises:
        DataError: The path holds something else, or episodes of a different robot.
        LogWriteError: The log cannot be made there, or another process is writing to it.
        UsageError: It is on an object store.
    """
    if remote.is_url(path):
        raise UsageError(f"{path} is on an object store, which holds finished logs only; write to a folder")
    path = Path(path)
    lock = LogLock(path)
    try:
        lock.folder.parent.mkdir(parents=True, exist_ok=True)
        if not lock.acquire(_LOCK_PATIENCE_S):
            raise LogWriteError(f"{path} is being written by another process; give another path")
        if not path.exists():
            create_store(lock.folder, {"format": FORMAT, "version": VERSION, "arm": json.loads(robot.to_json())})
            lock.lock_folder()
        elif (path / WRITING).exists():
            recover(path, EpisodeLog.open(path, heal=False).robot)
        log = EpisodeLog.open(path, heal=False)
        different = log.robot.differences(robot)
        if different:
            raise DataError(f"{path} holds episodes of another robot ({'; '.join(different)}); give another path")
        if log.version < VERSION:
            put(path / ".zattrs", json.dumps({**log.attributes, "version": VERSION}).encode(), path)
        return lock, log
    except BaseException as error:
        lock.release()
        if isinstance(error, OSError):
            raise LogWriteError(f"cannot write at {path}: {one_line(error)}") from None
        raise


class EpisodeWriter(EpisodeLog):
    """An episode log, made if absent, that is open for whole episodes. Close it, or use it as a context manager.

    A disk that is full or failing raises LogWriteError; what was appended before counts.

    Raises:
        DataError: The path holds something else, or episodes of a different robot.
        LogWriteError: The log cannot be made there, or another process is writing to it.
    """

    def __init__(self, path: Path | str, robot: RobotSpec) -> None:
        self._lock, _ = lock_for_writing(path, robot)
        self._closed = False
        try:
            super().__init__(path, zarr.open_group(path, mode="r", zarr_format=2))
            self._store = Store(Path(path))
        except BaseException:
            self._lock.release()
            raise

    def append(self, episode: Episode) -> None:
        """Append one episode; see :meth:`extend`."""
        self.extend([episode])

    def extend(self, episodes: Iterable[Episode]) -> None:
        """Append whole episodes at once; either all of them count afterward, or none.

        Raises:
            DataError: An episode does not fit the log.
            LogWriteError: The disk is full or failing; what was logged before is intact.
        """
        try:
            for episode in episodes:
                episode.check_fits(self.robot, str(self.path))
                self._store.stage("data", step_columns(episode, self.robot))
                self._store.end_episode(episode_columns(episode, self.robot))
            self._store.commit()
        except BaseException as error:
            self._store.rollback()
            if isinstance(error, OSError):
                raise LogWriteError(
                    f"episode not logged: {one_line(error)}; the {len(self)} episodes in {self.path} are intact, "
                    "free some space"
                ) from None
            raise
        self._take_ends()

    def truncate(self, count: int) -> None:
        """Keep the first ``count`` episodes only."""
        try:
            self._store.truncate(count)
        except OSError as error:
            self._store.rollback()
            raise LogWriteError(f"cannot shorten {self.path}: {one_line(error)}; it is as it was") from None
        self._take_ends()

    def _take_ends(self) -> None:
        self.ends = self._store.ends
        self._arrays.clear()

    def close(self) -> None:
        """Make the log an ordinary Zarr store, and let other processes write to it."""
        if self._closed:
            return
        self._closed = True
        try:
            self._store.close()
        except OSError as error:
            raise LogWriteError(f"cannot finish {self.path}: {one_line(error)}; its episodes are intact") from None
        finally:
            self._lock.release()

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with contextlib.suppress(*() if error is None else (LogWriteError,)):  # the first error is the one to report
            self.close()


def write_log(path: Path | str, robot: RobotSpec, episodes: Iterable[Episode]) -> None:
    """Write a new log with these episodes, taken one by one, under its final name only once it is whole.

    The path is a folder, or an address on an object store, e.g. ``s3://bucket/episodes.zarr``.

    Raises:
        UsageError: Something is at the path already.
        LogWriteError: It cannot be written there.
    """
    if remote.is_url(path):
        remote.check_absent(str(path))
        with tempfile.TemporaryDirectory() as folder:
            write_log(Path(folder) / "log.zarr", robot, episodes)
            remote.upload(Path(folder) / "log.zarr", str(path))
        return
    with new_log(Path(path), robot) as log:
        log.extend(episodes)


@contextlib.contextmanager
def new_log(path: Path, robot: RobotSpec) -> Iterator[EpisodeWriter]:
    """A new log to append to, which stands at ``path`` once all has gone well, or not at all.

    Raises:
        UsageError: Something is at the path already.
        LogWriteError: It cannot be written there.
    """
    if path.exists():
        raise UsageError(f"{path} exists already; give another path or remove it")
    try:
        with replacing(path) as partial:
            try:
                with EpisodeWriter(partial, robot) as log:
                    yield log
            finally:
                partial.with_name(f".{partial.name}.lock").unlink(missing_ok=True)
    except (OSError, LogWriteError) as error:  # the writer names the partial log, which nobody will find
        raise LogWriteError(f"cannot write {path}: {one_line(reason_of(error))}; nothing is left of it") from None
