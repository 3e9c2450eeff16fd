"""Simulated robots stepped a chunk at a time: in threads of this process, or in a process each."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from sacflow_robot.envs.environment import SimulatedEnv
from sacflow_robot.envs.randomization import Draws
from sacflow_robot.envs.registry import get_robot, make_environment
from sacflow_robot.envs.tasks import fall_back, usable_engine
from sacflow_robot.envs.wrappers import ActionFilter, HistoryEnv, LimitedEnv
from sacflow_robot.episode import StepResult
from sacflow_robot.errors import SacflowError, UsageError, one_line
from sacflow_robot.spec import Engine, FloatArray, RobotSpec
from sacflow_robot.utils.action_history import robot_with_history
from sacflow_robot.utils.processes import core_count, leave_interrupts_to_parent, starting_workers


def make_vector_env(
    task: str,
    count: int,
    engine: Engine = "compiled",
    *,
    background: bool = True,
    history: int = 0,
    draws: Draws | None = None,
    limiter: Callable[[], ActionFilter] | None = None,
) -> ThreadVectorEnv | SubprocVectorEnv:
    """Simulated robots: in threads of this process under the compiled engine, else in a process each.

    Where the compiled engine does not cover the task, the stock one steps it, and the log has a line that says why.

    Args:
        task: Task, Gymnasium id, or ``MODULE:CLASS``.
        count: Number of robots.
        engine: Code that steps a robosuite task.
        background: False: robots in threads move in ``receive``, in the thread that calls it.
        history: Number of their last actions that they observe too.
        draws: Draws a robot model for each episode.
        limiter: Makes the safety filter of one robot; processes need one that can be pickled.

    Raises:
        UnknownNameError: No such task.
        UsageError: The environment cannot be made, or ``draws`` are given and the compiled engine does not step it.
    """
    get_robot(task)
    if draws is not None or usable_engine(task, engine) == "compiled":
        from sacflow_robot.envs.fast.plan import NotCoveredError

        if history and draws is None:
            # Under this engine robots with a history step as randomized ones do, which notice within a control period that the
            # task is solved: policies with a history were trained so.
            draws = Draws()
        try:
            envs = [_wrapped(_compiled(task, draws), history, limiter) for _ in range(count)]
            return ThreadVectorEnv(envs, background=background)
        except NotCoveredError as error:
            fall_back(task, str(error))
    return SubprocVectorEnv(task, count, history, limiter)


def _compiled(task: str, draws: Draws | None) -> SimulatedEnv:
    from sacflow_robot.envs.compiled_env import CompiledEnv
    from sacflow_robot.envs.randomized_env import RandomizedEnv
    from sacflow_robot.envs.robosuite_env import RobosuiteEnv

    return CompiledEnv(task) if draws is None else RandomizedEnv(RobosuiteEnv(task, engine="compiled"), draws)


def _wrapped(env: SimulatedEnv, history: int, limiter: Callable[[], ActionFilter] | None) -> SimulatedEnv:
    """The history inside the limits: a policy observes the actions that were executed."""
    if history:
        env = HistoryEnv(env, history)
    return env if limiter is None else LimitedEnv(env, limiter())


class ThreadVectorEnv:
    """``VectorEnv`` in this process. The compiled step holds no interpreter lock, so that threads use all cores.

    Args:
        envs: The robots, all of one kind.
        background: True: they move in threads, while the caller does something else; False: in ``receive``, in the
            caller's thread, for robots that are so cheap to step that threads would only slow them.
    """

    def __init__(self, envs: Sequence[SimulatedEnv], *, background: bool = True) -> None:
        self._envs = list(envs)
        self._threads = ThreadPoolExecutor(max(1, min(core_count(), len(envs))), "robot") if background else None
        self._futures: dict[int, Future[list[StepResult]]] = {}
        self._chunks: dict[int, FloatArray] = {}

    @property
    def spec(self) -> RobotSpec:
        return self._envs[0].robot

    @property
    def engine(self) -> Engine:
        return self._envs[0].engine

    def __len__(self) -> int:
        return len(self._envs)

    def begin(self, starts: Mapping[int, int]) -> dict[int, StepResult]:
        """Start episodes: robot index to seed."""
        return {i: self._envs[i].begin(seed) for i, seed in starts.items()}

    def send(self, chunks: Mapping[int, FloatArray]) -> None:
        """Have robots execute chunks (H, A), each stopping early where its episode ends."""
        if self._threads is None:
            self._chunks = dict(chunks)
            return
        self._futures = {i: self._threads.submit(self._envs[i].execute, chunk) for i, chunk in chunks.items()}

    def receive(self) -> dict[int, list[StepResult]]:
        """Wait for what was sent; per robot one result for each action executed.

        Raises:
            InvalidValueError: An action had the wrong shape, or held NaN or infinity; its robot did not move.
        """
        chunks, self._chunks = self._chunks, {}
        futures, self._futures = self._futures, {}
        failures = [error for future in futures.values() if (error := future.exception()) is not None]
        if failures:
            raise failures[0]
        results = {i: future.result() for i, future in futures.items()}
        return results | {i: self._envs[i].execute(chunk) for i, chunk in chunks.items()}

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for env in self._envs:
            env.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class SubprocVectorEnv:
    """``VectorEnv`` with one process per robot, each under the stock engine.

    Args:
        task: Task, Gymnasium id, or ``MODULE:CLASS``.
        count: Number of robots.
        history: Number of their last actions that they observe too.
        limiter: Makes the safety filter of one robot; it is pickled.

    Raises:
        UnknownNameError: No such task.
    """

    engine: Engine = "stock"

    def __init__(
        self, task: str, count: int, history: int = 0, limiter: Callable[[], ActionFilter] | None = None
    ) -> None:
        self._spec = robot_with_history(get_robot(task), history)
        self._busy: list[int] = []
        self._connections: list[Connection] = []
        self._processes = []
        context = mp.get_context("spawn")
        with starting_workers():
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve_robot, args=(theirs, task, history, limiter), daemon=True)
                process.start()
                theirs.close()
                self._connections.append(ours)
                self._processes.append(process)

    @property
    def spec(self) -> RobotSpec:
        return self._spec

    def __len__(self) -> int:
        return len(self._connections)

    def begin(self, starts: Mapping[int, int]) -> dict[int, StepResult]:
        """Start episodes: robot index to seed."""
        for index, seed in starts.items():
            self._request(index, "begin", seed)
        return self._results(starts)

    def send(self, chunks: Mapping[int, FloatArray]) -> None:
        """Have robots execute chunks (H, A) in the background, each stopping early where its episode ends."""
        for index, chunk in chunks.items():
            self._request(index, "execute", chunk)
        self._busy = list(chunks)

    def receive(self) -> dict[int, list[StepResult]]:
        """Wait for what was sent; per robot one result for each action executed."""
        busy, self._busy = self._busy, []
        return self._results(busy)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _request(self, index: int, method: str, argument: object) -> None:
        try:
            self._connections[index].send((method, argument))
        except (BrokenPipeError, ConnectionError):
            raise self._dead(index) from None

    def _results(self, indices: Iterable[int]) -> dict[int, Any]:
        """One answer of each robot; all are taken before a failure is raised, so that none is left for later."""
        answers: dict[int, Any] = {}
        failures: list[SacflowError] = []
        for index in indices:
            try:
                answers[index] = self._connections[index].recv()
            except (EOFError, ConnectionError):
                failures.append(self._dead(index))
                continue
            if isinstance(answers[index], str):
                failures.append(SacflowError(f"simulator process {index} failed: {answers[index]}"))
        if failures:
            raise failures[0]
        return answers

    def _dead(self, index: int) -> SacflowError:
        self._processes[index].join(timeout=1)
        code = self._processes[index].exitcode
        return SacflowError(f"simulator process {index} died (exit code {code}); is the machine out of memory?")


class NoRobots:
    """``VectorEnv`` of a robot without an environment: it has the robot's spec, and nothing to move."""

    engine: Engine = "stock"

    def __init__(self, spec: RobotSpec) -> None:
        self._spec = spec

    @property
    def spec(self) -> RobotSpec:
        return self._spec

    def __len__(self) -> int:
        return 0

    def begin(self, starts: Mapping[int, int]) -> dict[int, StepResult]:
        """Start nothing.

        Raises:
            UsageError: Something was to be started.
        """
        if starts:
            raise UsageError(f"there is no environment of {self._spec.robot}, {self._spec.task}, to move a robot in")
        return {}

    def send(self, chunks: Mapping[int, FloatArray]) -> None:
        """Send nothing: no episode has begun."""

    def receive(self) -> dict[int, list[StepResult]]:
        """Nothing was sent."""
        return {}

    def close(self) -> None:
        """Nothing to give back."""


def _serve_robot(connection: Connection, task: str, history: int, limiter: Callable[[], ActionFilter] | None) -> None:
    """Body of one worker process: execute requests until the parent closes the connection."""
    leave_interrupts_to_parent()
    env = _attempt(lambda: _wrapped(make_environment(task, "stock"), history, limiter))
    with suppress(EOFError, ConnectionError):
        if isinstance(env, str):
            connection.send(env)
            return
        while True:
            method, argument = connection.recv()
            connection.send(_attempt(partial(getattr(env, method), argument)))


def _attempt(call: Callable[[], Any]) -> Any:
    """Result of a call, or what went wrong as one line."""
    try:
        return call()
    except SacflowError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {one_line(error)}"
