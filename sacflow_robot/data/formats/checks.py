"""Refuse recorded times and orientations that contradict themselves.

Every DataError here begins with the ``origin`` that it is given, which names file and episode, and names the step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.data.formats.adapt import EEF_QUAT
from sacflow_robot.data.formats.demonstrations import DemoOptions
from sacflow_robot.errors import DataError
from sacflow_robot.spec import FloatArray, RobotSpec

_SAME_PACE = 0.15  # relative; how far the median period of the times may be from the nominal one
_ENOUGH = 5  # periods; fewer say little of a rate
_ON_GRID_S = 1e-4  # what LeRobot tolerates
_SLACK = 0.5  # of a period
_UNIT = 0.01  # how far the norm of a quaternion may be from 1
_SAME_TURN = 0.1  # of a quaternion's entries; observations may lag behind a state by a physics step


def check_finite(rows: npt.NDArray[Any], origin: str, what: str) -> None:
    """Refuse rows (T, ...) that contain NaN or infinity."""
    wrong = np.flatnonzero(~np.isfinite(rows).all(axis=tuple(range(1, rows.ndim))))
    if wrong.size:
        raise DataError(f"{origin}, step {wrong[0]}: NaN or infinity among {what}; leave it out")


def check_times(
    seconds: Sequence[float] | npt.NDArray[np.float64], rate_hz: float | None, origin: str, *, repeats: bool = False
) -> float | None:
    """Refuse times (T,), s, that cannot be those of an episode recorded at its rate; the rate that they show (Hz), if any.

    In a log, where a sensor may be late, a time may repeat.
    """
    times = np.asarray(seconds, np.float64)
    if wrong := np.flatnonzero(~np.isfinite(times)).tolist():
        raise DataError(f"{origin}, step {wrong[0]}: its timestamp is {times[wrong[0]]}; expected seconds")
    periods = np.diff(times)
    if len(periods) > 1 and not periods.any():
        raise DataError(f"{origin}: its timestamps are all {times[0]:g} s; expected times that increase")
    if wrong := np.flatnonzero(periods < 0 if repeats else periods <= 0).tolist():
        step = wrong[0]
        how = "runs backwards" if periods[step] < 0 else "repeats"
        raise DataError(
            f"{origin}, step {step + 1}: its timestamp {how} ({times[step]:.6g} s, then {times[step + 1]:.6g} s); "
            f"put the rows in order, or leave the episode out"
        )
    return check_pace(periods, rate_hz, origin)


def check_log_times(origin: str, times_ns: Sequence[npt.NDArray[np.int64]], rate_hz: float | None) -> None:
    """Refuse the times of a log's episodes, each (T + 1,), unless they increase, at about the control rate altogether.

    A loop may be late, so that a few episodes alone say little of its rate. Of a robot in lockstep they say nothing of it,
    and ``rate_hz`` is None.
    """
    periods = []
    for i, times in enumerate(times_ns):
        seconds = (times - times[0]) / 1e9
        check_times(seconds, None, f"{origin}, episode {i}", repeats=True)
        periods.append(np.diff(seconds))
    if periods:
        check_pace(np.concatenate(periods), rate_hz, origin)


def check_pace(
    periods: npt.NDArray[np.float64], rate_hz: float | None, origin: str, enough: int = _ENOUGH, slack_s: float = 0.0
) -> float | None:
    """The measured rate (Hz) of periods (s), from their median; None where there are none, or mostly 0.

    It may differ from the nominal rate as ``slack_s`` (s) more of a period would make it, or if there are not ``enough``.
    """
    middle = float(np.median(periods)) if len(periods) else 0.0
    if middle <= 0:
        return None
    if rate_hz is None or len(periods) < enough:
        return 1 / middle
    if abs(1 / middle - rate_hz) > _SAME_PACE * rate_hz + slack_s * rate_hz**2:
        raise DataError(
            f"{origin}: its timestamps are {1 / middle:.4g} Hz apart, and the file says {rate_hz:g} Hz; one of the two "
            f"is wrong, correct it in the file"
        )
    return 1 / middle


def check_frames(seconds: npt.NDArray[Any], rate_hz: float, origin: str) -> None:
    """Refuse timestamps (T,), s, that contradict the rate (Hz) anywhere: see :func:`check_times`; nor may a frame be missing."""
    check_times(seconds, rate_hz, origin)
    period, periods, rounding = 1 / rate_hz, np.diff(np.asarray(seconds, np.float64)), _rounding(seconds)
    check_pace(periods, rate_hz, origin, enough=1, slack_s=rounding)
    if (wrong := np.flatnonzero(np.abs(periods - period) > _SLACK * period + rounding)).size:
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
    """Largest error from rounding, of float32 above all, in a difference of two timestamps (s)."""
    return 2 * float(np.spacing(np.abs(seconds).max()))


def check_unit(observations: Mapping[str, FloatArray], robot: RobotSpec, origin: str) -> None:
    """Refuse observations (T + 1, ...) whose quaternions are not of norm 1."""
    for spec in robot.observations:
        flat = observations[spec.key].reshape(len(observations[spec.key]), -1)
        for start in spec.quaternions:
            wrong = np.flatnonzero(np.abs(np.linalg.norm(flat[:, start : start + 4], axis=1) - 1) > _UNIT)
            # robosuite's own first observation of an object may be of zeros, from before its sensors were read.
            if len(wrong) and (spec.key == EEF_QUAT or len(wrong) > len(flat) / 2):
                norm = np.linalg.norm(flat[wrong[0], start : start + 4])
                raise DataError(
                    f"{origin}, step {wrong[0]}: the quaternion in {spec.key} has norm {norm:.3g}; expected a unit "
                    f"quaternion x y z w"
                )


def check_w_last(
    observations: Mapping[str, FloatArray], states: npt.NDArray[np.float64], options: DemoOptions, origin: str
) -> None:
    """Refuse quaternions that begin with w, where the simulator can tell from two of the states (T + 1, S)."""
    if options.observe_state is None:
        return
    for step in sorted({0, (len(states) - 1) // 2}):
        try:
            expected = options.observe_state(states[step])[0]
        except DataError:  # states of another version's model, which the simulator here does not take
            return
        for spec in options.robot.observations:
            for start in spec.quaternions:
                found, right = (
                    each.ravel()[start : start + 4] for each in (observations[spec.key][step], expected[spec.key])
                )
                if _one_rotation(found[[1, 2, 3, 0]], right) and not _one_rotation(found, right):
                    raise DataError(
                        f"{origin}, step {step}: the quaternion in {spec.key} is w x y z by its states; expected x y z w, "
                        f"reorder it"
                    )


def _one_rotation(a: FloatArray, b: FloatArray) -> bool:
    return bool(min(np.abs(a - b).max(), np.abs(a + b).max()) < _SAME_TURN)
