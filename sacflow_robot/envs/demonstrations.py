"""Demonstrations of the scripted experts, collected in processes."""

import logging
import multiprocessing as mp
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache

from sacflow_robot.envs.experts.expert import make_expert
from sacflow_robot.envs.experts.primitives import Quality
from sacflow_robot.envs.registry import make_environment
from sacflow_robot.envs.tasks import usable_engine
from sacflow_robot.episode import NOMINAL_CLOCK, Episode, EpisodeBuilder, Source
from sacflow_robot.errors import SacflowError, one_line
from sacflow_robot.spec import Engine
from sacflow_robot.utils.processes import leave_interrupts_to_parent, starting_workers

_log = logging.getLogger(__name__)
_environment = cache(make_environment)  # of this process: building one takes seconds


def demonstrate(task: str, quality: Quality, seed: int, engine: Engine = "stock") -> Episode:
    """One episode of the task's scripted expert, in the calling process."""
    env = _environment(task, engine)
    expert = make_expert(task, seed, quality)
    result = env.begin(seed)
    builder = EpisodeBuilder(result, period_ns=env.robot.period_ns)
    while not (result.ended or expert.done):
        action = expert.act(result.observation)
        result = env.command(action)
        builder.add(result, action, source=Source.EXPERT)
    return builder.build(seed=seed, task=task, expert=quality, clock=NOMINAL_CLOCK, env_engine=env.engine)


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
        seeds: Environment seeds, which decide the expert's style too.
        progress: Called with each episode as it becomes available, in order.
    """
    make_expert(task, 0, quality)
    engine = _prepared(task, engine)
    episodes: list[Episode] = []
    try:
        processes = ProcessPoolExecutor(workers, mp.get_context("spawn"), leave_interrupts_to_parent)
    except OSError as error:  # their locks lie in /dev/shm, which may be missing, full or read-only
        _log.warning("no processes to collect with (%s); collecting in this one", one_line(error))
        for seed in seeds:
            episodes.append(demonstrate(task, quality, seed, engine))
            progress(episodes[-1])
        return episodes
    with processes as pool:
        try:
            with starting_workers():
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


def _prepared(task: str, engine: Engine) -> Engine:
    """The engine that the processes will find usable, compiled here once where it is not yet."""
    engine = usable_engine(task, engine)
    if engine == "compiled":
        from sacflow_robot.envs.fast import kernels
        from sacflow_robot.envs.fast.compilation import is_cached

        if not is_cached(kernels.execute):
            engine = _environment(task, engine).engine
    return engine
