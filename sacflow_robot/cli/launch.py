"""``sacflow-robot launch``."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
import yaml

from sacflow_robot.cli import COMMANDS, common
from sacflow_robot.errors import DataError, SacflowError, one_line

_STOP_WAIT_S = 5.0
_POLL_S = 0.1


@dataclass(frozen=True)
class Launch:
    """Start the processes of a launch file, in order, and stop them all when the last one ends or any other fails.

    Attributes:
        file: Launch file: a YAML map of process names to commands of this program, in the order of starting.
    """

    file: Annotated[Path, tyro.conf.Positional]

    def run(self) -> int:
        out = common.console()
        commands = _read(self.file)
        running: dict[str, subprocess.Popen[bytes]] = {}
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            for name, words in commands.items():
                out.print(f"{name}: {common.command_line(*words)}")
                running[name] = subprocess.Popen([sys.executable, "-m", "sacflow_robot", *words])
            return _watch(running)
        finally:
            signal.signal(signal.SIGTERM, previous)
            _stop(list(running.values()))


def _read(path: Path) -> dict[str, list[str]]:
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"launch file {path} cannot be read: {one_line(error)}") from None
    if not isinstance(data, dict) or not data or not all(isinstance(v, str) for v in data.values()):
        raise DataError(f"launch file {path} is not a map of process names to command lines")
    try:
        commands = {str(name): shlex.split(line) for name, line in data.items()}
    except ValueError as error:
        raise DataError(f"launch file {path}: a command line cannot be read: {one_line(error)}") from None
    for name, words in commands.items():
        if not words or not any(" ".join(words[:n]) in COMMANDS for n in (1, 2)):
            raise DataError(f"launch file {path}: process {name!r} starts with no command of this program")
    return commands


def _watch(running: dict[str, subprocess.Popen[bytes]]) -> int:
    """Wait until the last process ends, or another one fails; returns the exit status."""
    last = list(running)[-1]
    while True:
        for name, process in running.items():
            status = process.poll()
            if status is None:
                continue
            if name == last:
                return status
            raise SacflowError(f"process {name!r} ended first, with exit status {status}; the others were stopped")
        time.sleep(_POLL_S)


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in reversed(processes):
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _STOP_WAIT_S
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
