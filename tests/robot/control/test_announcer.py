"""Pipes that nobody reads."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TextIO

import pytest

from sacflow_robot.robot.control.announcer import Announcer, announce


class Blocked:
    """A full pipe as a text stream."""

    def __init__(self) -> None:
        self.reader, writer = os.pipe()
        os.set_blocking(writer, False)
        try:
            while True:
                os.write(writer, b"x" * 512)
        except BlockingIOError:
            os.set_blocking(writer, True)
        self.stream: TextIO = os.fdopen(writer, "w", encoding="ascii")

    def read(self, until: bytes) -> bytes:
        text = b""
        while until not in text:
            text += os.read(self.reader, 65536)
        return text.lstrip(b"x")


@pytest.fixture
def blocked() -> Iterator[Blocked]:
    made = Blocked()
    yield made
    os.close(made.reader)
    made.stream.close()


def test_a_writer_never_waits_and_the_newest_is_kept(blocked: Blocked) -> None:
    announcer = Announcer(blocked.stream, most_waiting=100)
    began = time.monotonic()
    for i in range(5000):
        announcer.write(f"line {i}°\n")
    assert not announcer.finish(0.1)
    assert time.monotonic() - began < 1.0
    text = blocked.read(b"line 4999")
    assert b"pieces of text were dropped" in text and b"line 2500" not in text
    assert b"line 4999\\xb0" in text, "a letter that the stream does not know is not an error"
    announcer._thread.join(5)


def test_everything_is_written_in_order_at_the_end() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        announcer = Announcer(stream)
        for i in range(500):
            announcer.write(f"{i}\n")
        assert announcer.finish(5.0)
    with os.fdopen(reader) as written:
        assert written.read().split() == [str(i) for i in range(500)]


def test_a_stream_without_a_file_and_one_that_is_gone() -> None:
    memory = io.StringIO()
    announcer = Announcer(memory)
    announcer.write("said")
    assert announcer.finish(5.0) and memory.getvalue() == "said"
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    gone = Announcer(stream)
    for _ in range(3):
        gone.write("nobody hears")
    assert not gone.finish(5.0)
    stream.close()


def test_a_line_for_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (io.StringIO(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        announce("a remark")
        until = time.monotonic() + 5
        while not stream.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
        assert stream.getvalue() == "a remark\n"
    monkeypatch.setattr(sys, "stderr", None)
    announce("to nobody")


LOOP = """
import signal, sys, time
from sacflow_robot.robot.control.announcer import TerminalGuard
guard = TerminalGuard()
began = time.monotonic()
for _ in range(100):
    print("a driver's own remark " * 100)
    print("of the loop" * 100, file=sys.stderr)
assert time.monotonic() - began < 1.0
assert signal.getsignal(signal.SIGTSTP) is signal.SIG_IGN
taken = guard.end()
assert sys.stdout is sys.__stdout__ and sys.stderr is sys.__stderr__
assert signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL
sys.exit(0 if taken else 7)
"""


@pytest.mark.parametrize("which", ["stdout", "stderr", "both"])
def test_a_process_whose_output_nobody_reads_goes_on_and_ends(blocked: Blocked, which: str) -> None:
    out = subprocess.DEVNULL if which == "stderr" else blocked.stream
    err = subprocess.PIPE if which == "stdout" else blocked.stream
    process = subprocess.Popen([sys.executable, "-c", LOOP], stdout=out, stderr=err, text=True)
    _, said = process.communicate(timeout=30)
    assert process.returncode == (0 if which == "stderr" else 7), said
    assert which != "stdout" or "standard output did not accept all results" in said
