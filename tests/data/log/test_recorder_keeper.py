"""A keeper that is dead, slow or without room: what the loop is told, and that nothing is lost."""

import os
import resource
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.data.log.recorder import StepRecorder, start_writer
from sacflow_robot.data.log.resilient_recorder import ResilientRecorder
from sacflow_robot.episode import Step
from sacflow_robot.errors import LogWriteError
from tests.data.log.forked_writer import (
    EPISODES,
    ONE,
    ROBOT,
    STEPS,
    Forked,
    assert_are_the_written,
    result,
    send,
    write_episodes,
)


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
