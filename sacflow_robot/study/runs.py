"""Training runs for studies: the usual training loop, quietly, in a temporary folder; many at once."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console

from sacflow_robot.episode import Episode
from sacflow_robot.errors import SacflowError
from sacflow_robot.interfaces import VectorEnv
from sacflow_robot.learn.algorithms.agent import Agent
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.progress import TrainingProgress
from sacflow_robot.learn.run_folder import RunFolder
from sacflow_robot.learn.trainer import Trainer

_Cell = TypeVar("_Cell")
_Result = TypeVar("_Result")


def train(
    config: TrainConfig,
    envs: VectorEnv,
    demos: Sequence[Episode] = (),
    cloned: Mapping[str, Any] | None = None,
    prepare: Callable[[Agent], None] | None = None,
) -> tuple[Trainer, bool]:
    """Train as ``sacflow-robot train`` does; the trainer at the end of it, and whether training came there.

    A run that diverges is a result of a study, not its end: the trainer is then as it was when that was noticed. ``demos`` are
    what to clone; ``cloned`` is the state of an agent that has cloned already, so that several runs go on from one; ``prepare``
    is called with the agent before its first update.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder.create(Path(name) / "run", config)
        trainer = Trainer(config, folder, envs, envs, TrainingProgress(Console(quiet=True)))
        trainer.load(demos)
        if prepare is not None:
            prepare(trainer.agent)
        if cloned is not None:
            trainer.agent.load_state_dict(dict(cloned))
            trainer.done.offline_steps = config.offline_steps
        try:
            trainer.run()
        except SacflowError as error:
            if "training diverged" not in str(error):
                raise
            return trainer, False
        return trainer, True


class RunAll(Protocol):
    """``in_parallel`` with its workers and its progress bar, as studies are given it."""

    def __call__(self, work: Callable[[_Cell], _Result], cells: Sequence[_Cell]) -> list[_Result]: ...


def in_parallel(
    work: Callable[[_Cell], _Result], cells: Iterable[_Cell], workers: int, advance: Callable[[], None]
) -> list[_Result]:
    """``work``, which a process of its own can import, on every cell, in their order; ``advance`` is called as cells are done.

    ``workers`` are processes at once; 1 works in this one.
    """
    todo = list(cells)
    processes: ProcessPoolExecutor | None = None
    if workers > 1 and len(todo) > 1:
        # A worker may start processes or threads of its own: forking it would copy locks that nobody releases.
        context = multiprocessing.get_context("spawn")
        with contextlib.suppress(OSError):  # their locks lie in /dev/shm, which may be missing, full or read-only
            processes = ProcessPoolExecutor(min(workers, len(todo)), context, initializer=_end_with_parent)
    if processes is None:
        results = []
        for cell in todo:
            results.append(work(cell))
            advance()
        return results
    with processes as pool:
        futures = [pool.submit(work, cell) for cell in todo]
        try:
            for future in as_completed(futures):
                future.result()
                advance()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _end_with_parent() -> None:
    """Have this process end when the one that started it does: a study that is killed leaves nobody computing."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
