"""The process that takes steps from the ring to the disk: ``python -m sacflow_robot.data.log.log_writer LOG TOKEN PARENT``.

It outlives the control loop: when that dies, it logs what is in the ring, marks the episode interrupted, and ends. When it
dies itself, e.g. of a full disk, the next one goes on from the journal and the ring that it leaves.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from sacflow_robot.data.log.columns import read_robot
from sacflow_robot.data.log.ring import Kind, Ring
from sacflow_robot.data.log.store import WRITING, Store
from sacflow_robot.data.log.write_ahead_log import Assembler, Session, WriteAheadLog
from sacflow_robot.errors import DataError, SacflowError, one_line

_TICK_S, _SYNC_S = 0.01, 0.4
_BLOCK_BYTES = 8 << 20


class LogWriter:
    """Drains one ring, held by this process, into one log."""

    def __init__(self, log: Path, ring: Ring, token: str) -> None:
        self._ring = ring
        self._block = max(1, min(ring.capacity // 4, _BLOCK_BYTES // ring.layout.bytes))
        self._journal = WriteAheadLog(log / WRITING)
        self._store = Store(log)
        self._assembler = Assembler(self._store, ring.layout, token)
        self._synced_at = time.monotonic()
        # What a log writer before this one had in its journal.
        for records in WriteAheadLog.read(log / WRITING, ring.layout, self._assembler.next):
            self._assembler.feed(records)
            ring.beat()
        if self._assembler.next < ring.drained:
            raise DataError(f"the journal ends at record {self._assembler.next}, expected {ring.drained}")
        ring.drained = self._assembler.next

    def drain(self, stop: int) -> None:
        """Take the records before number ``stop`` from the ring.

        A record's place is free once the journal has it. The journal begins anew after each episode's end.
        """
        while (first := self._ring.drained) < stop:
            records = self._ring.copy(first, min(stop, first + self._block))
            ends = np.flatnonzero(records["kind"] == Kind.END)
            if len(ends):
                records = records[: ends[0] + 1]
            self._journal.write(records)
            self._ring.drained = first + len(records)
            self.sync()
            self._ring.beat()
            self._assembler.feed(records)
            if len(ends):
                self._journal.begin_anew()

    def sync(self) -> None:
        """Have the disk hold the journal, if that is due."""
        if time.monotonic() - self._synced_at >= _SYNC_S:
            self._journal.sync()
            self._synced_at = time.monotonic()

    def run(self, parent: int) -> None:
        """Drain until the writer closes the ring or dies."""
        seen = self._ring.drained
        while True:
            self._ring.beat()
            over = self._ring.closed or os.getppid() != parent
            published = self._ring.published
            # What was published a tick ago: by now every core agrees on what those records hold.
            self.drain(published if over else seen)
            if over:
                break
            seen = published
            self.sync()
            time.sleep(_TICK_S)
        self._assembler.finish()
        # The ring last: whoever finds none, and nobody holding the log, closes the log too, and two at once damage it.
        self._store.close()
        self._ring.close(remove=True)


def main(log: Path, token: str, parent: int) -> int:
    """Keep one session; returns the exit status."""
    session = Session.read(log)
    if session is None or session.token != token:
        return 1
    ring = None
    try:
        ring = session.attach(read_robot(log))
        if ring is None or Session.read(log) != session:  # somebody else has recovered the log meanwhile
            return 1
        LogWriter(log, ring, token).run(parent)
    except (OSError, SacflowError) as error:
        if ring is not None:
            ring.error = one_line(error)
        return 1
    return 0


if __name__ == "__main__":
    # Never take a core from the control loop: wait until it sleeps. Full speed otherwise.
    if hasattr(os, "sched_setscheduler"):  # Linux
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
