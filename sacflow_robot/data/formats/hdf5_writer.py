"""Demonstrations as a robomimic low-dim HDF5 file.

robomimic's layout, plus what an episode has beyond it: datasets ``policy_action``, ``measured``, ``source``, ``truncated``,
``time_ns`` and the group ``last`` (state and time after the last step) in each demonstration, its attribute ``info``,
and the robot in an attribute of ``data``. ``dones`` are the steps that ended the task, never a mere time limit.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np

from sacflow_robot.data.formats.demonstrations import OBSERVATION_COLUMNS, STEP_COLUMNS, DemoSet
from sacflow_robot.data.formats.hdf5_header import OURS
from sacflow_robot.episode import Episode
from sacflow_robot.errors import LogWriteError, one_line

_BLOCK_BYTES = 16 << 20


def write_hdf5(path: Path, demos: DemoSet) -> None:
    """Write the file; ``demos.env_args`` and ``demos.model_files`` go into it as they are.

    The file is made in memory: libhdf5 crashes when it cannot flush to a full disk.

    Raises:
        LogWriteError: It cannot be written there.
    """
    try:
        with h5py.File(path, "w", driver="core", backing_store=False, block_size=_BLOCK_BYTES) as file:
            data = file.create_group("data")
            data.attrs.update(demos.attributes)
            data.attrs["total"] = sum(map(len, demos.episodes))
            data.attrs[OURS] = json.dumps({"arm": asdict(demos.robot)})
            if demos.env_args is not None:
                data.attrs["env_args"] = json.dumps(demos.env_args)
            for i, episode in enumerate(demos.episodes):
                group = data.create_group(f"demo_{i}")
                _write_episode(group, episode)
                model = demos.model_files[i] if demos.model_files else None
                if model is not None:
                    group.attrs["model_file"] = model
            for name, indices in demos.masks.items():
                file[f"mask/{name}"] = np.array([f"demo_{i}".encode() for i in indices], "S")
            file.flush()
            path.write_bytes(file.id.get_file_image())
    except OSError as error:
        raise LogWriteError(f"cannot write {path}: {one_line(error)}") from None


def _write_episode(group: h5py.Group, episode: Episode) -> None:
    group.attrs["num_samples"] = len(episode)
    group.attrs["info"] = json.dumps(dict(episode.info))
    group["actions"] = episode.action
    for column in STEP_COLUMNS:
        values = getattr(episode, column.attribute)
        if values is not None:
            group[column.hdf5] = values.astype(np.int64) if values.dtype == np.bool_ else values
    for column in OBSERVATION_COLUMNS:
        values = getattr(episode, column.attribute)
        if values is not None:
            group[column.hdf5], group[f"last/{column.hdf5}"] = values[:-1], values[-1:]
    for key, rows in episode.observations.items():
        group[f"obs/{key}"], group[f"next_obs/{key}"] = rows[:-1], rows[1:]
