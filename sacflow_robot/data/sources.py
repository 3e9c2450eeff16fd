"""Episodes from whatever file or folder a user names."""

from __future__ import annotations

from pathlib import Path

from sacflow_robot.data.hdf5 import Hdf5Options, read_hdf5
from sacflow_robot.data.log import EpisodeLog
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, SpecMismatchError

_HDF5_SUFFIXES = {".hdf5", ".h5"}


def load_episodes(path: Path, options: Hdf5Options) -> list[Episode]:
    """Read every episode at ``path``: an episode log, a raw robosuite or a robomimic low-dim HDF5 file.

    Raises:
        DataError: Nothing is there, or it cannot be read, or is empty.
        SpecMismatchError: It holds episodes of another arm or task.
    """
    if not path.exists():
        raise DataError(f"no file or folder {path}; check the path")
    if path.is_dir():
        log = EpisodeLog.open(path)
        different = options.arm.differences(log.arm)
        if different:
            raise SpecMismatchError(f"{path} does not fit (expected, found): {'; '.join(different)}")
        episodes = list(log.episodes())
    elif path.suffix in _HDF5_SUFFIXES:
        episodes = list(read_hdf5(path, options))
    else:
        raise DataError(f"{path} is neither an episode log (a folder) nor an HDF5 file (.hdf5, .h5)")
    if not episodes:
        raise DataError(f"{path} holds no episodes")
    return episodes
