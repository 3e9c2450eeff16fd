"""Compilation of kernels by Numba: without the interpreter's lock, and cached on disk."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba import types

from sacflow_robot.envs import (
    robosuite_import as robosuite_import,  # chooses Numba's folder before anything is compiled
)


def share_changes(files: list[Path]) -> None:
    """Give files the time of the newest one.

    Numba compiles a function again when the file that holds it has changed, but not when the file of a function that it calls
    has: the machine code of both is in one cache entry.
    """
    with suppress(OSError):  # installed where nothing can be written, and nothing is edited
        newest = max(file.stat().st_mtime_ns for file in files)
        for file in files:
            if file.stat().st_mtime_ns != newest:
                os.utime(file, ns=(newest, newest))


# Files with kernels, or their constants.
_KERNELS = "controller", "kernels", "linear_algebra", "observation", "step_data"
share_changes([Path(__file__).with_name(f"{name}.py") for name in _KERNELS])


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function, cached where a folder for that can be written."""
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # Numba found no folder that it may write to
        return numba.njit(nogil=True, error_model="numpy")(function)


def compiled(function: Any) -> Any:
    """A function of robosuite's: compiled by robosuite, or here if its own switch for that is off."""
    return function if hasattr(function, "py_func") else kernel(function)


def external(name: str, addresses: int, *others: types.Type) -> Any:
    """A C function by its name that takes so many addresses, then other arguments, and returns nothing."""
    return types.ExternalFunction(name, types.void(*[types.intp] * addresses, *others))
