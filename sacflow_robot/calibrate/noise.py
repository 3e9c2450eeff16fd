"""Errors of the sensors, from a robot at rest: noise, resolution, lost samples, and biases where two sensors see one thing."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sacflow_robot.calibrate.clocks import by_arrival_ns
from sacflow_robot.calibrate.recording import Recording, Values
from sacflow_robot.envs.transport import JOINT_POSITION
from sacflow_robot.errors import DataError
from sacflow_robot.spec import Array
from sacflow_robot.utils.rotations import normalize, rotation_between, without_jumps

_LEAST_ROWS, _SETTLE_S, _REST_S = 100, 0.5, 3.0
Forward = Callable[[Array], tuple[Array, Array]]


@dataclass(frozen=True)
class Noise:
    """Errors of the sensors."""

    values: Values  # by name, ``sensors.<key>.<quantity>``, and one standard deviation of each
    density: dict[str, float]  # noise per square root of hertz, by name
    dropped: float  # share of the observations that never came
    rows: int  # how many readings it is from
    rate_hz: float  # how many come per second
    # what was read at rest, by key (R, n): of positions and joints less their mean, of quaternions rotation vectors
    readings: dict[str, Array]

    def measured(self, known: Collection[str] = ()) -> Values:
        """Value and one standard deviation of each quantity of a profile; zeros only of those already ``known``."""
        found = {name: v for name, v in self.values.items() if v[0].any() or name in known}
        found["transport.observation_drop_ratio"] = np.array([self.dropped]), np.array([0.5 / self.rows])
        return found


def measure_noise(recording: Recording, forward: Forward | None = None) -> Noise:
    """The sensors' errors over the rest at a recording's beginning.

    Args:
        recording: An excitation run, or one that rests throughout.
        forward: Gripper pose (M, 3), (M, 4) at joint positions (M, 7); where joints are observed, it tells the pose's bias.

    Raises:
        DataError: There are too few readings, or the robot moves.
    """
    rows = _resting(recording)
    times = (recording.time_ns[rows] - recording.time_ns[rows][0]) / 1e9
    interval = float(np.median(np.diff(times)))
    dropped = max(0.0, 1 - (len(times) - 1) / max(1.0, round((times[-1] - times[0]) / interval)))
    values: Values = {}
    density: dict[str, float] = {}
    readings: dict[str, Array] = {}
    for array in recording.robot.observations:
        seen = recording.observations[array.key][rows].astype(np.float64).reshape(len(rows), -1)
        turned = np.zeros(seen.shape[1], bool)
        for start in array.quaternions:
            turned[start : start + 4] = True
            quats = without_jumps(seen[:, start : start + 4])
            vectors = rotation_between(normalize(quats.mean(axis=0)), quats)
            _enter(values, density, f"sensors.{array.key}", "rad", _detrended(times, vectors), interval)
            readings[array.key] = vectors
        unit = "m" if array.unit.startswith("m") else "rad" if array.unit == "rad" else ""
        plain = seen[:, ~turned]
        if unit and plain.shape[1]:
            around = plain - plain.mean(axis=0)
            _enter(values, density, f"sensors.{array.key}", unit, _detrended(times, around), interval)
            readings[array.key] = around
            step = _resolution(plain)
            if step > 0:
                values[f"sensors.{array.key}.resolution_{unit}"] = np.array([step]), np.array([step / 20])
        _enter_repeats(values, array.key, seen)
    if (drift := readings.get("robot0_eef_pos")) is not None:
        moved = np.abs(np.polyfit(times, drift, 1)[0] * (times[-1] - times[0])).max()
        if moved > 0.05:
            noise = 1e3 * np.std(_detrended(times, drift))
            raise DataError(
                f"the gripper moved by {1e3 * moved:.0f} mm while it was to be at rest (noise {noise:.1f} mm); "
                "is it held, or sagging?"
            )
    if forward is not None and JOINT_POSITION in recording.observations:
        values |= _biases(recording, rows, forward)
    return Noise(values, density, dropped, len(rows), 1 / interval, readings)


def _resting(recording: Recording) -> npt.NDArray[np.intp]:
    moving = np.flatnonzero((np.abs(recording.actions[:, :6]) > 1e-6).any(axis=1))
    until = recording.sent_ns[moving[0]] if len(moving) else np.iinfo(np.int64).max
    times_ns = by_arrival_ns(recording)
    begin = times_ns[0] + round(_SETTLE_S * 1e9)
    rows = np.flatnonzero((times_ns >= begin) & (times_ns < until))
    if len(rows) < _LEAST_ROWS:
        raise DataError(
            f"{len(rows)} readings of the robot at rest are too few to tell noise by; {_LEAST_ROWS} are needed"
        )
    return rows


def _detrended(times: Array, rows: Array) -> Array:
    """Without what the robot does while it settles: a cubic."""
    basis = np.vander(times / times[-1], 4)
    return np.asarray(rows - basis @ np.linalg.lstsq(basis, rows, rcond=None)[0])


def _enter(values: Values, density: dict[str, float], name: str, unit: str, rows: Array, interval: float) -> None:
    noise = np.sqrt(np.mean(rows**2, axis=0))
    size = float(np.median(noise[noise > 0])) if (noise > 0).any() else 0.0
    size = size if size > 1e-9 else 0.0
    values[f"{name}.noise_{unit}"] = np.array([size]), np.array([size / np.sqrt(2 * len(rows))])
    density[f"{name}.noise_{unit}"] = size * float(np.sqrt(2 * interval))


def _resolution(rows: Array) -> float:
    """Step between readings, where they lie on a grid; 0 where they don't."""
    steps = []
    for column in rows.T:
        unique = np.unique(column)
        if 1 < len(unique) < len(column) / 4:
            steps.append(float(np.min(np.diff(unique))))
    return float(np.median(steps)) if steps else 0.0


def _enter_repeats(values: Values, key: str, seen: Array) -> None:
    """Readings that repeat the one before to the last bit, where noise would not let them."""
    if len(np.unique(seen, axis=0)) < len(seen) / 4:
        return  # on a grid, or without noise: nothing can be told
    ratio = float(np.mean((seen[1:] == seen[:-1]).all(axis=1)))
    if ratio > 0:
        values[f"sensors.{key}.drop_ratio"] = np.array([ratio]), np.array([np.sqrt(ratio * (1 - ratio) / len(seen))])


def _biases(recording: Recording, rows: npt.NDArray[np.intp], forward: Forward) -> Values:
    """Gripper pose as observed, less what the joints say."""
    some = rows[:: max(1, len(rows) // 500)]
    seen = recording.observations
    position, quat = forward(seen[JOINT_POSITION][some].astype(np.float64))
    off = seen["robot0_eef_pos"][some].astype(np.float64) - position
    turned = rotation_between(quat, seen["robot0_eef_quat"][some].astype(np.float64))
    root = np.sqrt(len(some))
    return {
        "sensors.robot0_eef_pos.bias_m": (off.mean(axis=0), off.std(axis=0) / root),
        "sensors.robot0_eef_quat.bias_rad": (turned.mean(axis=0), turned.std(axis=0) / root),
    }
