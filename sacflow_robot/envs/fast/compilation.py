"""Compilation by one process at a time, so that the others find the code in Numba's cache, with a line in the log."""

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
    """Context for the first call of a dispatcher of Numba's (what ``njit`` returns), which compiles it; free of cost later."""
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
    """True if an earlier process left a function compiled, perhaps by another version of Numba."""
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
