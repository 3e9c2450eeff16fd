"""Simulated robots in threads of one process, under the compiled control step."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from types import TracebackType

import mujoco
import numpy as np

from sacflow_robot.envs.fast.fast_robot import CompiledTask, FastRobot
from sacflow_robot.envs.fast.self_check import checked_task
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.state import State
from sacflow_robot.envs.vector_env import core_count
from sacflow_robot.episode import StepResult
from sacflow_robot.spec import Engine, FloatArray, RobotSpec


class ThreadVectorEnv:
    """``VectorEnv`` in this process: the compiled step needs no interpreter, so that threads use all cores.

    Args:
        task: Name of the task.
        count: Number of robots.
        background: Whether they move while the caller does something else; else in ``receive``, in the caller's thread.

    Raises:
        UnknownNameError: No such task.
        NotCoveredError: The compiled step does not cover it.
    """

    def __init__(self, task: str, count: int, *, background: bool = True) -> None:
        self._maker = _maker(task)
        self._envs = [self._maker.make_robot() for _ in range(count)]
        self._threads = ThreadPoolExecutor(max(1, min(core_count(), count)), "arm") if background else None
        self._busy: dict[int, Future[list[StepResult]]] = {}
        self._told: dict[int, FloatArray] = {}

    @property
    def spec(self) -> RobotSpec:
        return self._maker.spec

    @property
    def engine(self) -> Engine:
        return "compiled"

    def __len__(self) -> int:
        return len(self._envs)

    def begin(self, starts: Mapping[int, int]) -> dict[int, StepResult]:
        """Start episodes: robot index to seed."""
        return self.begin_from({index: np.random.default_rng(seed) for index, seed in starts.items()})

    def begin_from(self, rngs: Mapping[int, np.random.Generator]) -> dict[int, StepResult]:
        """Start episodes: robot index to what draws its start."""
        return {index: self._envs[index].begin(self._maker.draw_start(rng)) for index, rng in rngs.items()}

    def send(self, chunks: Mapping[int, FloatArray]) -> None:
        """Have robots execute chunks (H, A) in the background, each stopping early where its episode ends."""
        if self._threads is None:
            self._told = dict(chunks)
            return
        self._busy = {index: self._threads.submit(self._envs[index].execute, chunk) for index, chunk in chunks.items()}

    def receive(self) -> dict[int, list[StepResult]]:
        """Wait for what was sent; per robot one result for each action executed.

        Raises:
            InvalidValueError: An action had the wrong shape, or held NaN or infinity; its robot did not move.
        """
        if self._threads is None:
            told, self._told = self._told, {}
            return {index: self._envs[index].execute(chunk) for index, chunk in told.items()}
        busy, self._busy = self._busy, {}
        failures = [error for job in busy.values() if (error := job.exception()) is not None]
        if failures:
            raise failures[0]
        return {index: job.result() for index, job in busy.items()}

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> ThreadVectorEnv:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class _Robot:
    """One robot and its episode."""

    def __init__(self, task: CompiledTask, maker: RobosuiteEnv, model: mujoco.MjModel) -> None:
        self._spec, self._layout, self._horizon = maker.robot, maker.layout, maker.task.horizon
        self._model, self._data = model, mujoco.MjData(model)
        self._robot = FastRobot(task, model, self._data)
        self._left = 0

    def begin(self, state: State) -> StepResult:
        self._layout.write(state, self._model, self._data)
        self._robot.begin(state)
        self._left = self._horizon
        return StepResult(self._spec.unflatten(self._robot.observe()), state=state)

    def execute(self, chunk: FloatArray) -> list[StepResult]:
        actions = np.array([self._spec.check_action(a) for a in chunk[: self._left]], np.float64)
        flat, states, solved = self._robot.execute(actions)
        self._left -= len(flat)
        results = [
            StepResult(self._spec.unflatten(seen), state=state)
            for seen, state in zip(flat[:-1], states[:-1], strict=True)
        ]
        last = StepResult(
            self._spec.unflatten(flat[-1]),
            float(solved),
            terminated=solved,
            truncated=not solved and self._left == 0,
            state=states[-1],
        )
        return [*results, last]


class _Maker:
    """Builds robots of one task and draws their starts; what robosuite itself is needed for."""

    def __init__(self, task: str) -> None:
        self._env = RobosuiteEnv(task)
        self._task = checked_task(self._env)
        self._lock = threading.Lock()
        self._model: mujoco.MjModel | None = None

    @property
    def spec(self) -> RobotSpec:
        return self._env.robot

    def make_robot(self) -> _Robot:
        """A new robot. The model is shared, except where episodes place bodies in it."""
        with self._lock:
            if self._model is None or self._env.layout.placed:
                self._model = copy.copy(self._task.model)
            return _Robot(self._task, self._env, self._model)

    def draw_start(self, rng: np.random.Generator) -> State:
        """The state (S,) in which robosuite starts an episode."""
        with self._lock:
            return self._env.draw_start(rng)


_maker: Callable[[str], _Maker] = cache(_Maker)
