"""Measure the episode log inside the control loop, at the loop's pace, with the log writer writing to the disk meanwhile."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sacflow_robot.data.log.episode_writer import write_log
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.data.log.recorder import StepRecorder
from sacflow_robot.data.log.ring import Layout
from sacflow_robot.episode import Episode, EpisodeBuilder, Step, StepResult
from sacflow_robot.robot.control.run_config import RunConfig
from sacflow_robot.robot.control.session import run_episode
from sacflow_robot.robot.drivers.clock import MonotonicClock
from sacflow_robot.spec import ArraySpec, FloatArray, Observation, PolicySpec, RobotSpec

RATES_HZ = 20, 100, 1000
_ACTIONS, _WARM_UP = 7, 20
PAYLOADS = {
    "64 floats": (ArraySpec("floats", (64,), "m"),),
    "two 128x128 images": tuple(ArraySpec(f"camera{i}", (128, 128, 3), "", dtype="uint8") for i in range(2)),
}


def bench_log(seconds: float, least_steps: int, folder: Path | None = None) -> dict[str, Any]:
    """Measure every rate with every payload, then the opening of a log of 10 000 episodes.

    Raises:
        LogWriteError: The disk is full or too slow for one of the rates.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch)
        rows = [
            _measure(path / f"{hz}-{name[:2]}.zarr", hz, name, max(least_steps, round(seconds * hz)))
            for name in PAYLOADS
            for hz in RATES_HZ
        ]
        opening = _measure_opening(path / "10k.zarr")
    return {"rows": rows, "open_10k_episodes_s": opening}


def _robot(hz: int, payload: str) -> RobotSpec:
    names = tuple(f"a{i}" for i in range(_ACTIONS))
    bounds = (-1.0,) * _ACTIONS, (1.0,) * _ACTIONS
    return RobotSpec("bench", "bench", "none", float(hz), PAYLOADS[payload], names, ("1",) * _ACTIONS, *bounds)


def _observations(robot: RobotSpec) -> list[dict[str, Any]]:
    """A few observations to take turns; noise, so that nothing can be compressed away."""
    rng = np.random.default_rng(0)
    return [
        {
            a.key: rng.integers(0, 256, a.shape, np.uint8)
            if a.dtype == "uint8"
            else rng.standard_normal(a.shape).astype(np.float32)
            for a in robot.observations
        }
        for _ in range(16)
    ]


class _PacedRobot:
    """A robot that moves at its own pace: a command returns at the next tick, with what was seen just then."""

    lockstep, clock = True, MonotonicClock()

    def __init__(self, spec: RobotSpec, steps: int) -> None:
        self.spec, self._steps, self._seen = spec, steps, _observations(spec)

    def begin(self, seed: int) -> StepResult:
        self._count, self._due = 0, time.perf_counter()
        return StepResult(self._look())

    def command(self, action: FloatArray, valid_until_ns: int) -> None:
        self._count += 1
        self._due += 1 / self.spec.control_rate_hz
        time.sleep(max(0.0, self._due - time.perf_counter()))

    def observe(self) -> StepResult:
        return StepResult(self._look(), truncated=self._count == self._steps)

    def connect(self) -> None:
        pass

    hold = stop = connect

    def close(self) -> None:
        pass

    def _look(self) -> dict[str, Any]:
        return {key: array.copy() for key, array in self._seen[self._count % len(self._seen)].items()}


class _Still:
    """A policy that keeps the robot where it is."""

    def __init__(self, robot: RobotSpec) -> None:
        size = robot.observation_dim
        self.spec = PolicySpec(robot, 1, 1, "none", (0.0,) * size, (1.0,) * size)

    def infer(self, observation: Observation, noise: FloatArray) -> FloatArray:
        return np.zeros_like(noise)


class _Timed:
    """A recorder that notes what each append took (ns)."""

    def __init__(self, log: StepRecorder) -> None:
        self.begin, self.end, self._append = log.begin, log.end, log.append
        self.times: list[int] = []

    def append(self, step: Step) -> None:
        began = time.perf_counter_ns()
        self._append(step)
        self.times.append(time.perf_counter_ns() - began)


def _measure(path: Path, hz: int, payload: str, steps: int) -> dict[str, Any]:
    """One episode through the control loop itself, so that append is met as it finds it: after a pause, in its place."""
    robot = _robot(hz, payload)
    with StepRecorder(path, robot) as log:
        timed = _Timed(log)
        run_episode(
            _PacedRobot(robot, steps + _WARM_UP), _Still(robot), 0, RunConfig(policy_version="none", recorder=timed)
        )
    p50, p99, longest = (float(v) for v in np.percentile(np.array(timed.times[_WARM_UP:]) / 1e3, [50, 99, 100]))
    stored = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    return {
        "hz": hz,
        "payload": payload,
        "steps": steps,
        "append_p50_us": round(p50, 1),
        "append_p99_us": round(p99, 1),
        "append_max_us": round(longest, 1),
        "bytes_per_step": round(stored / len(timed.times)),
        "record_bytes": Layout(robot, 0).bytes,
    }


def _measure_opening(path: Path) -> float:
    """Seconds to open a log of 10 000 episodes and read its first and last one."""
    robot = _robot(20, "64 floats")
    observations = _observations(robot)

    def episodes() -> Iterator[Episode]:
        builder = EpisodeBuilder(StepResult(observations[0]), period_ns=robot.period_ns)
        for i in range(20):
            builder.add(StepResult(observations[i % 16], terminated=i == 19), np.zeros(_ACTIONS, np.float32))
        episode = builder.build()
        for _ in range(10_000):
            yield episode

    write_log(path, robot, episodes())
    began = time.perf_counter()
    log = EpisodeLog.open(path)
    log.read(0)
    log.read(-1)
    return round(time.perf_counter() - began, 4)
