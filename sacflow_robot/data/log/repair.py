"""Check a log, and save what can be read of a damaged one."""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sacflow_robot.data.log.columns import FILLS, STEP_COLUMNS
from sacflow_robot.data.log.episode_writer import EpisodeWriter, new_log
from sacflow_robot.data.log.lock import LogLock
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.data.log.ring import Layout
from sacflow_robot.data.log.store import WRITING, Store
from sacflow_robot.data.log.write_ahead_log import Assembler, Session
from sacflow_robot.episode import STEP_TIMES, UNKNOWN_TIME, Episode, Source
from sacflow_robot.errors import DataError, LogWriteError, SacflowError, UsageError, one_line


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where (array, episode or file), and what was expected."""

    where: str
    what: str


def verify(path: Path | str) -> list[Problem]:
    """Read everything in a log and hold it against what a log must be; changes nothing.

    Raises:
        DataError: There is no log, or so little is left of it that nothing can be checked.
    """
    log = EpisodeLog.open(path, heal=False)
    return [*_check_arrays(log), *_check_episodes(log), *_check_writing(log)]


def _check_arrays(log: EpisodeLog) -> Iterator[Problem]:
    """Presence, dtype, shape and length of every array."""
    if not log.ends:
        return
    expected: dict[str, tuple[Any, ...]] = {a.key: (np.dtype(a.dtype), a.shape) for a in log.robot.observations}
    expected["time_ns"] = (np.dtype(np.int64), ())
    if log.has("data/state"):
        expected["state"] = (np.dtype(np.float64), (log.array("data/state").shape[1],))
    names = {f"{prefix}{key}": of for prefix in ("data/", "meta/last_") for key, of in expected.items()}
    names["meta/info"] = ()
    flags = any(log.has(f"data/{key}") for key in FILLS if key != "intervention_action")
    for column in STEP_COLUMNS:  # logs begun before some of them were kept lack those
        name = f"data/{column.log}"
        if column.vector and (column.fill is None or log.has(name)):
            names[name] = np.dtype(column.dtype), (log.robot.action_dim,)
        elif not column.vector and (column.fill is None or flags):
            names[name] = ()
    for name in log.arrays("data"):
        if name not in names and log.array(name).shape[0] != log.steps:
            yield Problem(name, f"has {log.array(name).shape[0]} rows, expected {log.steps}")
    if (rows := log.array("meta/episode_ends").shape[0]) != len(log):
        yield Problem("meta/episode_ends", f"has {rows} rows for {len(log)} episodes")
    for name, of in names.items():
        if not log.has(name):
            yield Problem(name, "is missing")
            continue
        length = log.steps if name.startswith("data/") else len(log)
        array = log.array(name)
        if array.shape[0] != length:
            yield Problem(name, f"has {array.shape[0]} rows, expected {length}")
        if of and of != (array.dtype, array.shape[1:]):
            yield Problem(name, f"holds {array.dtype} {array.shape[1:]}, the robot says {of[0]} {of[1]}")


def _check_episodes(log: EpisodeLog) -> Iterator[Problem]:
    """Every episode, read on its own; equal complaints of neighbors are drawn together."""
    found: list[tuple[int, str]] = []
    for index in range(len(log)):
        try:
            found += [(index, what) for what in _complaints(log, log.read(index))]
        except DataError as error:
            found.append((index, _complaint(index, error)))
    for what in dict.fromkeys(what for _, what in found):
        of = [index for index, other in found if other == what]
        runs = np.split(of, np.flatnonzero(np.diff(of) > 1) + 1)
        for run in runs:
            yield Problem(f"episode {run[0]}" if len(run) == 1 else f"episodes {run[0]} to {run[-1]}", what)


def _complaints(log: EpisodeLog, episode: Episode) -> Iterator[str]:
    low, high = log.robot.action_bounds
    if (episode.action < low).any() or (episode.action > high).any():
        yield "actions are beyond the robot's bounds"
    if (np.diff(episode.time_ns) <= 0).any():
        yield "time_ns does not increase"
    order = [getattr(episode, name) for name in STEP_TIMES]
    for name, column in zip(STEP_TIMES, order, strict=True):
        known = None if column is None else column[column != UNKNOWN_TIME]
        if known is not None and (np.diff(known) < 0).any():
            yield f"{name} goes back"
    for earlier, later in pairwise((episode.time_ns[:-1], order[0], order[2])):
        if earlier is not None and later is not None and ((later != UNKNOWN_TIME) & (later < earlier)).any():
            yield "times are out of order: captured, received, sent"
    if not np.isin(episode.source, list(Source)).all():
        yield "source holds values that this program does not know"
    if not (episode.terminated[-1] or episode.truncated[-1]):
        yield "its last step is neither terminated nor truncated"
    fingerprint = episode.info.get("spec_fingerprint")
    if fingerprint is not None and not (isinstance(fingerprint, str) and len(fingerprint) == 64):
        yield "info: spec_fingerprint is not a SHA-256 digest"


def _check_writing(log: EpisodeLog) -> Iterator[Problem]:
    path = Path(log.path)
    if not (path / WRITING).exists() or is_being_written(path):
        return
    steps = sum(len(e) for e in _left_behind(path, log))
    lost = f"{steps} steps wait in its journal; " if steps else ""
    yield Problem(WRITING, f"its writer was killed: {lost}opening it, e.g. with log info, brings them in")


def is_being_written(path: Path) -> bool:
    """Return True if a process has the log open for writing."""
    lock = LogLock(path)
    try:
        written = not lock.acquire()
    except OSError:
        return True
    lock.release()
    return written


def repair(path: Path, out: Path) -> tuple[int, list[Problem]]:
    """Write every episode that can still be read, and those that a killed writer left behind, to a new log.

    The original is not touched. Where ``meta/episode_ends`` is lost, the steps marked as an episode's last say where
    episodes end.

    Returns:
        How many episodes were saved, and what was not and why.

    Raises:
        UsageError: Something is at ``out`` already.
        DataError: Nothing can be read.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; give another path or remove it")
    if not path.exists():
        raise DataError(f"no episode log at {path}; check the path")
    lost: list[Problem] = []
    try:
        log = EpisodeLog.open(path, heal=False)
    except DataError as error:
        lost.append(Problem("meta/episode_ends", one_line(error)))
        log = EpisodeLog.open(path, heal=False, ends=_ends_by_steps)
    with new_log(out, log.robot) as copy:

        def keep(which: int | str, read: Callable[[], Episode]) -> bool:
            try:
                copy.append(read())
                return True
            except LogWriteError:
                raise
            except DataError as error:
                lost.append(Problem(f"episode {which}", _complaint(which, error)))
                return False

        saved = sum(keep(index, partial(log.read, index)) for index in range(len(log)))
        try:
            for episode in _left_behind(path, log):
                saved += keep("in the journal", partial(lambda left: left, episode))
        except LogWriteError:
            raise
        except (SacflowError, OSError, ValueError, KeyError) as error:
            lost.append(Problem(WRITING, one_line(error)))
    return saved, lost


def _complaint(index: int | str, error: DataError) -> str:
    """What is wrong with an episode, without what names it."""
    return str(error).partition(f"episodes {index} to {index}: ")[2] or one_line(error)


def _ends_by_steps(log: EpisodeLog) -> list[int]:
    last = np.zeros(log.array("data/terminated").shape[0], bool)
    for name in ("data/terminated", "data/truncated"):
        rows = log.rows(name, 0, min(len(last), log.array(name).shape[0]))
        last[: len(rows)] |= rows
    return [int(row) + 1 for row in np.flatnonzero(last)]


def _left_behind(path: Path, log: EpisodeLog) -> Iterator[Episode]:
    """Episodes in the journal and the ring of a log whose writers are dead, the last one perhaps interrupted."""
    session = Session.read(path)
    if session is None:
        return
    position = {}
    with contextlib.suppress(OSError, ValueError):
        position = json.loads((path / WRITING / "commit" / "position").read_text())
    ring = session.attach(log.robot)
    try:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "log.zarr"
            EpisodeWriter(target, log.robot).close()
            layout = Layout(log.robot, session.state_size)
            Assembler(Store(target), layout, session.token, position).bring_in(path, ring)
            yield from EpisodeLog.open(target, heal=False).episodes()
    finally:
        if ring is not None:
            ring.close()
