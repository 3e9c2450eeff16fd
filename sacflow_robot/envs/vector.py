"""Simulated robots stepped a chunk at a time: in threads of this process, or in a process each."""

import multiprocessing as mp
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from sacflow_robot.envs.environment import HistoryEnv, LimitedEnv, Limiter, SimulatedEnv
from sacflow_robot.envs.randomization import Draws
from sacflow_robot.envs.registry import get_robot, make_environment
from sacflow_robot.envs.tasks import fall_back, usable_engine
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
    limiter: Limiter | None = None,
) -> "ThreadVectorEnv":
    """Simulated robots: in threads of this process under the compiled engine, else in a process each.

    Where the compiled engine does not cover the task, the stock one steps it, and the log has a line that says why.

    Args:
        task: Task, Gymnasium id, or ``MODULE:CLASS``.
        engine: Code that steps a robosuite task.
        background: False: robots in threads move in ``receive``, in the thread that calls it.
        history: Number of their last actions that they observe too.
        limiter: Makes the safety filter of one robot; processes need one that can be pickled.

    Raises:
        UnknownNameError: No such task.
        UsageError: The environment cannot be made, or ``draws`` are given and the compiled engine does not step it.
    """
    get_robot(task)
    if draws is not None or usable_engine(task, engine) == "compiled":
        from sacflow_robot.envs.compiled_env import CompiledEnv
        from sacflow_robot.envs.fast.plan import NotCoveredError
        from sacflow_robot.envs.randomization import RandomizedEnv
        from sacflow_robot.envs.robosuite_env import RobosuiteEnv

        def make() -> SimulatedEnv:
            return RandomizedEnv(RobosuiteEnv(task, engine="compiled"), draws) if draws else CompiledEnv(task)

        if history and draws is None:
            # Under this engine robots with a history step as randomized ones do, which notice within a control period that the
            # task is solved: policies with a history were trained so.
            draws = Draws()
        try:
            envs = [_wrapped(make(), history, limiter) for _ in range(count)]
            return ThreadVectorEnv(envs, background=background)
        except NotCoveredError as error:
            fall_back(task, str(error))
    return SubprocVectorEnv(task, count, history, limiter)


def _wrapped(env: SimulatedEnv, history: int, limiter: Limiter | None) -> SimulatedEnv:
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
        threads: How many; by default one for each core that has a robot.
    """

    spec: RobotSpec
    engine: Engine = "stock"

    def __init__(self, envs: Sequence[SimulatedEnv], *, background: bool = True, threads: int = 0) -> None:
        self._envs = list(envs)
        for env in envs[:1]:
            self.spec = env.robot
            self.engine = env.engine
        threads = threads or max(1, min(core_count(), len(envs)))
        self._threads = ThreadPoolExecutor(threads, "robot") if background else None
        self._futures: dict[int, Future[Any]] = {}
        self._chunks: dict[int, FloatArray] = {}

    def __len__(self) -> int:
        return len(self._envs)

    def begin(self, starts: Mapping[int, int]) -> dict[int, StepResult]:
        return {i: self._envs[i].begin(seed) for i, seed in starts.items()}

    def send(self, chunks: Mapping[int, FloatArray]) -> None:
        if self._threads is None:
            self._chunks = dict(chunks)
        else:
            self._futures = self._submit("execute", chunks)

    def receive(self) -> dict[int, list[StepResult]]:
        """Wait for what was sent; per robot one result for each action executed.

        Raises:
            InvalidValueError: An action had the wrong shape, or held NaN or infinity; its robot did not move.
        """
        chunks, self._chunks = self._chunks, {}
        futures, self._futures = self._futures, {}
        return self._wait(futures) | {i: self._envs[i].execute(chunk) for i, chunk in chunks.items()}

    def _submit(self, method: str, arguments: Mapping[int, Any]) -> dict[int, Future[Any]]:
        assert self._threads is not None
        return {i: self._threads.submit(getattr(self._envs[i], method), given) for i, given in arguments.items()}

    def _wait(self, futures: Mapping[int, Future[Any]]) -> dict[int, Any]:
        """The results; all are waited for before a failure is raised, so that none is left for later."""
        failures = [error for future in futures.values() if (error := future.exception()) is not None]
        if failures:
            raise failures[0]
        return {i: future.result() for i, future in futures.items()}

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for env in self._envs:
            env.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class SubprocVectorEnv(ThreadVectorEnv):
    """``VectorEnv`` with one process per robot, each under the stock engine; a thread waits for each. See ``make_vector_env``.

    Raises:
        UnknownNameError: No such task.
    """

    def __init__(self, task: str, count: int, history: int = 0, limiter: Limiter | None = None) -> None:
        robot = robot_with_history(get_robot(task), history)
        with starting_workers():
            envs = [_ProcessEnv(i, robot, (task, history, limiter)) for i in range(count)]
        super().__init__(envs, threads=count)

    def begin(self, starts: Mapping[int, int]) -> dict[int, StepResult]:
        return self._wait(self._submit("begin", starts))


class _ProcessEnv(SimulatedEnv):
    """A robot in a process of its own."""

    def __init__(self, index: int, robot: RobotSpec, made_of: tuple[Any, ...]) -> None:
        self.robot = robot
        self._index = index
        context = mp.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve_robot, args=(theirs, *made_of), daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, seed: int) -> StepResult:
        result: StepResult = self._request("begin", seed)
        return result

    def command(self, action: FloatArray) -> StepResult:
        result: StepResult = self._request("command", action)
        return result

    def execute(self, chunk: FloatArray) -> list[StepResult]:
        results: list[StepResult] = self._request("execute", chunk)
        return results

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.terminate()

    def _request(self, method: str, argument: object) -> Any:
        try:
            self._connection.send((method, argument))
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(timeout=1)
            code = self._process.exitcode
            raise SacflowError(
                f"simulator process {self._index} died (exit code {code}); is the machine out of memory?"
            ) from None
        if isinstance(answer, str):
            raise SacflowError(f"simulator process {self._index} failed: {answer}")
        return answer


class NoRobots(ThreadVectorEnv):
    """``VectorEnv`` of a robot without an environment: it has the robot's spec, and nothing to move."""

    def __init__(self, spec: RobotSpec) -> None:
        super().__init__([], background=False)
        self.spec = spec

    def begin(self, starts: Mapping[int, int]) -> dict[int, StepResult]:
        if starts:
            raise UsageError(f"there is no environment of {self.spec.robot}, {self.spec.task}, to move a robot in")
        return {}


def _serve_robot(connection: Connection, task: str, history: int, limiter: Limiter | None) -> None:
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
