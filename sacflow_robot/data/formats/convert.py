"""Demonstrations from one format to another, under the final name only once they are whole."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import zarr

from sacflow_robot.data.formats.demonstrations import DemoSet
from sacflow_robot.data.formats.sources import LOG_ABOUT, kind_to_write
from sacflow_robot.data.log.episode_writer import write_log
from sacflow_robot.errors import LogWriteError, UsageError, one_line, reason_of
from sacflow_robot.utils.atomic_files import check_output, replacing


def check_free(path: Path) -> None:
    """Raise UsageError if something is at the path already, or nothing can be written there."""
    if os.path.lexists(path):
        raise UsageError(f"{path} exists already; give another path or remove it")
    check_output(path, "DST")


def write_demos(path: Path, demos: DemoSet, kind: str | None = None) -> DemoSet:
    """Write demonstrations at a path where nothing is yet.

    Args:
        path: Where to.
        demos: What to write.
        kind: ``zarr``, ``hdf5`` or ``lerobot``; by default the one that the path's suffix names.

    Returns:
        What was written, and in its ``losses`` all that reading and writing together left out.

    Raises:
        UsageError: Something is there already, or the path says no kind.
        LogWriteError: It cannot be written there; nothing is left behind.
    """
    kind = kind_to_write(path, kind)
    check_free(path)
    if kind != "hdf5" and demos.model_files:
        demos.losses.leave_out("model_file")
        demos = replace(demos, model_files=[])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            if kind == "zarr":
                _write_log(partial, demos)
            elif kind == "hdf5":
                from sacflow_robot.data.formats.hdf5_writer import write_hdf5

                write_hdf5(partial, demos)
            else:
                from sacflow_robot.data.formats.lerobot_writer import write_lerobot

                write_lerobot(partial, demos)
            check_free(path)
    except (OSError, LogWriteError) as error:  # the writers name the partial file, which nobody will find
        raise LogWriteError(f"cannot write {path}: {one_line(reason_of(error))}; nothing is left of it") from None
    return demos


def _write_log(path: Path, demos: DemoSet) -> None:
    having = [episode.states is not None for episode in demos.episodes]
    episodes = demos.episodes
    if any(having) and not all(having):
        demos.losses.leave_out("states (not every episode has them)")
        episodes = [replace(episode, states=None) for episode in episodes]
    write_log(path, demos.robot, episodes)
    if about := demos.about():
        zarr.open_group(path, mode="r+", zarr_format=2).attrs[LOG_ABOUT] = json.dumps(about)
