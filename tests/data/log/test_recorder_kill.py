"""Nothing acknowledged is lost, whatever is killed when."""

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sacflow_robot.data.log import store
from sacflow_robot.data.log.episode_writer import EpisodeWriter
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.data.log.recorder import StepRecorder
from sacflow_robot.data.log.repair import repair, verify
from sacflow_robot.data.log.ring import HEADER
from sacflow_robot.episode import Step
from sacflow_robot.errors import DataError, LogWriteError
from tests.data.log.forked_writer import (
    OPERATIONS,
    ROBOT,
    STEPS,
    Forked,
    Progress,
    assert_are_the_written,
    assert_readable_by_diffusion_policys_rule,
    result,
    send,
    steps_acknowledged,
    write_episodes,
    write_in_fork,
)

KILLS = int(os.environ.get("SACFLOW_KILLS", "20"))


@pytest.mark.parametrize("kills", [KILLS, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_instants_nothing_acknowledged_is_lost(tmp_path: Path, kills: int) -> None:
    """Instants are spread evenly over all operations; every other time the keeper is killed with the writer."""
    rng, phases = random.Random(4), set()
    for trial in range(kills):
        path, progress = tmp_path / f"{trial}.zarr", Progress()
        target, pause = trial * (OPERATIONS - 1) // (kills - 1), rng.choice([0, 0, 0.001, 0.004])
        pid = write_in_fork(path, progress, pause)
        while progress.done < target:
            time.sleep(0)
        time.sleep(rng.random() * rng.choice([0.0002, 0.002, 0.02]))
        both = trial % 2 == 0
        os.kill(pid, signal.SIGKILL)
        acknowledged = progress.done
        if progress.keeper:
            send(progress.keeper, signal.SIGKILL if both else signal.SIGSTOP)
        os.waitpid(pid, 0)
        phases.add("opening" if acknowledged == 0 else "closing" if acknowledged >= OPERATIONS - 1 else "steps")
        if path.exists():
            assert_readable_by_diffusion_policys_rule(path)
        if progress.keeper and not both:
            with contextlib.suppress(ProcessLookupError):
                os.kill(progress.keeper, signal.SIGCONT)
        if not path.exists():
            assert acknowledged == 0
            continue
        assert_are_the_written(list(EpisodeLog.open(path).episodes()), steps_acknowledged(acknowledged))
        assert_readable_by_diffusion_policys_rule(path)
        assert not (path / store.WRITING).exists()
        shutil.rmtree(path)
    assert phases == {"opening", "steps", "closing"}


@pytest.mark.parametrize("every", [11, pytest.param(3, marks=pytest.mark.slow)])
def test_each_file_operation_of_a_commit_may_be_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """A process that ends before its nth operation on files, for some n: what is there is one commit or the next."""
    made, ends = tmp_path / "made.zarr", set()
    with StepRecorder(made, ROBOT, Forked) as log:
        write_episodes(log, lambda: None)
    for n in range(0, 10_000, every):
        path = tmp_path / f"{n}.zarr"
        shutil.copytree(made, path)
        pid = os.fork()
        if pid == 0:
            left = iter(range(n))

            def counted(real: Callable[..., Any]) -> Callable[..., Any]:
                def call(*args: Any, **options: Any) -> Any:
                    if next(left, None) is None:  # noqa: B023
                        os._exit(9)
                    return real(*args, **options)

                return call

            for module, name in (
                (os, "rename"),
                (os, "replace"),
                (os, "symlink"),
                (os, "unlink"),
                (os, "mkdir"),
                (os, "rmdir"),
                (os, "fdatasync"),
            ):
                monkeypatch.setattr(module, name, counted(getattr(module, name)))
            log = EpisodeWriter(path, ROBOT)
            log.append(log.read(0))
            log.truncate(2)
            log.close()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, 9)
        ends.add(assert_readable_by_diffusion_policys_rule(path))
        episodes = list(EpisodeLog.open(path).episodes())
        assert len(episodes) in (2, 3, 4) and all(len(e) == STEPS for e in episodes)
        assert not (path / store.WRITING).exists()
        shutil.rmtree(path)
        if status == 0:
            break
    assert n > 50 and ends == {2 * STEPS, 3 * STEPS, 4 * STEPS}


def test_the_real_keeper_of_a_killed_writer_finishes_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log.zarr"
    pid = os.fork()
    if pid == 0:
        log = StepRecorder(path, ROBOT)
        log.begin(result(0, 0), 1000, {"seed": 0})
        for step in range(1, 6):
            log.append(Step(result(0, step), np.array([0, step], np.float32) / 20, 1000 + step, sent_ns=step))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    (episode,) = EpisodeLog.open(path).episodes()
    assert_are_the_written([episode], 5)


def published_in(ring: Path) -> int:
    return int(np.fromfile(ring, HEADER, 1)["published"][0])


def drained_from(ring: Path) -> int:
    return int(np.fromfile(ring, HEADER, 1)["drained"][0])


def test_a_power_cut_costs_only_what_was_not_yet_flushed(tmp_path: Path) -> None:
    """As a power cut leaves it: no process, no shared memory, and a journal whose last block is garbage."""
    path, progress = tmp_path / "log.zarr", Progress()
    pid = write_in_fork(path, progress, 0.01)
    while progress.done < 2 + STEPS + 2 + 8:
        time.sleep(0.001)
    os.kill(pid, signal.SIGSTOP)
    ring = Path(json.loads((path / store.WRITING / "session").read_text())["ring"])
    while drained_from(ring) < published_in(ring):
        time.sleep(0.001)
    for process in (progress.keeper, pid):
        send(process, signal.SIGKILL)
    os.waitpid(pid, 0)
    ring.unlink()
    (journal,) = (path / store.WRITING).glob("journal.*")
    with journal.open("r+b") as file:
        file.seek(-5000, os.SEEK_END)
        file.write(bytes(9000))
    first, cut = EpisodeLog.open(path).episodes()
    assert_are_the_written([first, cut], STEPS + 6)
    assert cut.info["interrupted"]


def test_what_killed_writers_left_is_repaired_without_touching_it(tmp_path: Path) -> None:
    path, out, progress = tmp_path / "log.zarr", tmp_path / "out.zarr", Progress()
    pid = write_in_fork(path, progress, 0.002)
    while progress.done < 1 + STEPS + 2 + 6:
        time.sleep(0.001)
    send(pid, signal.SIGSTOP)
    for process in (progress.keeper, pid):
        send(process, signal.SIGKILL)
    os.waitpid(pid, 0)
    acknowledged = steps_acknowledged(progress.done)

    def content() -> dict[str, bytes]:
        return {str(f): f.read_bytes() for f in path.rglob("*") if f.is_file()}

    before = content()
    (problem,) = verify(path)
    assert problem.where == store.WRITING and "steps wait in its journal" in problem.what
    saved, lost = repair(path, out)
    assert saved in (2, 3) and not lost
    assert_are_the_written(list(EpisodeLog.open(out).episodes()), acknowledged)
    assert verify(out) == [] and content() == before
    assert_are_the_written(list(EpisodeLog.open(path).episodes()), acknowledged)


def test_a_journal_without_its_session_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "log.zarr"
    with StepRecorder(path, ROBOT) as log:
        write_episodes(log, lambda: None)
    journal = path / store.WRITING / "journal.5"
    journal.parent.mkdir()
    journal.write_bytes(b"steps")
    with pytest.raises(DataError, match="has a journal and has lost the session"):
        EpisodeWriter(path, ROBOT)
    assert journal.read_bytes() == b"steps"


def test_a_kill_while_the_leftovers_are_removed_repeats_no_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.zarr"
    remove = shutil.rmtree

    def removes_the_commit_and_dies(folder: Path, *args: Any, **kwargs: Any) -> None:
        if Path(folder).name == store.WRITING:
            (Path(folder) / "commit").unlink()
            raise OSError("killed")
        remove(folder, *args, **kwargs)

    recorder = StepRecorder(path, ROBOT, Forked)
    recorder.begin(result(0, 0), 1000, {"seed": 0})
    recorder.append(Step(result(0, 1), np.zeros(2, np.float32), 1001))
    os.kill(recorder._writer.pid, signal.SIGKILL)  # type: ignore[union-attr]
    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "rmtree", removes_the_commit_and_dies)
        with contextlib.suppress(LogWriteError):
            recorder.close()
    assert [len(e) for e in EpisodeLog.open(path).episodes()] == [1]
