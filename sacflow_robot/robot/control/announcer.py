"""Text for people that never makes the control loop wait for a terminal."""

import atexit
import io
import os
import select
import signal
import sys
import threading
from queue import Empty, SimpleQueue
from typing import Any, TextIO, cast

_MOST_WAITING = 1000
# Longest waits at the end for a terminal that takes nothing, and for a program that reads results.
PATIENCE_S, _RESULTS_PATIENCE_S = 0.5, 2.0


class Announcer(io.TextIOBase):
    """A text stream whose writer never waits: a thread writes to the stream behind it.

    A terminal may accept no text for long: Ctrl-S, a connection that stalls, a full pipe. Then the oldest pieces are
    dropped, and their number is told once the terminal accepts text again. Nothing raises: a stream that is gone
    swallows what is written to it. Threads and signal handlers may write.

    Args:
        most_waiting: Pieces of text to keep while it accepts nothing.
    """

    def __init__(self, stream: TextIO, most_waiting: int = _MOST_WAITING) -> None:
        self._stream, self._most = stream, most_waiting
        self._waiting: SimpleQueue[str | None] = SimpleQueue()  # its put may be called again from a signal handler
        self._dropped = 0
        self._broken = False
        try:
            self._file: int | None = stream.fileno()
        except (OSError, ValueError):
            self._file = None
        self._thread = threading.Thread(target=self._pass_on, name="announcer", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        while self._waiting.qsize() >= self._most:
            try:
                self._waiting.get_nowait()
                self._dropped += 1
            except Empty:
                break
        self._waiting.put(text)
        return len(text)

    def finish(self, patience_s: float = PATIENCE_S) -> bool:
        """Write what waits, for ``patience_s`` seconds at most; what comes later is dropped. Returns whether the stream
        has taken everything."""
        self._waiting.put(None)
        self._thread.join(patience_s)
        return not (self._thread.is_alive() or self._broken)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        """Never strict: a letter that the terminal does not know must not end the loop."""
        errors = self._stream.errors
        return "backslashreplace" if errors in (None, "strict") else errors

    def _pass_on(self) -> None:
        while (text := self._waiting.get()) is not None:
            dropped, self._dropped = self._dropped, 0
            if dropped:
                text = f"\n({dropped} pieces of text were dropped: the terminal did not accept them)\n{text}"
            try:
                self._write(text)
            except (OSError, ValueError):  # the terminal is gone
                self._broken = True

    def _write(self, text: str) -> None:
        if self._file is None:
            self._stream.write(text)
            self._stream.flush()
            return
        # Not through the stream's own buffer: the interpreter's exit waits for whoever is in there.
        data = text.encode(self.encoding, self.errors)
        while data:
            try:
                data = data[os.write(self._file, data) :]
            except BlockingIOError:
                select.select([], [self._file], [], 1.0)


_own: list[tuple[TextIO, Announcer]] = []  # that of :func:`announce`, and for which standard error


def announce(line: str) -> None:
    """Print a line on standard error without waiting for it."""
    stream: Any = sys.stderr
    if stream is None:
        return
    if not isinstance(stream, Announcer):
        if not _own or _own[0][0] is not stream:
            _finish_own()
            _own.append((stream, Announcer(stream)))
        stream = _own[0][1]
    stream.write(f"{line}\n")


@atexit.register
def _finish_own() -> None:
    while _own:
        _own.pop()[1].finish()


class TerminalGuard:
    """While a robot moves, no terminal blocks or suspends the process.

    Standard output and standard error pass through an :class:`Announcer` each. Ctrl-Z, and what a terminal does to a process
    in the background, are ignored: a process that is suspended hears no stop.
    """

    def __init__(self) -> None:
        self._streams = sys.stdout, sys.stderr
        if sys.stdout is not None:
            sys.stdout.flush()
        self._out, self._err = (None if stream is None else Announcer(stream) for stream in self._streams)
        if self._out is not None:
            sys.stdout = cast(TextIO, self._out)
        if self._err is not None:
            sys.stderr = cast(TextIO, self._err)
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
                self._handlers[number] = signal.signal(number, signal.SIG_IGN)

    def end(self) -> bool:
        """Give the terminal what waits, within bounds, and everything its state back. Returns whether standard output
        has taken everything."""
        sys.stdout, sys.stderr = self._streams
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        taken = self._out is None or self._out.finish(_RESULTS_PATIENCE_S)
        if self._err is not None:
            if not taken:
                self._err.write("standard output did not accept all results\n")
            self._err.finish(PATIENCE_S)
        return taken
