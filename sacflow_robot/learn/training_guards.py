"""Guards that stop a run, each with a message of one line."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sacflow_robot.errors import SacflowError
from sacflow_robot.learn.compile import is_out_of_memory
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.run_folder import RunFolder

_READ_EVERY = 100  # updates


class Interrupted(Exception):
    """Ctrl-C was pressed, or SIGTERM came; the run is saved."""


def diverged(what: str, update: int, folder: RunFolder) -> SacflowError:
    """The error for a number that is not finite."""
    kept = (
        f"; the checkpoint before it is kept, and --resume {folder.path} takes these"
        if folder.checkpoint.exists()
        else ""
    )
    return SacflowError(
        f"training diverged: {what} is not finite at update {update}; lower --learner.policy-lr or --learner.critic-lr, "
        f"or set --learner.max-grad-norm{kept}"
    )


class FiniteWatch:
    """Raises an error at the first number that is not finite among what every update reports.

    On a GPU the reports are read back together, every so many updates, so that each does not wait for it.

    Args:
        device: Where the numbers are.
        folder: Of the run, for the message.
    """

    def __init__(self, device: torch.device, folder: RunFolder) -> None:
        self._at_once = device.type != "cuda"
        self._folder = folder
        self._unread: list[tuple[int, list[str], Tensor]] = []

    def add(self, update: int, values: Mapping[str, Tensor]) -> None:
        """Take the report of an update, and :meth:`read` where it is time to."""
        if values:
            self._unread.append((update, list(values), torch.stack([v.detach() for v in values.values()]).isfinite()))
        if self._at_once or len(self._unread) >= _READ_EVERY:
            self.read()

    def read(self) -> None:
        """Look at the reports since the last time, in the order of computation.

        Raises:
            SacflowError: A number was not finite; it names the first and its update.
        """
        unread, self._unread = self._unread, []
        if unread and not bool(torch.cat([finite for *_, finite in unread]).all()):
            for update, names, finite in unread:
                for name, fine in zip(names, finite.tolist(), strict=True):
                    if not fine:
                        raise diverged(name, update, self._folder)


@contextmanager
def memory_is_explained(config: TrainConfig, folder: RunFolder) -> Iterator[None]:
    """Turn running out of memory into an error that says which settings take it.

    Raises:
        SacflowError: Memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        device = isinstance(error, torch.OutOfMemoryError) or "CU" in str(error)
        anytime = [f"--learner.batch-size (now {config.learner.batch_size})"]
        if config.learner.best_of > 1:
            anytime.append(f"--learner.best-of (now {config.learner.best_of})")
        at_first = [
            f"--learner.critic-width (now {config.learner.critic_width})",
            f"--flow.width (now {config.flow.width})",
        ]
        if not device:
            anytime.append(f"--replay-memory-gb (now {config.replay_memory_gb:g})")
            at_first.append(f"--replay-capacity (now {config.replay_capacity})")
        goes_on = f" and go on with --resume {folder.path}, or in a new run" if folder.checkpoint.exists() else " or"
        where = "the GPU's memory" if device else "memory"
        raise SacflowError(f"out of {where}; lower {', '.join(anytime)}{goes_on} {', '.join(at_first)}") from None


@contextmanager
def ctrl_c_asks(ask: Callable[[], None]) -> Iterator[None]:
    """Turn the first Ctrl-C, or SIGTERM, into a call of ``ask``; a second one acts as usual."""

    def once(*_: object) -> None:
        put_back()
        ask()

    def put_back() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, once)
    except ValueError:  # not the main thread: whoever called has the signals
        yield
        return
    try:
        yield
    finally:
        put_back()
