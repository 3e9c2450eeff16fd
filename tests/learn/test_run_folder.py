"""A run has one writer: the process that makes it, or goes on with it."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sacflow_robot.cli import main
from sacflow_robot.errors import DataError, UsageError
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.run_folder import RunFolder

CONFIG = TrainConfig()


@contextlib.contextmanager
def other_process(work: Callable[[], object]) -> Iterator[int]:
    """A process that has done the work and lives on; killed at the end."""
    seen, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(done, b"1")
            signal.pause()
        finally:
            os._exit(1)
    os.close(done)
    assert os.read(seen, 1) == b"1"
    os.close(seen)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_run_that_another_process_goes_on_with_is_refused_until_that_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = tmp_path / "run", tmp_path / "other name"
    with other_process(lambda: RunFolder.create(run, CONFIG)):  # which the process then trains
        other.symlink_to(run)
        for path in (run, other):
            before = (run / "config.yaml").stat().st_mtime_ns
            with pytest.raises(DataError, match=r"another process is training in .*; wait for it to end, or stop it"):
                RunFolder.open(path)[0].claim()
            for command in (["train", "--resume", str(path)], ["follow", str(path), "--log", str(tmp_path / "a.zarr")]):
                assert main(command) == 1
                (line,) = capsys.readouterr().err.splitlines()
                assert "another process is training in" in line
            assert (run / "config.yaml").stat().st_mtime_ns == before
    RunFolder.open(run)[0].claim()  # after kill -9
    RunFolder.open(other)[0].claim()  # a process may claim what it holds
    with other_process(lambda: None), pytest.raises(UsageError, match="exists already"):
        RunFolder.create(run, CONFIG)


def test_two_that_make_one_run_at_the_same_instant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, looked = tmp_path / "run", []
    check = RunFolder.check_free

    def look(path: Path | None) -> None:
        """Another process makes the run right after this one has found the path free."""
        check(path)
        looked.append(path)
        if len(looked) == 1:
            stack.enter_context(other_process(lambda: RunFolder.create(run, CONFIG)))

    with contextlib.ExitStack() as stack:
        monkeypatch.setattr(RunFolder, "check_free", look)
        with pytest.raises(DataError, match="another process is training in"):
            RunFolder.create(run, CONFIG)
    with pytest.raises(UsageError, match="exists already"):
        RunFolder.create(run, CONFIG)


def test_a_folder_that_a_killed_process_left_empty_is_free(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with other_process(RunFolder(run, "lift").claim):
        RunFolder.check_free(run)
        with pytest.raises(DataError, match="another process"):
            RunFolder.create(run, CONFIG)
    assert RunFolder.create(run, CONFIG).config.exists()


def test_two_that_copy_a_run_to_one_path(tmp_path: Path) -> None:
    run, out = RunFolder.create(tmp_path / "run", CONFIG), tmp_path / "out"
    left = tmp_path / ".out.partial" / "left"
    left.mkdir(parents=True)  # by a process that was killed

    def copy() -> None:
        stack.enter_context(run.copied(out))

    with contextlib.ExitStack() as stack, other_process(copy):
        with pytest.raises(DataError, match="another process"), run.copied(out):
            pass
        assert (tmp_path / ".out.partial" / "config.yaml").exists(), "the other's is as it was"
    with run.copied(out) as copied:
        assert not left.exists() and copied.config.exists()
    assert RunFolder.open(out)[1] == CONFIG
    RunFolder.open(out)[0].claim()


def test_claims_of_removed_runs_are_let_go(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for i in range(5):
        run = RunFolder.create(tmp_path / str(i), CONFIG)
        for file in run.path.iterdir():
            file.unlink()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1
