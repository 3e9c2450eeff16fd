"""Writers and keepers that can be killed, as forks; what they write, and how it is known again."""

import contextlib
import json
import mmap
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np

from sacflow_robot.data.log import log_writer as keeper
from sacflow_robot.data.log.recorder import StepRecorder
from sacflow_robot.episode import Episode, Step, StepResult
from sacflow_robot.spec import ArraySpec, RobotSpec

ROBOT = RobotSpec(
    *("Panda", "lift", "OSC_POSE delta", 100.0),
    observations=(ArraySpec("pos", (3,), "m"), ArraySpec("image", (64, 64, 3), "", dtype="uint8")),
    action_names=("x", "y"),
    action_units=("m", "m"),
    action_low=(-1, -1),
    action_high=(1, 1),
)
ONE = np.ones(2, np.float32)
EPISODES, STEPS = 3, 12
OPERATIONS = EPISODES * (STEPS + 2) + 2  # opening, per episode begin, steps and end, closing


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
