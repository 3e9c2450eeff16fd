"""How late observations and commands are, from an excitation run, without a model of the arm.

Observations say when they were captured. A command's delay is read off the arm's first motion after each rest: a spring and a
damper with dry friction, which every end-effector controller is near enough to in its first tenth of a second, is fitted to
all of them at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from sacflow_robot.calibrate.recording import LOOK_NS, Recording, bursts
from sacflow_robot.errors import DataError

Array = npt.NDArray[np.float64]

_BEFORE_S, _AFTER_S, _STEP_S = 0.1, 0.1, 0.001
_LONGEST_S = 0.4
_LEAST_MOTIONS = 8
_WORST_S = 0.005


@dataclass(frozen=True)
class Latency:
    """Delays in seconds.

    Attributes:
        observation_s: From capture to the control loop (M,), one per observation; empty where nobody knows.
        command_s: From sending to acting (B,), one per motion.
        command_mean_s: Its mean.
        command_spread_s: Standard error of that mean.
        times: Of the figure's rows after each command's sending (R,).
        seen: Displacement along the commanded direction as a share of the action's goal (B, R).
        fitted: What the spring and damper do (R,) on average.
        goals: How far was commanded (B,), m.
    """

    observation_s: Array
    command_s: Array
    command_mean_s: float
    command_spread_s: float
    times: Array
    seen: Array
    fitted: Array
    goals: Array

    @property
    def observation_median_s(self) -> float:
        return float(np.median(self.observation_s)) if len(self.observation_s) else float("nan")

    @property
    def jitter_s(self) -> float:
        """Width of an even distribution with the observations' spread, beyond what looking now and then explains."""
        if not len(self.observation_s):
            return 0.0
        low, high = np.percentile(self.observation_s, [2, 98])
        width = float(high - low) / 0.96
        return width if width > 2 * LOOK_NS / 1e9 else 0.0


def measure_latency(recording: Recording) -> Latency:
    """Delays of an excitation run.

    Raises:
        DataError: The run is too short, too noisy or too still to tell them.
    """
    known = recording.received_ns >= 0
    late = (recording.received_ns[known] - recording.time_ns[known]) / 1e9
    if len(late) and late.min() < -0.002:
        raise DataError(
            f"observations arrive {-1e3 * late.min():.0f} ms before they are captured: the arm's clock is not the control loop's; "
            "measure their offset and set transport.clock_offset_ms, or let the driver convert its times"
        )
    # Seen at the first look after it arrived: half a look late on average.
    late = np.maximum(late - LOOK_NS / 2e9, 0)
    times = np.arange(-_BEFORE_S, _LONGEST_S + _AFTER_S, _STEP_S)
    rows, goals, noise = _motions(recording, times)
    shape, per_motion, fitted = _fit(times, rows, goals, 1 / recording.arm.control_rate_hz, noise)
    # Large motions tell more.
    weights = goals**2 / np.sum(goals**2)
    off = 1.4826 * float(np.median(np.abs(per_motion - np.median(per_motion))))
    period_s = 1 / recording.arm.control_rate_hz
    halves = [_fit(times, rows[i::2], goals[i::2], period_s, noise)[0][0] for i in range(2)]
    spread = max(float(off * np.sqrt(np.sum(weights**2))), abs(halves[1] - halves[0]) / 2)
    if spread > _WORST_S or not np.isfinite(spread):
        raise DataError(
            f"the motions' beginnings scatter by {1e3 * off:.0f} ms, so that the command delay is known to "
            f"{1e3 * spread:.1f} ms only, {1e3 * _WORST_S:g} are wanted; run longer, or with larger motions"
        )
    return Latency(late, per_motion, max(0.0, float(shape[0])), spread, times, rows / goals[:, None], fitted, goals)


def _motions(recording: Recording, times: Array) -> tuple[Array, Array, float]:
    """Displacements (B, R) in m along the commanded direction after each rest, and how far was commanded (B,)."""
    arm = recording.arm
    scale = [float(m[1]) if (m := re.fullmatch(r"([\d.]+) m", unit)) else 0.0 for unit in arm.action_units]
    if np.count_nonzero(scale) != 3:
        raise DataError("the arm's actions have no three lengths to measure delays by")
    moved = recording.actions[:, np.flatnonzero(scale)] * np.array(scale)[np.flatnonzero(scale)]
    seen_s = (recording.time_ns - recording.time_ns[0]) / 1e9
    sent_s = (recording.sent_ns - recording.time_ns[0]) / 1e9
    position = recording.observations["robot0_eef_pos"].astype(np.float64)
    rows, goals, noises = [], [], []
    for first, end in bursts(recording):
        begin = first + 1
        if end - begin < 3 or not np.allclose(moved[begin : begin + 3], moved[begin], rtol=1e-3, atol=1e-5):
            continue  # the safety filter changed the step, or it was not held long enough
        goal = float(np.linalg.norm(moved[begin]))
        near = (seen_s > sent_s[begin] - 0.15) & (seen_s < sent_s[begin] + _LONGEST_S + _AFTER_S)
        still = near & (seen_s < sent_s[begin])
        if goal < 1e-3 or near.sum() < 8 or still.sum() < 3:
            continue
        along = position @ (moved[begin] / goal)
        # An arm that sags is not quite at rest: what it did before goes on.
        trend = np.polyfit(seen_s[still] - sent_s[begin], along[still], 1)
        off = along[near] - np.polyval(trend, seen_s[near] - sent_s[begin])
        noises.append(float(np.std(along[still] - np.polyval(trend, seen_s[still] - sent_s[begin]))))
        rows.append(np.interp(times, seen_s[near] - sent_s[begin], off))
        goals.append(goal)
    if len(rows) < _LEAST_MOTIONS:
        raise DataError(f"{len(rows)} motions after a rest could be used, {_LEAST_MOTIONS} are needed; run longer")
    noise, travelled = float(np.median(noises)), float(np.median([np.abs(r).max() for r in rows]))
    if travelled < 5 * noise or travelled < 5e-4:
        raise DataError(
            f"the arm moves by {1e3 * travelled:.2f} mm within {1e3 * _LONGEST_S:g} ms of a command, against "
            f"{1e3 * noise:.2f} mm of noise; too little to tell when it begins: is it free to move?"
        )
    return np.stack(rows), np.array(goals), noise


def _fit(times: Array, rows: Array, goals: Array, period_s: float, noise: float) -> tuple[Array, Array, Array]:
    """Delay, log stiffness, damping ratio and friction of all motions; each motion's delay and its standard deviation."""
    mean = np.average(rows / goals[:, None], axis=0, weights=goals)
    over = np.flatnonzero(mean > 0.05)
    guess = float(np.clip(times[over[0]] - 0.03, 0, _LONGEST_S)) if len(over) else 0.1

    def made(x: Array, delays: Array) -> Array:
        grid, bank = _response(np.exp(x[1]), x[2], x[3] / goals, period_s)
        shifted = times[None] - delays[:, None]
        moved = [np.interp(t, grid, b, left=0.0) for t, b in zip(shifted, bank, strict=True)]
        return np.asarray(goals[:, None] * np.stack(moved))

    def weight(delay: float) -> Array:  # later, arm and spring need not agree
        return np.asarray(1 / (1 + np.exp(np.clip((times - delay - _AFTER_S) / 0.01, -50, 50))))

    x = np.array([guess, np.log(150), 1.0, 0.1])
    for _ in range(2):  # the second time with the window where it belongs
        window = weight(x[0])
        found = least_squares(
            lambda x, w=window: _misfit(made(x, np.full(len(rows), x[0])) * w, rows * w).reshape(-1) / max(noise, 1e-5), x,
            bounds=([-0.02, np.log(20), 0.3, 0], [_LONGEST_S, np.log(2000), 4, 5]), diff_step=1e-3,
            x_scale=[0.01, 0.3, 0.2, 0.1],
        )  # fmt: skip
        x = np.asarray(found.x)
    typical = np.average(made(x, np.full(len(rows), x[0])) / goals[:, None], axis=0)
    return x, _each(rows, window, lambda d: made(x, np.full(len(rows), d)), float(x[0])), typical


def _misfit(shape: Array, seen: Array) -> Array:
    """Differences (B, R), each motion's size being its own: friction and posture make an arm move less or more."""
    size = np.sum(shape * seen, axis=1) / np.maximum(np.sum(shape**2, axis=1), 1e-12)
    return np.asarray(seen - np.maximum(size, 0.1)[:, None] * shape)


def _each(rows: Array, window: Array, made: Callable[[float], Array], delay: float) -> Array:
    """The delay of each motion (B,)."""
    tried = np.arange(delay - 0.04, delay + 0.04, 0.001)
    costs = [np.sum(_misfit(made(d) * window, rows * window) ** 2, axis=1) for d in tried]
    return np.asarray(tried[np.argmin(np.stack(costs), axis=0)])


def _response(stiffness: float, ratio: float, friction: Array, period_s: float) -> tuple[Array, Array]:
    """Times (R,) and shares of the goal reached (B, R) by arms drawn to goals set anew, by 1 from where each is, each period.

    ``friction`` (B,) is what slows them, per second squared.
    """
    grid = np.arange(0, _AFTER_S + 0.05, _STEP_S)
    place, speed, goal = np.zeros(len(friction)), np.zeros(len(friction)), np.ones(len(friction))
    damping, out, due = 2 * ratio * np.sqrt(stiffness), np.zeros((len(friction), len(grid))), period_s
    for i, now in enumerate(grid):
        out[:, i] = place
        if now >= due - _STEP_S / 2:
            goal, due = place + 1.0, due + period_s
        force = stiffness * (goal - place) - damping * speed
        drag = np.where(speed > 1e-9, friction, np.minimum(friction, np.abs(force)))
        speed = speed + _STEP_S * (force - drag)
        place = place + _STEP_S * speed
    return grid, out
