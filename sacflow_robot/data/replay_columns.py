"""Arrays of the replay buffer, in memory or mapped from a disk."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.errors import DataError
from sacflow_robot.spec import RobotSpec

Layout = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]


def column_layout(robot: RobotSpec, chunk_length: int, capacity: int) -> Layout:
    """Shape and type of each column."""
    real = np.dtype(np.float32)
    return {
        "observation": ((capacity, robot.observation_dim), real),
        "next_observation": ((capacity, robot.observation_dim), real),  # after the window, not after the step
        "action": ((capacity + chunk_length - 1, robot.action_dim), real),  # the last row's window needs rows behind it
        "reward": ((capacity,), real),
        "discount": ((capacity,), real),
        "length": ((capacity,), np.dtype(np.int32)),  # valid steps of the window that starts here
        "critic_valid": ((capacity,), np.dtype(np.bool_)),
        "solved": ((capacity,), np.dtype(np.bool_)),
    }


def allocate(layout: Layout, folder: Path | None) -> dict[str, npt.NDArray[Any]]:
    """Columns of zeros, in memory or in files of the folder.

    Raises:
        DataError: The folder's disk has no room for the files, or they cannot be made.
    """
    if folder is None:
        return {name: np.zeros(shape, dtype) for name, (shape, dtype) in layout.items()}
    try:
        return {name: _map(shape, dtype, folder) for name, (shape, dtype) in layout.items()}
    except OSError as error:
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())
        raise DataError(
            f"no room for the replay buffer's {size / 1e9:.3g} GB in {folder} ({error.strerror}); free some, or lower "
            f"--replay-capacity"
        ) from None


def _map(shape: tuple[int, ...], dtype: np.dtype[Any], folder: Path) -> npt.NDArray[Any]:
    """Zeros in a file without a name, its blocks taken from the disk now rather than in the middle of a run."""
    size = math.prod(shape) * dtype.itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        return np.asarray(np.memmap(file, dtype, "r+", shape=shape))
