"""Delays of observations and commands, from an excitation run, without a model of the robot.

Observations say when they were captured. A command's delay is read off the moment at which each motion after a rest begins.
Whatever holds the robot at its goal, a new goal is a step of force: readings depart from their previous trend with an
acceleration that starts abruptly and then decays. Before it they need not stand still (a robot sags, and creeps in its
nullspace), but change smoothly. Sizes are each motion's and each reading's own, for friction lets joints move more or less.
"""

import re
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.calibrate.clocks import ClockOffset, fastest_way, measure_offset
from sacflow_robot.calibrate.recording import LOOK_NS, Recording, Values, bursts
from sacflow_robot.envs.transport import JOINT_POSITION
from sacflow_robot.errors import DataError
from sacflow_robot.serve.client import PolicyClient
from sacflow_robot.spec import Array
from sacflow_robot.utils.seeding import chunk_noise

COMMAND_DELAY = "transport.command_delay_ms"

_STEP_S = 0.002
_LONGEST_S = 0.4
_LEAST_MOTIONS = 8
_WORST_S, _LEAST_SPREAD_S = 0.005, 0.001  # the latter for the robot's own cycle, which shows as half of it
_RATES_PER_S = np.array([8.0, 12, 18, 27, 40, 60, 90])  # at which the first acceleration decays
_RATE_PER_S, _RATE_LOG_SPREAD = 25.0, 0.5  # critical damping at a stiffness of 150 per second squared, weakly
_NEAR_S, _FINE_S = 0.012, 0.0005


@dataclass(frozen=True)
class Latency:
    """Delays in seconds."""

    observation_s: Array  # from capture to the control loop (M,), one per observation; empty where nobody knows
    command_s: Array  # from sending to acting (B,), one per motion
    command_mean_s: float  # that of all motions together
    command_spread_s: float  # its standard error, or the round trip's, where the clocks differ
    # one standard deviation of delays each way; larger where two clocks differ, for only their sum is known then
    unsure_s: float
    times: Array  # of the figure's rows after each command's sending, by the arrival of the fastest observation (R,)
    # how far each motion has come (B, R), less what went on before, in units of its first acceleration (s^2)
    seen: Array
    fitted: Array  # the same of what is fitted (R,)
    round_trip_s: float  # from a command's sending to the earliest that its effect could be seen
    # whether the robot's clock is the control loop's; None where nobody knows when observations arrived
    clock: ClockOffset | None

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

    def measured(self, *, with_offset: bool = False) -> Values:
        """Value and one standard deviation of each quantity of a profile, by name.

        ``with_offset`` adds the clocks' offset where they need not differ, too, to replace one that a profile has.
        """
        found = {COMMAND_DELAY: (_ms(self.command_mean_s), _ms(self.unsure_s))}
        if not len(self.observation_s):
            return found
        late, clock = self.observation_s, self.clock
        apart_s = clock.spread_s if clock is not None and clock.differs else 0.0
        low_s = float(np.percentile(late, 2) if self.jitter_s else np.median(late))
        spread_s = float(np.hypot(late.std() / np.sqrt(len(late)), apart_s))
        found["transport.observation_delay_ms"] = _ms(low_s), _ms(spread_s) + 0.5
        found["transport.jitter_ms"] = _ms(self.jitter_s), np.array([0.5])
        if clock is not None and (clock.differs or with_offset):
            found["transport.clock_offset_ms"] = _ms(clock.offset_s), _ms(clock.spread_s)
        return found

    def summary(self) -> dict[str, Any]:
        """Percentiles, clocks and round trip as plain numbers, for JSON."""
        clock = self.clock
        return {
            "observation_ms_p5_p50_p95": _percentiles(self.observation_s),
            "command_ms_p5_p50_p95": _percentiles(self.command_s),
            "clock": None if clock is None else {
                "differs": clock.differs,
                "offset_ms_low_high": [round(1e3 * v, 3) for v in (clock.low_s, clock.high_s)],
                "drift_ppm": clock.way.drift_ppm,
                "drift_spread_ppm": clock.way.spread_ppm,
            },
            "round_trip_ms": 1e3 * self.round_trip_s,
        }  # fmt: skip


def _ms(seconds: float) -> Array:
    return np.array([1e3 * seconds])


def _percentiles(seconds: Array) -> list[float] | None:
    return [round(1e3 * float(v), 2) for v in np.percentile(seconds, [5, 50, 95])] if len(seconds) else None


@dataclass(frozen=True)
class _Motions:
    """Readings (B, R, C) at ``times`` (R,) after a command from rest, and how they are looked at."""

    times: Array
    rows: Array
    degree: int  # of the polynomial in which readings would have gone on
    before_s: float
    after_s: float
    weight: float  # independent readings per row

    def around(self, delay: float, before_s: float | None = None, after_s: float = 0.0) -> "_Motions":
        """Only the rows around a delay."""
        near = self.times > delay - (before_s or self.before_s)
        near &= self.times < delay + max(after_s, self.after_s)
        return replace(self, times=self.times[near], rows=self.rows[:, near])


def measure_latency(recording: Recording) -> Latency:
    """Delays of an excitation run.

    Raises:
        DataError: The run is too short, too noisy or too still to tell them, or its clocks were set meanwhile.
    """
    known = recording.received_ns >= 0
    way = fastest_way(recording.time_ns[known], recording.received_ns[known]) if known.any() else None
    # Whatever the robot's clock says, by the arrival of the fastest observation motions begin a round trip after commands.
    motions = _motions(recording, recording.time_ns if way is None else way.arrival_ns(recording.time_ns))
    round_trip, rate, each = _fit(motions)
    off = 1.4826 * float(np.median(np.abs(each - np.median(each))))
    halves = [_fit(replace(motions, rows=motions.rows[i::2]))[0] for i in range(2)]
    spread = max(1.25 * off / len(each) ** 0.5, abs(halves[1] - halves[0]) / 2, _LEAST_SPREAD_S)
    if spread > _WORST_S:
        raise DataError(
            f"the motions' beginnings scatter by {1e3 * off:.0f} ms, so that the command delay is known to "
            f"{1e3 * spread:.1f} ms only, {1e3 * _WORST_S:g} are wanted; run longer, or with larger motions"
        )
    seen, fitted = _scaled(motions, round_trip, rate)
    clock, least, late, unsure = None, 0.0, np.empty(0), spread
    if way is not None:
        clock = measure_offset(way, round_trip)
        least = way.offset_ns / 1e9 + clock.offset_s  # of an observation
        # Seen at the first look after it arrived: half a look late on average.
        late = (recording.received_ns - way.arrival_ns(recording.time_ns))[known] / 1e9 + least - LOOK_NS / 2e9
        unsure = float(np.hypot(spread, clock.spread_s if clock.differs else 0.0))
    return Latency(
        np.maximum(late, 0), each - least, max(0.0, round_trip - least), spread, unsure, motions.times, seen, fitted,
        round_trip, clock,
    )  # fmt: skip


def measure_inference(server: str, count: int) -> tuple[Array, Array]:
    """Median round trip of a policy server over ``count`` requests, and its standard error (1,), (1,), in ms.

    Raises:
        ServerError: It is not reached, or refuses.
    """
    with PolicyClient(server, 2.0, name="calibrate") as client:
        spec = client.spec
        observation = {a.key: np.zeros((1, *a.shape), a.dtype) for a in spec.robot.observations}
        for array in spec.robot.observations:
            for start in array.quaternions:
                observation[array.key].reshape(-1)[start + 3] = 1
        took_s = np.empty(count)
        for i in range(count):
            began = time.perf_counter()
            client.infer(observation, chunk_noise(spec.noise_shape, i)[None])
            took_s[i] = time.perf_counter() - began
    return _ms(float(np.median(took_s))), _ms(float(took_s.std() / np.sqrt(count)))


def _motions(recording: Recording, times_ns: npt.NDArray[np.int64]) -> _Motions:
    """Readings around every command from rest whose step was held: the joints', else the gripper's along its direction."""
    robot = recording.robot
    scale = [float(m[1]) if (m := re.fullmatch(r"([\d.]+) m", unit)) else 0.0 for unit in robot.action_units]
    if np.count_nonzero(scale) != 3:
        raise DataError("the robot's actions have no three lengths to measure delays by")
    moved = recording.actions[:, np.flatnonzero(scale)] * np.array(scale)[np.flatnonzero(scale)]
    seen_s = (times_ns - recording.sent_ns[0]) / 1e9
    sent_s = (recording.sent_ns - recording.sent_ns[0]) / 1e9
    interval = float(np.median(np.diff(seen_s)))
    joints = JOINT_POSITION in recording.observations
    # Joints are read well enough to see them creep before; of a gripper's noisier readings a line is all that can be told.
    before, after, degree = (0.15, 0.05, 2) if joints else (0.08, 0.07, 1)
    before, after = max(before, 8 * interval), max(after, 5 * interval)
    times = np.arange(-_NEAR_S - before, _LONGEST_S + after + _NEAR_S, _STEP_S)
    readings = recording.observations[JOINT_POSITION if joints else "robot0_eef_pos"].astype(np.float64)
    rows, noises, traveled = [], [], []
    for first, end in bursts(recording):
        begin = first + 1
        goal = float(np.linalg.norm(moved[begin]))
        held = end - begin >= 3 and np.allclose(moved[begin : begin + 3], moved[begin], rtol=1e-3, atol=1e-5)
        if not held or goal < 1e-3:
            continue  # the safety filter changed the step, or it was not held long enough
        at = seen_s - sent_s[begin]
        near = (at > times[0] - 2 * interval) & (at < times[-1] + 2 * interval)
        still = near & (at < 0)
        if near.sum() < 8 or still.sum() < 5 or at[near][-1] < times[-1] - 2 * interval:
            continue
        own = readings[near] if joints else (readings[near] @ (moved[begin] / goal))[:, None]
        line = np.polyfit(at[still], own[at[near] < 0], 1)
        off = own - np.stack([np.polyval(c, at[near]) for c in line.T], axis=1)
        noises.append(np.sqrt(np.mean(off[at[near] < 0] ** 2)))
        traveled.append(np.abs(off).max())
        rows.append(np.stack([np.interp(times, at[near], column) for column in own.T], axis=1))
    if len(rows) < _LEAST_MOTIONS:
        raise DataError(f"{len(rows)} motions after a rest could be used, {_LEAST_MOTIONS} are needed; run longer")
    noise, far = float(np.median(noises)), float(np.median(traveled))
    if far < 5 * noise or far < 5e-4:
        unit = "mrad" if joints else "mm"
        raise DataError(
            f"the robot moves by {1e3 * far:.2f} {unit} within {1e3 * _LONGEST_S:g} ms of a command, against "
            f"{1e3 * noise:.2f} {unit} of noise; too little to tell when it begins: is it free to move?"
        )
    return _Motions(times, np.stack(rows), degree, before, after, min(1.0, _STEP_S / interval))


def _fit(motions: _Motions) -> tuple[float, float, Array]:
    """Delay, the rate at which the first acceleration decays, and each motion's own delay (B,)."""
    tried = np.arange(-0.02, _LONGEST_S, _STEP_S)
    gains = []
    for delay in tried:  # where a beginning explains most beyond readings that go on smoothly
        part = motions.around(delay, 0.1, 0.06)
        gains.append(np.sum(_cost(part, delay, None) - _cost(part, delay, _RATE_PER_S)))
    delay, off = float(tried[int(np.argmax(gains))]), np.arange(-_NEAR_S, _NEAR_S + _FINE_S / 2, _FINE_S)
    unlikely = (np.log(_RATES_PER_S / _RATE_PER_S) / _RATE_LOG_SPREAD) ** 2 / 2
    for _ in range(5):  # readings looked at are those around the delay, so that costs of other ones cannot be compared
        part = motions.around(delay)
        costs = np.array([[_cost(part, delay + o, rate) for o in off] for rate in _RATES_PER_S])
        i, j = np.unravel_index(np.argmin(costs.sum(axis=2) + unlikely[:, None]), costs.shape[:2])
        delay += float(off[j])
        if abs(off[j]) <= _FINE_S:
            break
    return delay, float(_RATES_PER_S[i]), np.asarray(delay - off[j] + off[np.argmin(costs[i], axis=0)])


def _cost(motions: _Motions, delay: float, rate: float | None) -> Array:
    """Minus the logarithm of each motion's likelihood (B,), its noise being its own; without a beginning if ``rate`` is None."""
    basis = _smooth(motions, delay)
    if rate is not None:
        basis = np.column_stack([basis, _beginning(motions.times - delay, rate)])
    q = np.linalg.qr(basis)[0]
    rows = motions.rows - motions.rows.mean(axis=1, keepdims=True)  # for precision; the basis has a constant
    # Squares (B,) that the basis doesn't explain.
    left = np.sum(rows**2, axis=(1, 2)) - np.sum(np.einsum("rk,brc->bkc", q, rows) ** 2, axis=(1, 2))
    return np.asarray(np.log(np.maximum(left, 1e-30)) * (motions.weight * motions.rows[0].size / 4))


def _smooth(motions: _Motions, delay: float) -> Array:
    return np.vander((motions.times - delay) / 0.1, motions.degree + 1)


def _beginning(time: Array, rate: float) -> Array:
    """Way of what is accelerated by 1 at time 0, and ever less at that rate (per second)."""
    time = np.maximum(time, 0)
    return np.asarray(time / rate - (1 - np.exp(-rate * time)) / rate**2)


def _scaled(motions: _Motions, delay: float, rate: float) -> tuple[Array, Array]:
    """Motions (B, R) along the way that they begin, less what went on, in units of it; and what is fitted (R,)."""
    part = motions.around(delay)
    columns = np.column_stack([_smooth(part, delay), _beginning(part.times - delay, rate)])
    found = np.einsum("kr,brc->bkc", np.linalg.pinv(columns), part.rows)
    smooth = np.einsum("rk,bkc->brc", _smooth(motions, delay), found[:, :-1])
    along = np.einsum("brc,bc->br", motions.rows - smooth, found[:, -1])
    scale = np.maximum(np.sum(found[:, -1] ** 2, axis=1), 1e-12)[:, None]
    return along / scale, _beginning(motions.times - delay, rate)
