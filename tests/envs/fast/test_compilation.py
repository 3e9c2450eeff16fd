"""Compiling once for all processes, and saying so."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numba
import pytest

from sacflow_robot.envs.fast import compilation as under_test
from sacflow_robot.envs.fast.compilation import compiling, is_cached
from sacflow_robot.envs.fast.jit import share_changes

SLOW = """
import sys, time, pathlib
import numba
from sacflow_robot.envs.fast.compilation import compiling

@numba.njit(cache=True)
def slow(x):
    {body}
    return x

print("ready", flush=True)
sys.stdin.readline()
with compiling(slow):
    slow(1.0)
print(sum(slow.stats.cache_misses.values()))
"""


def test_two_processes_that_start_at_once_compile_a_function_once(tmp_path: Path) -> None:
    body = "\n    ".join(f"x = x * {i}.5 if x > {i} else x + {i}" for i in range(150))
    (tmp_path / "module.py").write_text(SLOW.format(body=body))
    environment = {**os.environ, "SACFLOW_ROBOT_CACHE": str(tmp_path / "cache"), "NUMBA_CACHE_DIR": str(tmp_path)}
    started = [
        subprocess.Popen(
            [sys.executable, tmp_path / "module.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    for process in started:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert sorted(process.communicate(timeout=120)[0].strip() for process in started) == ["0", "1"]


def test_compilation_is_announced_when_it_takes_a_while(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SACFLOW_ROBOT_CACHE", str(tmp_path))

    @numba.njit
    def function() -> int:
        return 1

    with compiling(function):
        pass
    assert not caplog.records
    monkeypatch.setattr(under_test, "_ANNOUNCED_AFTER_S", 0.0)
    with compiling(function):
        deadline = time.monotonic() + 60
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
    (record,) = caplog.records
    assert "compiling the simulator's control step" in record.getMessage() and record.levelno == logging.WARNING
    assert "cannot be kept" in record.getMessage() and not is_cached(function)


def test_a_function_that_is_compiled_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    @numba.njit
    def function() -> int:
        return 1

    function()
    monkeypatch.setattr(under_test, "_wait_for_others", None)
    with compiling(function):
        assert function() == 1
    with compiling(len):  # robosuite's own switch for Numba is off
        pass


def test_files_of_kernels_change_together(tmp_path: Path) -> None:
    """Numba looks only at the file of the function that is called from Python."""
    files = [tmp_path / name for name in ("a.py", "b.py")]
    for i, file in enumerate(files):
        file.touch()
        os.utime(file, (1000 + i, 1000 + i))
    share_changes(files)
    assert [file.stat().st_mtime for file in files] == [1001, 1001]
    share_changes([tmp_path / "missing.py", *files])
