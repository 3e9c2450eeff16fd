"""Timestamps of recorded frames on the grid of their rate, and beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.data.formats.agreement import check_times
from sacflow_robot.errors import DataError

_ON_GRID_S = 1e-4  # what LeRobot tolerates
_SLACK = 0.5  # of a period
_SAME_PACE = 0.15  # relative; however few frames there are, for they are said to stand on a grid


def check_frames(seconds: npt.NDArray[Any], rate_hz: float, origin: str) -> None:
    """Refuse timestamps (T,), s, that contradict the rate (Hz) anywhere: see :func:`check_times`; nor may a frame be missing.

    Raises:
        DataError: They do; the message begins with ``origin``, which names file and episode, and names the frame.
    """
    check_times(seconds, rate_hz, origin)
    period, periods = 1 / rate_hz, np.diff(np.asarray(seconds, np.float64))
    if len(periods) and abs((middle := float(np.median(periods))) - period) > _SAME_PACE * period + _rounding(seconds):
        raise DataError(
            f"{origin}: its timestamps are {1 / middle:.4g} Hz apart, and the file says {rate_hz:g} Hz; one of the two is "
            "wrong, correct it in the file"
        )
    if (wrong := np.flatnonzero(np.abs(periods - period) > _SLACK * period + _rounding(seconds))).size:
        frame = int(wrong[0]) + 1
        raise DataError(
            f"{origin}, frame {frame}: its timestamp is {periods[frame - 1]:.4g} s after the one before, expected "
            f"{period:.4g} s at {rate_hz:g} Hz; frames are missing or too many, leave the episode out"
        )


def capture_times(seconds: npt.NDArray[Any], rate_hz: float) -> npt.NDArray[np.int64] | None:
    """Capture times (T + 1,), ns from the first frame, of timestamps (T,), s, that passed :func:`check_frames`.

    The time after the last frame is a period later. None where they stand on the grid of the rate: then they say no more
    than it does.
    """
    since = np.asarray(seconds, np.float64) - float(seconds[0])
    grid = np.arange(len(since)) / rate_hz
    if (np.abs(since - grid) <= max(_ON_GRID_S, _rounding(seconds))).all():
        return None
    whole: npt.NDArray[np.int64] = np.round(np.append(since, since[-1] + 1 / rate_hz) * 1e9).astype(np.int64)
    return whole


def _rounding(seconds: npt.NDArray[Any]) -> float:
    """How far rounding, of float32 above all, moves a difference of two timestamps (s)."""
    return 2 * float(np.spacing(np.abs(seconds).max()))
