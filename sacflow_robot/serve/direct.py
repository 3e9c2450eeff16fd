"""A client's connection that its own thread writes to and reads from.

A ZeroMQ socket does both on a thread of its own: a question passes from thread to thread before it leaves, and its answer
before it is seen, and to wake a thread takes as long as a small network's inference. So a client without keys speaks ZeroMQ's
protocol itself. A thread keeps the heartbeats and makes lost connections again; it does not stand between question and answer.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Sequence

from sacflow_robot.errors import RefusedError, UsageError, WireError
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve import zmtp
from sacflow_robot.serve.habit import AWAKE_S, PATIENCE, PING, TIME_TO_LIVE, Habit, NotThereError
from sacflow_robot.serve.link import Link, Place

_BELLS = 4096
_BRIEFLY_S = 0.001  # the keeper may be looking
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 0.2  # a person who enables a robot after a restart finds it connected


class _Keeper:
    """Connects, anew where a connection is lost, and keeps heartbeats; on a thread of its own."""

    def __init__(self, place: Place, heartbeat_s: float) -> None:
        self._place, self._heartbeat_s = place, heartbeat_s
        self.link: Link | None = None
        self.losses, self.barred = 0, False
        self.changed = threading.Condition()
        self.ended: str | None = None  # why it is no use any more
        self._bell, self._ring = socket.socketpair()
        for end in (self._bell, self._ring):
            end.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="policy-client", daemon=True)
        self._thread.start()
        _KEEPERS.add(self)

    def lose(self, link: Link) -> None:
        """This connection has ended."""
        with self.changed:
            if self.link is link:
                self.link, self.losses = None, self.losses + 1
                self.changed.notify_all()
        link.end()
        self.wake()

    def wake(self) -> None:
        """There is something for the thread to do."""
        with contextlib.suppress(OSError):
            self._ring.send(b"!")

    def close(self) -> None:
        with self.changed:
            self.ended, link = self.ended or "is closed", self.link
            self.link, self.losses = None, self.losses + 1
            self.changed.notify_all()
        if link is not None:
            with contextlib.suppress(OSError):
                link.socket.shutdown(socket.SHUT_WR)  # what was sent still leaves
        self.wake()
        if self._thread is not threading.current_thread():
            self._thread.join(0.1)  # unless it is connecting, which it gives up in its own time

    def forked(self) -> None:
        """Let go of what belongs to the parent of this process: to write there, or to end it, would be felt over there."""
        self.changed = threading.Condition()  # who held the other one is not in this process
        link, self.link = self.link, None
        self.ended, self.losses = "was made before this process forked", self.losses + 1
        for end in (self._bell, self._ring, *(() if link is None else (link.socket,))):
            end.close()

    def _run(self) -> None:
        pause = _FIRST_PAUSE_S
        while self.ended is None:
            try:
                link = Link(self._place)
            except (OSError, UnicodeError, WireError, zmtp.KeysNeededError) as error:
                with self.changed:
                    self.barred = isinstance(error, zmtp.KeysNeededError)
                    self.changed.notify_all()
            else:
                self._keep(link)
                pause = _FIRST_PAUSE_S
            with self.changed:
                self.changed.wait_for(lambda: self.ended is not None, pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        for end in (self._bell, self._ring):
            end.close()

    def _keep(self, link: Link) -> None:
        """Until this connection ends."""
        with self.changed:
            if self.ended is None:
                self.link, self.barred = link, False
                self.changed.notify_all()
        with contextlib.suppress(OSError, WireError):
            self._beat(link)
        self.lose(link)
        link.close()

    def _doze(self, wait_s: float, link: Link) -> None:
        """Wait, or until there is something to do for this connection."""
        waits = select.poll()
        waits.register(self._bell, select.POLLIN)
        if link.unsent:
            waits.register(link.socket, select.POLLOUT)
        waits.poll(max(1.0, 1e3 * wait_s))
        with contextlib.suppress(BlockingIOError):
            self._bell.recv(_BELLS)

    def _beat(self, link: Link) -> None:
        """Until this connection ends, or is to end.

        Raises:
            OSError, WireError: It has ended.
        """
        now = next_ping = time.monotonic()
        asked = None  # when the first ping was sent that nothing was heard after
        while self.link is link:
            if now >= next_ping:
                link.send([zmtp.ping(TIME_TO_LIVE * self._heartbeat_s)])
                asked = now if asked is None else asked
                next_ping = now + PING * self._heartbeat_s
            until = next_ping if asked is None else min(next_ping, asked + PATIENCE * self._heartbeat_s)
            self._doze(until - now, link)
            if link.unsent:
                link.flush()
            if link.reading.acquire(blocking=False):  # or whoever waits for an answer looks
                try:
                    if link.come(0):
                        link.take()
                finally:
                    link.reading.release()
            now = time.monotonic()
            if asked is not None and link.heard >= asked:
                asked = None
            if asked is not None and now >= asked + PATIENCE * self._heartbeat_s and not link.has_come():
                return


_KEEPERS: weakref.WeakSet[_Keeper] = weakref.WeakSet()


def _forked() -> None:
    for keeper in list(_KEEPERS):
        keeper.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class DirectConnection:
    """As :class:`~sacflow_robot.serve.connection.Connection`, without a thread in between; for clients without keys.

    Args:
        place: What :func:`~sacflow_robot.serve.link.place_of` the server's address returned.
        address: That address.
        heartbeat_s: Time between heartbeats; a server that does not answer is gone within two.
        awake_s: How long an answer is waited for awake at most.
    """

    def __init__(self, place: Place, address: str, heartbeat_s: float, awake_s: float = AWAKE_S) -> None:
        self.address, self.heartbeat_s = address, heartbeat_s
        self._awake_s, self._habit, self._seen = awake_s, Habit(), 0
        self._keeper = _Keeper(place, heartbeat_s)
        self._end = weakref.finalize(self, self._keeper.close)

    def ready(self, wait_s: float) -> bool:
        """Wait until there is a server to send to; whether there is.

        Raises:
            RefusedError: The server does not let this client in.
            UsageError: The connection is closed, or its process forked.
        """
        keeper = self._keeper
        with keeper.changed:
            keeper.changed.wait_for(
                lambda: keeper.link is not None or keeper.barred or keeper.ended is not None, wait_s
            )
            self._check_open()
            if keeper.barred:
                keeper.barred = False
                raise RefusedError(f"{self.address} does not let this client in; does it know this client's key?")
            return keeper.link is not None

    def broken(self) -> bool:
        """Whether the connection was lost since the last look."""
        link = self._keeper.link
        if link is not None and link.reading.acquire(blocking=False):
            try:
                if link.come(0):
                    self._take(link)
            finally:
                link.reading.release()
        lost = self._keeper.losses != self._seen
        self._seen = self._keeper.losses
        return lost

    def send(self, frames: Sequence[bytes | memoryview]) -> None:
        """Hand a message over.

        Raises:
            NotThereError: There is nobody to send it to.
        """
        link = self._keeper.link
        if link is None:
            raise NotThereError
        try:
            complete = link.send(zmtp.pack(frames))
        except OSError:
            self._keeper.lose(link)
            raise NotThereError from None
        if not complete:
            self._keeper.wake()

    def receive(self, wait_s: float) -> list[bytes] | None:
        """The next message; None if none comes in time, or when the connection is lost meanwhile.

        Raises:
            UsageError: The connection is closed, or its process forked.
        """
        keeper, link = self._keeper, self._keeper.link
        if link is None:
            self._check_open()
            with keeper.changed:
                keeper.changed.wait_for(lambda: keeper.link is not None or keeper.ended is not None, wait_s)
            return None
        if not link.reading.acquire(timeout=max(_BRIEFLY_S, wait_s)):
            return None  # another thread waits
        try:
            return self._next(link, wait_s) if keeper.link is link else None
        finally:
            link.reading.release()

    def _next(self, link: Link, wait_s: float) -> list[bytes] | None:
        """The next message of this connection, with ``reading`` held."""
        if not link.inbox and link.come(0) and not self._take(link):
            return None
        if link.inbox:
            return link.inbox.popleft()
        if wait_s <= 0:
            return None
        began = time.monotonic()
        awake = self._habit.awake()
        awake_s = min(wait_s, self._awake_s, self._habit.patience_s) if awake else 0.0
        if not self._wait(link, began + wait_s, began + awake_s):
            return None
        self._habit.learn(awake, time.monotonic() - began)
        return link.inbox.popleft()

    def _wait(self, link: Link, deadline: float, awake_until: float) -> bool:
        """Until a message has come; False if the connection is lost, or it is too late."""
        now = time.monotonic()
        while now < deadline:
            if now < awake_until:
                wire.give_way()
                come = link.come(0)
            else:
                come = link.come(1e3 * (deadline - now))
            if come:
                if not self._take(link):
                    return False
                if link.inbox:
                    return True
            now = time.monotonic()
        return False

    def _take(self, link: Link) -> bool:
        """Read what has come; whether the connection stands."""
        try:
            link.take()
        except (OSError, WireError):
            self._keeper.lose(link)
            return False
        return True

    def _check_open(self) -> None:
        if self._keeper.ended is not None:
            raise UsageError(f"the connection to {self.address} {self._keeper.ended}; make a new client")

    def close(self, linger_ms: int = 0) -> None:
        """Close the connection; what the system has taken still leaves."""
        self._end()
