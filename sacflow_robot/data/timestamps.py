"""Timestamps of recorded frames against the rate at which they are said to be recorded."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.errors import DataError

_ON_GRID_S = 1e-4  # what LeRobot tolerates
_RATE_TOLERANCE = 0.02
_SLACK = 0.5  # of a period


def check_timestamps(seconds: npt.NDArray[Any], rate_hz: float) -> None:
    """Refuse the timestamps of one episode's frames (T,) if they contradict the rate (Hz).

    Raises:
        DataError: They are not finite, do not increase, are of another rate, or leave frames out; the message names the
            frame.
    """
    if not np.isfinite(seconds).all():
        raise DataError(f"frame {int(np.flatnonzero(~np.isfinite(seconds))[0])}: its timestamp is not finite")
    if len(seconds) < 2:
        return
    period, periods = 1 / rate_hz, np.diff(np.asarray(seconds, np.float64))
    if not periods.any():
        raise DataError(f"all timestamps are {seconds[0]:g} s, so that nothing tells whether it ran at {rate_hz:g} Hz")
    if (periods <= 0).any():
        frame = int(np.flatnonzero(periods <= 0)[0]) + 1
        raise DataError(
            f"frame {frame}: timestamp {seconds[frame]:.9g} s follows {seconds[frame - 1]:.9g} s; expected them to "
            "increase, so the frames are out of order or were not recorded at these times"
        )
    rounding = 2 * float(np.spacing(np.abs(seconds).max()))
    typical = float(np.median(periods))
    if abs(typical - period) > max(_RATE_TOLERANCE * period, rounding):
        raise DataError(
            f"frame 1: timestamps are {typical:.4g} s apart ({1 / typical:.4g} Hz), but the rate is said to be "
            f"{rate_hz:g} Hz"
        )
    if (wrong := np.flatnonzero(np.abs(periods - period) > _SLACK * period + rounding)).size:
        frame = int(wrong[0]) + 1
        raise DataError(
            f"frame {frame}: its timestamp is {periods[frame - 1]:.4g} s after the one before, expected {period:.4g} s "
            f"at {rate_hz:g} Hz: frames are missing or too many"
        )


def capture_times(seconds: npt.NDArray[Any], rate_hz: float) -> npt.NDArray[np.int64] | None:
    """Capture times (T + 1,), ns from the first frame, of timestamps (T,) that passed :func:`check_timestamps`.

    The time after the last frame is a period later. None where they stand on the grid of the rate: then they say no more
    than it does.
    """
    since = np.asarray(seconds, np.float64) - float(seconds[0])
    grid = np.arange(len(since)) / rate_hz
    rounding = 2 * float(np.spacing(np.abs(seconds).max()))
    if (np.abs(since - grid) <= max(_ON_GRID_S, rounding)).all():
        return None
    whole: npt.NDArray[np.int64] = np.round(np.append(since, since[-1] + 1 / rate_hz) * 1e9).astype(np.int64)
    return whole
