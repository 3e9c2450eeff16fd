"""``sacflow-robot`` on terminals that are slow, stopped, poor or gone."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.serve.server import PolicyServer

POLICY = Path(__file__).parents[2] / "policies" / "lift.onnx"
PROGRAM = [sys.executable, "-m", "sacflow_robot"]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with PolicyServer(OnnxPolicy(POLICY), "tcp://127.0.0.1:*") as made:
        yield made.start().address


class Screen:
    """A terminal and what was written on it."""

    def __init__(self) -> None:
        self.hands, self.file = pty.openpty()
        self.text = ""

    def hear(self, words: str, within_s: float = 30.0) -> None:
        until = time.monotonic() + within_s
        while words not in self.text:
            assert time.monotonic() < until, f"{words!r} is not in {self.text!r}"
            if select.select([self.hands], [], [], 0.1)[0]:
                self.text += os.read(self.hands, 65536).decode(errors="replace")

    def close(self) -> None:
        os.close(self.hands)
        os.close(self.file)


def full_pipe() -> tuple[int, int]:
    """Reading and writing end of a pipe that takes no more."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"x" * 512)
    except BlockingIOError:
        os.set_blocking(writer, True)
    return reader, writer


def start(file: int, server: str, *words: str) -> subprocess.Popen[bytes]:
    command = [*PROGRAM, "run", "--server", server, "--robot", "rtsim:lift?horizon_s=60", "--episodes", "9", *words]
    return subprocess.Popen(command, stdin=file, stdout=file, stderr=file, start_new_session=True)


def journal(log: Path) -> int:
    """Bytes logged of the episode that runs."""
    return sum(file.stat().st_size for file in log.glob(".writing/journal.*"))


def wait_for_steps(log: Path, more_than: int, process: subprocess.Popen[bytes]) -> int:
    until = time.monotonic() + 30
    while (size := journal(log)) <= more_than:
        assert time.monotonic() < until and process.poll() is None, f"{size} bytes logged"
        time.sleep(0.05)
    return size


@pytest.mark.parametrize(("blocks", "number"), [("terminal", signal.SIGINT), ("pipe", signal.SIGTERM)])
def test_output_that_nobody_takes_stops_neither_the_loop_nor_its_end(
    server: str, tmp_path: Path, blocks: str, number: signal.Signals
) -> None:
    log = tmp_path / "log.zarr"
    screen, (reader, writer) = Screen(), full_pipe()
    process = start(screen.file if blocks == "terminal" else writer, server, "--log", str(log))
    try:
        if blocks == "terminal":
            screen.hear("running")
        wait_for_steps(log, 0, process)
        os.write(screen.hands, b"\x13")  # Ctrl-S
        time.sleep(0.5)
        wait_for_steps(log, wait_for_steps(log, 0, process), process)
        process.send_signal(number)
        assert process.wait(10) == 130
    finally:
        process.kill()
        process.wait()
        screen.close()
        os.close(reader)
        os.close(writer)
    assert EpisodeLog.open(log).read(0).info["interrupted"]


def test_ctrl_s_is_a_key_and_a_terminal_that_vanishes_stops_the_arm_of_a_person(server: str, tmp_path: Path) -> None:
    log, screen = tmp_path / "log.zarr", Screen()
    process = start(screen.file, server, "--log", str(log), "--keyboard", "--arm-wait", "2")
    try:
        screen.hear("this help")
        wait_for_steps(log, 0, process)
        os.write(screen.hands, b"\x13t")
        screen.hear("you have the robot")
        os.write(screen.hands, b" \r")
        screen.hear("waiting for a person")
        assert "stopped by hand" in screen.text
        os.write(screen.hands, b"\r")
        wait_for_steps(log, 0, process)
        os.write(screen.hands, b"t")
        time.sleep(0.5)
        screen.close()
        assert process.wait(30) == 1
    finally:
        process.kill()
        process.wait()
    episodes = EpisodeLog.open(log)
    assert [episodes.read(i).info["stopped"] for i in range(len(episodes))] == ["stopped by hand"] * 2


def test_results_that_nobody_takes_end_the_run_with_a_word(server: str) -> None:
    reader, writer = full_pipe()
    command = [*PROGRAM, "run", "--server", server, "--robot", "sim:lift", "--episodes", "1", "--json"]
    process = subprocess.Popen(command, text=True, stdout=writer, stderr=subprocess.PIPE)
    try:
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
        os.close(reader)
        os.close(writer)
    assert process.returncode == 1 and "did not accept all results" in said


def shown(*words: str, **environment: str) -> str:
    """What Python writes on a terminal."""
    screen = Screen()
    kept = {name: value for name, value in os.environ.items() if name not in ("TERM", "NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen([sys.executable, *words], stdout=screen.file, stderr=screen.file, env=kept | environment)
    while select.select([screen.hands], [], [], 0.1)[0] or process.poll() is None:
        if select.select([screen.hands], [], [], 0)[0]:
            screen.text += os.read(screen.hands, 65536).decode()
    screen.close()
    return screen.text


BAR = """
from sacflow_robot.cli import common
with common.progress_bar("episodes") as bar:
    bar.update(bar.add_task("running", total=1, success=""), advance=1)
common.console().print("done", style="red")
"""


def test_poor_terminals_and_people_without_colors() -> None:
    dumb = shown("-c", BAR, TERM="dumb")
    assert "1/1 episodes" in dumb and "\x1b" not in dumb
    assert "\x1b[3" not in shown("-c", BAR, TERM="xterm", NO_COLOR="1")
    assert "\x1b[36m" in shown("-c", BAR, TERM="xterm")
    helped = shown("-m", "sacflow_robot", "run", "--help", TERM="xterm", NO_COLOR="1")
    assert "usage: " in helped and "\x1b" not in helped


def test_a_wrong_option_is_one_plain_line_on_a_terminal_too() -> None:
    said = shown("-m", "sacflow_robot", "run", "--nope", TERM="xterm")
    assert said.startswith("sacflow-robot: error: Unrecognized options: --nope") and "\x1b" not in said
    assert len(said.splitlines()) == 1
