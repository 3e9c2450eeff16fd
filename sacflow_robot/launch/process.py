"""One process under supervision."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import IO

from sacflow_robot.launch.cell import ProcessPlan

_KEPT_LINES = 200
_LONGEST_LINE = 16_384
_STEADY_S = 60.0
_LONGEST_PAUSE_S = 10.0
_GROUP_GRACE_S = 1.0
_PROBE_EVERY_S = 0.25
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


class State(Enum):
    WAITING = "waiting"  # for those before it
    STARTING = "starting"  # running, not ready yet
    READY = "ready"
    PAUSING = "restarting"  # it failed, and is started again in a moment
    STOPPING = "stopping"
    DONE = "done"  # ended well
    FAILED = "failed"


class SupervisedProcess:
    """A process of a cell: started in a process group of its own, its output read, stopped with all that it started.

    Not thread-safe: one supervisor calls it. Its output is read on a thread.

    Args:
        heard: Called with each line of its output, from the reading thread.
    """

    def __init__(self, plan: ProcessPlan, program: Sequence[str], heard: Callable[[str, str], None]) -> None:
        self.plan, self.state, self.restarts = plan, State.WAITING, 0
        self.status: int | None = None
        self._program, self._heard = program, heard
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._said_ready = threading.Event()
        self._began = self._ended = self._start_again_at = self._probed = 0.0
        self._recent_restarts = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    @property
    def uptime_s(self) -> float:
        if not self._began:
            return 0.0
        return (time.monotonic() if self.pid is not None else self._ended) - self._began

    def last_lines(self, count: int) -> list[str]:
        return list(self._lines)[-count:]

    def needless(self) -> bool:
        """True if its result exists already; then it counts as done."""
        if self.plan.unless is None or not Path(self.plan.unless).exists():
            return False
        self.state, self.status = State.DONE, 0
        self._lines.append(f"not needed: {self.plan.unless} exists")
        return True

    def start(self) -> None:
        terminal = self.plan.terminal
        child = [sys.executable, "-I", "-S", str(Path(__file__).with_name("child.py")), str(os.getpid())]
        self._said_ready.clear()
        self._began, self.state = time.monotonic(), State.STARTING
        self._process = subprocess.Popen(
            [*child, *self._program, *self.plan.words],
            stdin=None if terminal else subprocess.DEVNULL,
            stdout=None if terminal else subprocess.PIPE,
            stderr=None if terminal else subprocess.STDOUT,
            # What has the terminal stays in its foreground group, or reading a key would stop it.
            process_group=None if terminal else 0,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        if self._process.stdout is not None:
            self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
            self._reader.start()

    def poll(self) -> None:
        """Bring ``state`` up to date, and start it again if its time has come."""
        if self.state is State.PAUSING and time.monotonic() >= self._start_again_at:
            self.restarts += 1
            self.start()
        if self._process is None or self.state not in (State.STARTING, State.READY):
            return
        status = self._process.poll()
        if status is None:
            if self.state is State.STARTING and self._is_ready():
                self.state = State.READY
            return
        self._finish(status)
        if status == 0:
            self.state = State.DONE
        elif self._may_restart():
            self._recent_restarts += 1
            pause = min(0.5 * 2 ** (self._recent_restarts - 1), _LONGEST_PAUSE_S)
            self._start_again_at, self.state = time.monotonic() + pause, State.PAUSING
        else:
            self.state = State.FAILED

    def overdue(self) -> bool:
        return self.state is State.STARTING and self.uptime_s > self.plan.ready_within_s

    def ask_to_stop(self) -> None:
        """Ask it to stop (SIGINT, as Ctrl-C does)."""
        if self.state in (State.WAITING, State.PAUSING):
            self.state = State.DONE
        if self.pid is not None:
            self.state = State.STOPPING
            self._signal(signal.SIGINT)

    def wait_stopped(self, refresh: Callable[[], None]) -> None:
        """Wait for it to stop; SIGTERM after half of its time, and in the end SIGKILL to all that it started."""
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            begun, half = time.monotonic(), self.plan.stop_within_s / 2
            for until, stronger in ((half, signal.SIGTERM), (2 * half, signal.SIGKILL)):
                while process.poll() is None and time.monotonic() - begun < until:
                    refresh()
                    time.sleep(0.02)
                if process.poll() is None:
                    self._signal(stronger)
            process.wait()
        if self.state is State.STOPPING or self.status is None:
            self._finish(process.returncode)
            self.state = State.DONE
        refresh()

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._signal(signal.SIGKILL)
            self._finish(self._process.wait())
            self.state = State.DONE

    def _finish(self, status: int) -> None:
        self.status, self._ended = status, time.monotonic()
        self._clear_group()
        if self._reader is not None:
            self._reader.join(1.0)

    def _may_restart(self) -> bool:
        if self.uptime_s > _STEADY_S:
            self._recent_restarts = 0
        return self.plan.restart == "on-failure" and self._recent_restarts < self.plan.restarts

    def _is_ready(self) -> bool:
        plan = self.plan
        if plan.ready is None or (plan.terminal and plan.endpoint is None and not plan.ready_at_end):
            return True
        if plan.ready_at_end:
            return False
        if plan.endpoint is None:
            return self._said_ready.is_set()
        if time.monotonic() - self._probed < _PROBE_EVERY_S:
            return False
        self._probed = time.monotonic()
        try:
            socket.create_connection(plan.endpoint, timeout=0.2).close()
        except OSError:
            return False
        return True

    def _signal(self, number: int) -> None:
        """SIGKILL goes to all that it started; the others to itself, which tells its own."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL and not self.plan.terminal:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)

    def _clear_group(self) -> None:
        if self.plan.terminal or self._process is None:
            return
        group, begun = self._process.pid, time.monotonic()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            while time.monotonic() - begun < _GROUP_GRACE_S:
                os.killpg(group, 0)
                time.sleep(0.02)
            os.killpg(group, signal.SIGKILL)

    def _read(self, output: IO[bytes]) -> None:
        with output:
            for raw in iter(lambda: output.readline(_LONGEST_LINE), b""):
                # A progress bar overwrites its line; what counts is what it shows last.
                text = _ANSI.sub("", raw.decode(errors="replace")).rstrip("\r\n").rpartition("\r")[2]
                text = "".join(c if c.isprintable() else " " for c in text).rstrip()
                if not text:
                    continue
                self._lines.append(text)
                if self.plan.ready is not None and self.plan.ready in text:
                    self._said_ready.set()
                self._heard(self.plan.name, text)
