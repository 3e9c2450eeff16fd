"""Step by step into a log: nothing acknowledged is lost, whatever is killed when."""

import contextlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest

from sacflow_robot.data.log import log_writer as keeper
from sacflow_robot.data.log import store
from sacflow_robot.data.log.episode_writer import EpisodeWriter
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.data.log.recorder import StepRecorder, start_writer
from sacflow_robot.data.log.repair import repair, verify
from sacflow_robot.data.log.resilient_recorder import ResilientRecorder
from sacflow_robot.data.log.ring import HEADER
from sacflow_robot.episode import Episode, Source, Step, StepFlag, StepResult
from sacflow_robot.errors import DataError, LogWriteError, UsageError
from sacflow_robot.spec import ArraySpec, RobotSpec

ROBOT = RobotSpec(
    *("Panda", "lift", "OSC_POSE delta", 100.0),
    observations=(ArraySpec("pos", (3,), "m"), ArraySpec("image", (64, 64, 3), "", dtype="uint8")),
    action_names=("x", "y"),
    action_units=("m", "m"),
    action_low=(-1, -1),
    action_high=(1, 1),
)
LONG = np.random.default_rng(0).bytes(2000).hex()  # an info that does not fit, deflated or not
ONE = np.ones(2, np.float32)
EPISODES, STEPS = 3, 12
OPERATIONS = EPISODES * (STEPS + 2) + 2  # opening, per episode begin, steps and end, closing
KILLS = int(os.environ.get("SACFLOW_KILLS", "20"))


def observation(episode: int, step: int) -> dict[str, Any]:
    return {
        "pos": np.array([episode, step, 0], np.float32),
        "image": np.full((64, 64, 3), 7 * step + episode, np.uint8),
    }


def result(episode: int, step: int, last: bool = False) -> StepResult:
    return StepResult(observation(episode, step), float(last), last, state=np.array([episode, step], np.float64))


def write_episodes(log: StepRecorder, done: Callable[[], None]) -> None:
    for episode in range(EPISODES):
        log.begin(result(episode, 0), 1000, {"seed": episode})
        done()
        for step in range(1, STEPS + 1):
            commanded = np.array([episode, step], np.float32) / 20
            human = commanded / 2 if step > 1 else None
            log.append(
                Step(
                    result(episode, step, step == STEPS),
                    commanded,
                    1000 + step,
                    sent_ns=step,
                    intervention_action=human,
                )
            )
            done()
        log.end({"note": "whole"})
        done()


def assert_are_the_written(episodes: list[Episode], at_least: int) -> None:
    """The first of the written episodes and nothing else, ``at_least`` steps of them."""
    assert sum(map(len, episodes)) >= at_least
    for index, episode in enumerate(episodes):
        count = len(episode)
        assert count == STEPS or (index == len(episodes) - 1 and count < STEPS)
        steps = np.arange(count + 1)
        assert np.array_equal(episode.observations["pos"][:, :2], np.stack([np.full(count + 1, index), steps], 1))
        assert (episode.observations["image"] == (7 * steps + index)[:, None, None, None]).all()
        assert np.array_equal(episode.states, np.stack([np.full(count + 1, index), steps], 1))
        assert np.allclose(episode.action * 20, np.stack([np.full(count, index), steps[1:]], 1))
        if episode.intervention_action is not None:
            assert np.isnan(episode.intervention_action[0]).all()
            assert np.array_equal(episode.intervention_action[1:], episode.action[1:] / 2)
        assert np.array_equal(episode.sent_ns, steps[1:]) and np.array_equal(episode.time_ns, 1000 + steps)
        assert episode.terminated[-1] == (count == STEPS) and episode.truncated[-1] == (count < STEPS)
        whole = {"seed": index, "success": True, "note": "whole"}
        cut = {"seed": index, "success": False, "interrupted": True}
        assert dict(episode.info) in ([whole, cut] if count == STEPS else [cut])


def foreign_lengths(log: Path) -> dict[str, int]:
    """Lengths of all arrays as a reader sees them that knows Zarr format 2 and nothing of this program."""
    files = (f for f in log.glob("*/*/.zarray") if f.exists())
    return {f"{f.parts[-3]}/{f.parts[-2]}": json.loads(f.read_text())["shape"][0] for f in files}


def assert_readable_by_diffusion_policys_rule(log: Path) -> int:
    """All lengths equal the last end, and what they cover can be decoded; returns that end."""
    lengths = foreign_lengths(log)
    count, end = lengths["meta/episode_ends"], 0
    if count:
        chunk = numcodecs.Zstd().decode((log / "meta" / "episode_ends" / "0").read_bytes())
        end = int(np.frombuffer(chunk, np.int64)[count - 1])
    for name, length in lengths.items():
        assert length == (end if name.startswith("data/") else count), (name, lengths, end)
        description = json.loads((log / name / ".zarray").read_text())
        for i in range(-(-length // description["chunks"][0])):
            file = ".".join([str(i), *["0"] * (len(description["chunks"]) - 1)])
            numcodecs.Zstd().decode((log / name / file).read_bytes())
    return end


class Forked:
    """A keeper as a fork of this process, which spares importing everything again."""

    def __init__(self, log: Path, token: str) -> None:
        parent, (seen, held) = os.getpid(), os.pipe()
        self.pid, self._status = os.fork(), None
        if self.pid == 0:
            os.closerange(3, 256)
            os._exit(keeper.main(log, token, parent))
        os.close(held)
        os.read(
            seen, 1
        )  # until it has let go of the log's lock, which a keeper that is a program of its own never holds
        os.close(seen)

    def poll(self) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired("keeper", timeout or 0)
            time.sleep(0.001)
        return self._status


class Progress:
    """Counts of the writing process, in memory that outlives it: operations returned, and its keeper's process."""

    def __init__(self) -> None:
        self._words = memoryview(mmap.mmap(-1, 4096)).cast("Q")

    done = property(lambda self: self._words[0], lambda self, n: self._words.__setitem__(0, n))
    keeper = property(lambda self: self._words[1], lambda self, n: self._words.__setitem__(1, n))


def write_in_fork(path: Path, progress: Progress, pause_s: float) -> int:
    pid = os.fork()
    if pid:
        return pid

    def start(log: Path, token: str) -> Forked:
        process = Forked(log, token)
        progress.keeper = process.pid
        return process

    def done() -> None:
        progress.done += 1
        time.sleep(pause_s)

    try:
        with StepRecorder(path, ROBOT, start) as log:
            done()
            write_episodes(log, done)
        done()
    finally:
        os._exit(0)


def send(pid: int, how: signal.Signals) -> None:
    """Kill or stop a process, and wait until that has happened."""
    with contextlib.suppress(OSError):
        os.kill(pid, how)
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZTX":
            time.sleep(0)


def steps_acknowledged(operations: int) -> int:
    whole, rest = divmod(max(operations - 1, 0), STEPS + 2)
    return min(whole, EPISODES) * STEPS + (min(max(rest - 1, 0), STEPS) if whole < EPISODES else 0)


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


def test_readers_read_while_it_is_written(tmp_path: Path) -> None:
    path, seen = tmp_path / "log.zarr", []
    with StepRecorder(path, ROBOT, Forked) as log:

        def look() -> None:
            time.sleep(0.02)
            reader = EpisodeLog.open(path)
            assert_are_the_written(list(reader.episodes()), 0)
            seen.append(len(reader))

        write_episodes(log, look)
        with pytest.raises(LogWriteError, match="being written by another process"):
            StepRecorder(path, ROBOT)
    assert seen == sorted(seen) and 1 in seen
    assert len(EpisodeLog.open(path)) == EPISODES
    assert sorted(p.name for p in path.iterdir()) == [".zattrs", ".zgroup", "data", "meta"]
    assert not any(p.is_symlink() for p in path.rglob("*"))


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


def test_the_loop_is_told_when_the_keeper_is_dead_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "log.zarr"
    processes: list[Forked] = []

    def start(log: Path, token: str) -> Forked:
        processes.append(Forked(log, token))
        return processes[-1]

    log = StepRecorder(path, ROBOT, start)
    log.begin(result(0, 0), 1000, {"seed": 0})
    send(processes[0].pid, signal.SIGKILL)
    with pytest.raises(LogWriteError, match="the process that writes the log has died"):
        for step in range(1, STEPS):
            log.append(Step(result(0, step), np.array([0, step], np.float32) / 20, 1000 + step, sent_ns=step))
            time.sleep(0.2)
    log.close()
    (episode,) = EpisodeLog.open(path).episodes()
    assert_are_the_written([episode], step - 1)


def test_the_loop_is_told_when_the_disk_is_full_and_nothing_is_lost(tmp_path: Path) -> None:
    """The keeper may write files of 100 kB at most: the journal of the second episode does not fit."""
    path = tmp_path / "log.zarr"

    class Poor(Forked):
        def __init__(self, log: Path, token: str) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
            super().__init__(log, token)
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    log = StepRecorder(path, ROBOT, Poor)
    taken = 0
    with pytest.raises(LogWriteError, match=r"step not logged: .*File too large"):
        log.begin(result(0, 0), 1000, {"seed": 0})
        for step in range(1, STEPS):
            log.append(Step(result(0, step), np.array([0, step], np.float32) / 20, 1000 + step, sent_ns=step))
            taken = step
            time.sleep(0.05)
    assert EpisodeLog.open(path).steps == 0
    log.close()  # this process may write, and does what the keeper could not
    (episode,) = EpisodeLog.open(path).episodes()
    assert_are_the_written([episode], taken)


def test_what_does_not_fit_is_refused_and_not_kept(tmp_path: Path) -> None:
    path, zeros = tmp_path / "log.zarr", np.zeros(2, np.float32)
    with StepRecorder(path, ROBOT, Forked) as log:
        with pytest.raises(UsageError, match="begin one first"):
            log.append(Step(result(0, 1), zeros, 1))
        with pytest.raises(DataError, match="shorten it"):
            log.begin(result(0, 0), 0, {"note": LONG})
        log.begin(result(0, 0), 0, {})
        with pytest.raises(UsageError, match="in progress"):
            log.begin(result(0, 0), 0, {})
        with pytest.raises(DataError, match="NaN or infinity"):
            log.append(Step(result(0, 1), np.array([np.nan, 0], np.float32), 1))
        blind = result(0, 1)
        blind.observation["pos"][2] = np.inf
        with pytest.raises(DataError, match="NaN or infinity"):
            log.append(Step(blind, zeros, 1))
        with pytest.raises(DataError, match="pos has shape"):
            log.append(Step(StepResult({**observation(0, 1), "pos": zeros}, state=np.zeros(2)), zeros, 1))
        with pytest.raises(DataError, match="state is missing"):
            log.append(Step(StepResult(observation(0, 1)), zeros, 1))
        huge = result(0, 1)
        huge.observation["pos"][2] = 3e38
        log.append(Step(huge, zeros, 1, flags=StepFlag.LATE | StepFlag.CLIPPED, source=Source.HUMAN))
        log.end({})
    (episode,) = EpisodeLog.open(path).episodes()
    assert episode.flags.tolist() == [3] and episode.source.tolist() == [Source.HUMAN]
    assert episode.received_ns is None and episode.observations["pos"][1, 2] == np.float32(3e38)
    assert np.isnan(episode.measured).all() and episode.truncated[-1]
    with StepRecorder(path, ROBOT, Forked) as log, pytest.raises(DataError, match="in state"):
        log.begin(StepResult(observation(0, 0)), 0, {})


def test_arrays_of_another_layout_or_type_are_kept_as_what_the_log_declares(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with StepRecorder(tmp_path / "log.zarr", ROBOT, Forked) as log:
        log.begin(result(0, 0), 0, {})
        flipped = StepResult({"pos": np.arange(3), "image": image[::-1]}, state=np.array([1, 2]))
        log.append(Step(flipped, np.array([0.5, -0.5]), 1))
        log.append(Step(StepResult({**observation(0, 0), "image": image.transpose(1, 0, 2)}, state=np.ones(2)), ONE, 2))
        log.end({})
    (episode,) = EpisodeLog.open(tmp_path / "log.zarr").episodes()
    assert np.array_equal(episode.observations["image"][1], image[::-1])
    assert np.array_equal(episode.observations["image"][2], image.transpose(1, 0, 2))
    assert episode.observations["pos"][1].tolist() == [0, 1, 2] and episode.action.tolist() == [[0.5, -0.5], [1, 1]]


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


class Slow:
    """A keeper that does not finish in time."""

    def __init__(self, log: Path, token: str) -> None:
        self.process = start_writer(log, token)

    def poll(self) -> int | None:
        return self.process.poll()

    def wait(self, timeout: float | None = None) -> int:
        raise subprocess.TimeoutExpired("keeper", timeout or 0)


@pytest.mark.parametrize("before", [0, 1], ids=["a new log", "a log with episodes"])
def test_closing_before_the_keeper_has_finished_takes_nothing_from_it(tmp_path: Path, before: int) -> None:
    path, keepers = tmp_path / "log.zarr", []
    for _ in range(before):
        with StepRecorder(path, ROBOT) as log:
            write_episodes(log, lambda: None)

    def slow(log: Path, token: str) -> Slow:
        keepers.append(Slow(log, token))
        return keepers[-1]

    log = StepRecorder(path, ROBOT, slow)
    write_episodes(log, lambda: None)
    with pytest.raises(LogWriteError, match="still being written; what was logged is kept"):
        log.close()
    keepers[0].process.wait(60)
    episodes = list(EpisodeLog.open(path).episodes())
    assert len(episodes) == EPISODES * (1 + before)
    assert all(episode.intervention_action is not None for episode in episodes)


@pytest.mark.parametrize("recorder", [StepRecorder, ResilientRecorder])
def test_whoever_is_interrupted_leaves_a_slow_keeper_to_finish_alone(
    tmp_path: Path, recorder: type[StepRecorder] | type[ResilientRecorder]
) -> None:
    keepers: list[Forked] = []

    def start(log: Path, token: str) -> Forked:
        keepers.append(Forked(log, token))
        return keepers[0]

    with pytest.raises(KeyboardInterrupt), recorder(tmp_path / "log.zarr", ROBOT, start) as log:
        log.begin(result(0, 0), 0, {})
        os.kill(keepers[0].pid, signal.SIGSTOP)  # a disk that hangs; it would be waited for two minutes
        log.append(Step(result(0, 1), ONE, 1))
        raise KeyboardInterrupt
    os.kill(keepers[0].pid, signal.SIGCONT)
    keepers[0].wait(60)
    (episode,) = EpisodeLog.open(tmp_path / "log.zarr").episodes()
    assert len(episode) == 1 and episode.info["interrupted"]


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


def test_success_is_what_the_arm_reports(tmp_path: Path) -> None:
    path = tmp_path / "log.zarr"
    with StepRecorder(path, ROBOT, Forked) as log:
        for success in (True, False):
            log.begin(result(0, 0), 1000, {})
            fallen = replace(result(0, 1, last=True), success=success)
            log.append(Step(fallen, np.zeros(2, np.float32), 1001))
            log.end({})
    assert [e.success for e in EpisodeLog.open(path).episodes()] == [True, False]


def test_an_info_that_is_too_long_interrupts_its_episode_only(tmp_path: Path) -> None:
    path = tmp_path / "log.zarr"
    with StepRecorder(path, ROBOT, Forked) as log:
        for info in ({"note": LONG}, {"note": "short"}):
            log.begin(result(0, 0), 1000, {})
            log.append(Step(result(0, 1), np.zeros(2, np.float32), 1001))
            with contextlib.suppress(DataError):
                log.end(info)
    assert [e.info.get("interrupted", False) for e in EpisodeLog.open(path).episodes()] == [True, False]


@pytest.mark.parametrize("patience_s", [0.0, 60.0])
def test_a_disk_that_is_behind_stops_an_arm_that_moves_on_and_holds_up_one_that_waits(
    tmp_path: Path, patience_s: float
) -> None:
    keepers: list[Forked] = []

    def start(log: Path, token: str) -> Forked:
        keepers.append(Forked(log, token))
        return keepers[0]

    taken = 0
    with StepRecorder(tmp_path / "log.zarr", ROBOT, start, patience_s=patience_s) as log:
        log.begin(result(0, 0), 0, {})
        send(keepers[0].pid, signal.SIGSTOP)
        wakes = threading.Timer(0.3, os.kill, (keepers[0].pid, signal.SIGCONT))
        if patience_s:
            wakes.start()
        try:
            for taken in range(1500):
                log.append(Step(result(0, 1), ONE, taken))
        except LogWriteError as error:
            assert patience_s == 0 and "steps behind; log to a faster one" in str(error)
            os.kill(keepers[0].pid, signal.SIGCONT)
            while not log._ring.drained:
                time.sleep(0.001)
        else:
            assert patience_s > 0
            taken += 1
        log.end({})
    (episode,) = EpisodeLog.open(tmp_path / "log.zarr").episodes()
    assert len(episode) == taken and (taken == 1500) == (patience_s > 0)
