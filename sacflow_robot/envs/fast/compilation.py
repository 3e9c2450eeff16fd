"""What Numba compiles is compiled by one process at a time, so that the others find it in the cache; and it is announced."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sacflow_robot.utils.caches import compiler_cache

_ANNOUNCED_AFTER_S = 1.5  # reading the cache takes less
_PATIENCE_S = 300.0

_log = logging.getLogger(__name__)
_in_this_process = threading.Lock()


@contextmanager
def compiling(function: Any) -> Iterator[None]:
    """Call a function of Numba's for the first time within this; later it costs nothing.

    Args:
        function: A dispatcher, as ``numba.njit`` returns it. With others that it calls, it is compiled at its first call.
    """
    if not hasattr(function, "py_func") or function.signatures:
        yield
        return
    with _in_this_process, ExitStack() as stack:
        if not is_cached(function):
            _wait_for_others(stack)
        timer = threading.Timer(_ANNOUNCED_AFTER_S, _announce, [function])
        timer.daemon = True
        timer.start()
        stack.callback(timer.cancel)
        yield


def is_cached(function: Any) -> bool:
    """Whether an earlier process left a function compiled; it may yet turn out to be of another version of Numba."""
    source = Path(function.py_func.__code__.co_filename)
    kept = Path(function.stats.cache_path or "/nonexistent").glob(f"{source.stem}.{function.__name__}-*.nbi")
    with suppress(OSError):
        return any(index.stat().st_mtime >= source.stat().st_mtime for index in kept)
    return False


def _wait_for_others(stack: ExitStack) -> None:
    folder = compiler_cache("numba")
    if folder is None:
        return
    lock = FileLock(folder / "compiling.lock")
    with suppress(Timeout, OSError, NotImplementedError):  # else both compile, which is only slower
        try:
            stack.enter_context(lock.acquire(timeout=0))
        except Timeout:
            _log.warning("another process is compiling the simulator's control step; waiting for it")
            stack.enter_context(lock.acquire(timeout=_PATIENCE_S))


def _announce(function: Any) -> None:
    kept = function.stats.cache_path
    _log.warning(
        "compiling the simulator's control step, some 20 s; %s", f"kept in {kept}" if kept else "cannot be kept"
    )
