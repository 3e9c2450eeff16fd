"""The specification of the robot of a robomimic file that is of no task known here: from its env_args and arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from sacflow_robot.data.formats.agreement import Claims, Controller
from sacflow_robot.data.formats.env_args import claims_of_env
from sacflow_robot.data.formats.inferred_spec import UNKNOWN, infer_spec
from sacflow_robot.errors import DataError, UsageError, one_line
from sacflow_robot.spec import RobotSpec

_UNREADABLE = (OSError, KeyError, RuntimeError, AttributeError, TypeError, ValueError, IndexError)


def has_observations(path: Path) -> bool:
    """Whether a file's demonstrations hold observations.

    Raises:
        DataError: It cannot be read.
    """
    with _open(path) as data:
        return any("obs" in data[name] for name in data)


def recorded_rate(path: Path) -> float | None:
    """The control rate (Hz) that a file's env_args say; None where they do not.

    Raises:
        DataError: It cannot be read.
    """
    with _open(path) as data:
        return _claims(data).rate_hz


def infer_robot(path: Path, rate_hz: float | None = None) -> RobotSpec:
    """Specification of the robot: observations are the arrays under ``obs`` that are no images.

    Args:
        path: HDF5 file in robomimic's layout.
        rate_hz: Control rate, where its env_args do not say it.

    Raises:
        DataError: It cannot be read, or has no actions or observations that can be used.
        UsageError: Neither it nor ``rate_hz`` says the control rate.
    """
    with _open(path) as data:
        claims = _claims(data)
        rate_hz = claims.rate_hz or rate_hz
        if rate_hz is None:
            raise UsageError(f"{path} does not say at which rate it was recorded; give --rate HZ")
        demos = [data[name] for name in sorted(data)]
        controller = claims.controller or Controller()
        try:
            return infer_spec(
                robot=claims.robot or UNKNOWN,
                task=str(_env_args(data).get("env_name", UNKNOWN)),
                rate_hz=rate_hz,
                controller=str(controller) if controller.kind else UNKNOWN,
                observations=_observations(demos[0]),
                actions=(np.asarray(demo["actions"], np.float64) for demo in demos),
                bounds=None if controller.delta is False else controller.inputs,  # absolute goals go beyond them
            )
        except DataError as error:
            raise DataError(f"{path}: {error}") from None


@contextmanager
def _open(path: Path) -> Iterator[h5py.Group]:
    """The group of demonstrations.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with h5py.File(path, "r") as file:
            yield file["data"]
    except _UNREADABLE as error:
        raise DataError(f"{path} cannot be read as a robomimic file ({one_line(error)}); is it complete?") from None


def _env_args(data: h5py.Group) -> Mapping[str, Any]:
    found = json.loads(data.attrs["env_args"]) if "env_args" in data.attrs else {}
    return found if isinstance(found, Mapping) else {}


def _claims(data: h5py.Group) -> Claims:
    return claims_of_env(_env_args(data).get("env_kwargs") or {})


def _observations(demo: h5py.Group) -> dict[str, tuple[int, ...]]:
    """Shape of one sample of each array that is no image."""
    arrays = {key: array for key, array in demo.get("obs", {}).items() if isinstance(array, h5py.Dataset)}
    return {
        key: array.shape[1:] or (1,) for key, array in arrays.items() if array.dtype.kind in "biuf" and array.ndim < 4
    }
