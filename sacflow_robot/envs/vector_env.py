"""Simulated robots stepped a chunk at a time, in threads or in processes, and whole episodes collected from them."""

from __future__ import annotations

import logging
import multiprocessing as mp
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sacflow_robot.envs.engine import fall_back, usable_engine
from sacflow_robot.envs.experts.demonstrator_style import Quality
from sacflow_robot.envs.experts.expert import make_expert
from sacflow_robot.envs.registry import HistoryEnv, UserEnv, make_environment
from sacflow_robot.envs.tasks import get_robot
from sacflow_robot.episode import NOMINAL_CLOCK, Episode, EpisodeBuilder, Source, StepResult
from sacflow_robot.errors import SacflowError, one_line
from sacflow_robot.spec import Engine, FloatArray, RobotSpec
from sacflow_robot.utils.action_history import robot_with_history

if TYPE_CHECKING:
    from sacflow_robot.envs.gymnasium_env import GymnasiumEnv
    from sacflow_robot.envs.randomized_env import RandomizedVectorEnv
    from sacflow_robot.envs.robosuite_env import RobosuiteEnv
    from sacflow_robot.envs.thread_vector_env import ThreadVectorEnv

_log = logging.getLogger(__name__)

# Every worker is one busy core already; more threads inside it only fight for it.
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_vector_env(
    task: str, count: int, engine: Engine = "compiled", *, background: bool = True, history: int = 0
) -> ThreadVectorEnv | SubprocVectorEnv | RandomizedVectorEnv:
    """Simulated robots: in threads of this process under the compiled engine, else in a process each.

    Without ``background``, compiled robots move in the thread that waits for them. Where the compiled engine does not cover
    the task, the stock one steps it, and the log has a line that says why. With ``history`` they observe so many of their
    last actions too.

    Raises:
        UnknownNameError: No such task.
        UsageError: The environment cannot be made.
    """
    get_robot(task)
    if usable_engine(task, engine) == "compiled":
        from sacflow_robot.envs.fast.plan import NotCoveredError
        from sacflow_robot.envs.thread_vector_env import ThreadVectorEnv

        try:
            if history:
                from sacflow_robot.envs.randomized_env import Draws, RandomizedVectorEnv

                return RandomizedVectorEnv(task, count, Draws(history=history), background=background)
            return ThreadVectorEnv(task, count, background=background)
        except NotCoveredError as error:
            fall_back(task, str(error))
    return SubprocVectorEnv(task, count, history)


class SubprocVectorEnv:
    """``VectorEnv`` with one process per robot, each under the stock engine.

    Args:
        task: Name of the task.
        count: Number of robots.
        history: How many of their last actions they observe too.

    Raises:
        UnknownNameError: No such task.
    """

    def __init__(self, task: str, count: int, history: int = 0) -> None:
        self._spec = robot_with_history(get_robot(task), history)
        self._busy: list[int] = []
        self._links: list[Connection] = []
        self._processes = []
        context = mp.get_context("spawn")
        with _starting_workers():
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve_robot, args=(theirs, task, history), daemon=True)
                process.start()
                theirs.close()
                self._links.append(ours)
                self._processes.append(process)

    @property
    def spec(self) -> RobotSpec:
        return self._spec

    @property
    def engine(self) -> Engine:
        return "stock"

    def __len__(self) -> int:
        return len(self._links)

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
        for link in self._links:
            link.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()

    def __enter__(self) -> SubprocVectorEnv:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _request(self, index: int, verb: str, argument: object) -> None:
        try:
            self._links[index].send((verb, argument))
        except (BrokenPipeError, ConnectionError):
            raise self._dead(index) from None

    def _results(self, indices: Iterable[int]) -> dict[int, Any]:
        """One answer of each robot; all are taken before a failure is raised, so that none is left for later."""
        answers: dict[int, Any] = {}
        failures: list[SacflowError] = []
        for index in indices:
            try:
                answers[index] = self._links[index].recv()
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


def _serve_robot(link: Connection, task: str, history: int = 0) -> None:
    """Body of one worker process: execute requests until the parent closes the link."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        made = _local_robot(task, "stock")
        robot = HistoryEnv(made, history) if history else made
    except SacflowError as error:
        link.send(str(error))
        return
    except Exception as error:
        link.send(f"{type(error).__name__}: {one_line(error)}")
        return
    while True:
        try:
            verb, argument = link.recv()
        except (EOFError, ConnectionError):
            return
        try:
            if verb == "begin":
                link.send(robot.begin(argument))
                continue
            results = []
            for action in argument:
                results.append(robot.command(action))
                if results[-1].ended:
                    break
            link.send(results)
        except SacflowError as error:
            link.send(str(error))
        except (BrokenPipeError, ConnectionError):
            return
        except Exception as error:
            link.send(f"{type(error).__name__}: {one_line(error)}")


def demonstrate(task: str, quality: Quality, seed: int, engine: Engine = "stock") -> Episode:
    """One episode of the task's scripted expert; runs in the calling process."""
    robot = _local_robot(task, engine)
    expert = make_expert(task, seed, quality)
    result = robot.begin(seed)
    builder = EpisodeBuilder(result, period_ns=robot.robot.period_ns)
    while not (result.ended or expert.done):
        action = expert.act(result.observation)
        result = robot.command(action)
        builder.add(result, action, source=Source.EXPERT)
    return builder.build(seed=seed, task=task, expert=quality, clock=NOMINAL_CLOCK, env_engine=robot.engine)


def collect(
    task: str,
    quality: Quality,
    seeds: Iterable[int],
    workers: int,
    progress: Callable[[Episode], None],
    engine: Engine = "compiled",
) -> list[Episode]:
    """Demonstrate the task once per seed on several processes; the result is in the order of the seeds.

    Experts are Python, so that processes use the cores better than threads would, under either engine.

    Args:
        task: Name of the task.
        quality: Quality of the expert.
        seeds: Environment seeds, which decide the expert's habits too.
        workers: Number of processes.
        progress: Called with each episode as it becomes available, in order.
        engine: What steps the robots.
    """
    make_expert(task, 0, quality)
    engine = _prepared(task, engine)
    episodes: list[Episode] = []
    try:
        processes = ProcessPoolExecutor(workers, mp.get_context("spawn"), _leave_ctrl_c_to_parent)
    except OSError as error:  # their locks lie in /dev/shm, which may be missing, full or read-only
        _log.warning("no processes to collect with (%s); collecting in this one", one_line(error))
        for seed in seeds:
            episodes.append(demonstrate(task, quality, seed, engine))
            progress(episodes[-1])
        return episodes
    with processes as pool:
        try:
            with _starting_workers():
                found = pool.map(demonstrate, *zip(*((task, quality, seed, engine) for seed in seeds), strict=True))
            for episode in found:
                episodes.append(episode)
                progress(episode)
        except BrokenProcessPool:
            raise SacflowError("a collecting process died; is the machine out of memory?") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return episodes


def _leave_ctrl_c_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _prepared(task: str, engine: Engine) -> Engine:
    """The engine that processes to be started will find usable, compiled here once where it is not yet."""
    engine = usable_engine(task, engine)
    if engine == "compiled":
        from sacflow_robot.envs.fast import kernels
        from sacflow_robot.envs.fast.compilation import is_cached

        if not is_cached(kernels.execute):
            engine = _local_robot(task, engine).engine
    return engine


@cache
def _local_robot(task: str, engine: Engine) -> RobosuiteEnv | GymnasiumEnv | UserEnv:
    """This process's robot for the task; building one takes seconds, so it is kept."""
    return make_environment(task, engine)


@contextmanager
def _starting_workers() -> Iterator[None]:
    """Start processes with one thread each, which inherit a blocked SIGINT: a Ctrl-C while they import is the parent's."""
    before = None
    if hasattr(signal, "pthread_sigmask"):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with _environment(dict.fromkeys(_ONE_THREAD, "1")):
            yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started meanwhile, without overriding the user's."""
    added = {k: v for k, v in values.items() if k not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]
