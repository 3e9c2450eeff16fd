"""From records to episodes: what the log writer does while steps arrive, and what recovery does with what it left behind.

Beside the arrays, ``.writing`` holds ``session`` (where the ring is) and ``journal.N``: records from number N on, as they
came, each with a checksum. Every record up to a commit's ``position`` is in the arrays; the later ones are in the
journal, the latest of all in the ring alone. A killed process leaves all three, a power cut takes the ring. A disk that is
full or failing raises OSError; nothing is lost by trying again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sacflow_robot.data.log.columns import Columns
from sacflow_robot.data.log.ring import Kind, Layout, Records, Ring, checksum
from sacflow_robot.data.log.store import WRITING, Store
from sacflow_robot.errors import DataError, one_line
from sacflow_robot.spec import RobotSpec
from sacflow_robot.utils.atomic_files import put, sync_folder

_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Session:
    """One recorder's writing to a log."""

    token: str  # tells its ring and its positions from those of others
    ring: str  # where its ring is
    state_size: int  # S of its simulator states; 0 for none

    def write(self, log: Path) -> None:
        """Say so in the log's folder."""
        put(log / WRITING / "session", json.dumps(asdict(self)).encode(), log / WRITING)
        sync_folder(log / WRITING)

    def attach(self, robot: RobotSpec) -> Ring | None:
        """Its ring, for this process alone, or None when it is gone; see :meth:`Ring.attach`."""
        return Ring.attach(Path(self.ring), self.token, Layout(robot, self.state_size))

    @staticmethod
    def read(log: Path) -> Session | None:
        """The session that a log is in, or was in when its writers died; None where there was none."""
        try:
            return Session(**json.loads((log / WRITING / "session").read_text()))
        except FileNotFoundError:
            if any((log / WRITING).glob("journal.*")):
                raise DataError(f"{log} has a journal and has lost the session that it is of") from None
            return None
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"the session of {log} cannot be read: {one_line(error)}") from None


class WriteAheadLog:
    """The records of one episode after another, appended to a file that begins anew with each episode."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = -1

    def write(self, records: Records) -> None:
        """Append records to the file; the operating system has them then, the disk not yet."""
        if self._file < 0:
            name = self._folder / f"journal.{int(records['index'][0])}"
            self._file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            sync_folder(self._folder)
        records["crc"] = checksum(records)
        data = memoryview(records.tobytes())
        while data:
            data = data[os.write(self._file, data) :]

    def sync(self) -> None:
        """Have the disk hold all that was written."""
        if self._file >= 0:
            os.fdatasync(self._file)

    def begin_anew(self) -> None:
        """Forget what was written, by a log writer before this one too: it is committed."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        for file in self._folder.glob("journal.*"):
            file.unlink()

    @staticmethod
    def read(folder: Path, layout: Layout, first: int) -> Iterator[Records]:
        """The intact records from number ``first`` on, in blocks."""
        size = max(1, _BLOCK_BYTES // layout.bytes)
        files = sorted((int(f.suffix[1:]), f) for f in folder.glob("journal.*") if f.suffix[1:].isdigit())
        for _, file in files:
            for at in range(0, file.stat().st_size // layout.bytes, size):
                block = np.fromfile(file, layout.step, size, offset=at * layout.bytes)
                block = block[block["index"] >= first]
                sound = (block["index"] == first + np.arange(len(block))) & (block["crc"] == checksum(block))
                whole = len(block) if sound.all() else int(np.argmin(sound))
                if whole:
                    yield block[:whole]
                first += whole
                if whole < len(block):
                    break


class Assembler:
    """Turns records into rows of a store. Rows are staged as they come, and each episode is committed when it ends.

    The last step is held back until it is known whether another follows: an episode's last step is marked as its end.
    """

    def __init__(self, store: Store, layout: Layout, token: str, position: Mapping[str, Any] | None = None) -> None:
        position = store.position if position is None else position
        self._store = store
        self._layout = layout
        self._token = token
        self.next = int(position.get("next", 0)) if position.get("token") == token else 0
        self._info: Records | None = None
        self._held: Records = np.empty(0, layout.step)  # the last step and the observation before it

    def feed(self, records: Records) -> None:
        """Take the records from number ``next`` on."""
        marks = np.flatnonzero(records["kind"] != Kind.STEP)
        for part in np.split(records, np.unique([*marks, *(marks + 1)])):
            if len(part) == 0:
                continue
            kind = int(part["kind"][0])
            self.next = int(part["index"][-1]) + 1
            if kind == Kind.BEGIN:
                self.finish(int(part["index"][0]))
                self._info = part.view(self._layout.info)["info"]
            elif kind == Kind.END:
                self._info = part.view(self._layout.info)["info"]
                self.finish()
            elif kind == Kind.START:
                self._held = part.copy()
            else:
                rows = np.concatenate([self._held, part])
                self._stage(rows[:-1])
                self._held = rows[-2:]

    def bring_in(self, log: Path, ring: Ring | None) -> None:
        """Take the records that a log's dead writers left in journal and ring, and finish the episode in progress."""
        for block in WriteAheadLog.read(log / WRITING, self._layout, self.next):
            self.feed(block)
        while ring is not None and self.next < ring.published:
            most = max(1, min(ring.capacity, _BLOCK_BYTES // self._layout.bytes))
            block = ring.copy(self.next, min(ring.published, self.next + most))
            sound = block["index"] == self.next + np.arange(len(block))
            block = block if sound.all() else block[: int(np.argmin(sound))]
            if len(block) == 0:
                break
            self.feed(block)
        self.finish()

    def finish(self, following: int | None = None) -> None:
        """Commit the episode in progress, if it has steps, with the info that came last."""
        if self._info is not None and len(self._held) == 2:
            last = self._held
            last["truncated"][1] |= not last["terminated"][1]
            self._stage(last)
            meta: Columns = {f"last_{key}": last[key][1:] for key in self._layout.observed}
            self._store.end_episode({**meta, "info": self._info})
        if self._info is not None:
            self._store.commit({"token": self._token, "next": self.next if following is None else following})
        self._info = None
        self._held = np.empty(0, self._layout.step)

    def _stage(self, records: Records) -> None:
        """Stage the steps of records[1:]; each follows the observation of the record before it."""
        if len(records) > 1:
            rows: Columns = {key: records[key][:-1] for key in self._layout.observed}
            rows |= {key: records[key][1:] for key in self._layout.acted}
            self._store.stage("data", rows)


def recover(log: Path, robot: RobotSpec) -> None:
    """Bring what dead writers left behind into the arrays, and close the log. The caller holds the log's lock."""
    session, ring = Session.read(log), None
    if session is None:
        Ring.remove_orphans(log)
    else:
        ring = session.attach(robot)
    try:
        if not (log / WRITING).exists():  # the log writer was alive and has finished
            return
        store = Store(log)
        if session is not None:
            Assembler(store, Layout(robot, session.state_size), session.token).bring_in(log, ring)
        if ring is not None:
            ring.close(remove=True)
        store.close()
    except (KeyError, ValueError) as error:
        raise DataError(f"{log} is damaged: its journal does not fit it ({error})") from None
    finally:
        if ring is not None:
            ring.close()
