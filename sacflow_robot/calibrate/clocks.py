"""Offset of the robot's clock from the control loop's, from messages in both directions, as NTP finds it.

An observation carries when it was captured by the robot's clock and when it arrived by the loop's; a command when it was sent by
the loop's and, by the motion that it begins, when it was acted on by the robot's. Their fastest ways bound the offset from both
sides. Where between the bounds it is, no exchange of messages can tell: half the round trip is the most it may be off.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sacflow_robot.calibrate.recording import AHEAD_NS, LATEST_NS, Recording, is_other_clock
from sacflow_robot.errors import DataError
from sacflow_robot.spec import Array

_LEAST_ROWS, _PIECES, _PER_PIECE = 50, 20, 10
_TOLERANCE_S = AHEAD_NS / 1e9  # commands are rounded to the robot's cycle, motions' beginnings told to a millisecond
_JUMP_S, _JUMP_SPREADS = 0.005, 8.0
_LEAST_DRIFT_PPM, _MOST_DRIFT_PPM = 2.0, 1000.0  # crystals differ by tens; computers' clocks by no more


@dataclass(frozen=True)
class Fastest:
    """The fastest observations' way from the robot's clock to the loop's, as a line over the run."""

    begin_ns: int  # stamp at which the line begins
    offset_ns: int  # what to add to a stamp for the time by the loop's clock at which it would have arrived at best
    drift_ppm: float  # by how much the robot's clock runs fast
    spread_ppm: float  # standard error of that
    pieces: Array  # when the pieces of the run were (P,), s after ``begin_ns``
    least_s: Array  # fastest observation of each (P,), arrival less stamp, from the fastest of all (s)

    def arrival_ns(self, stamps_ns: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Stamps (M,) by the loop's clock, as if nothing took longer than the fastest observation."""
        gained = np.round((stamps_ns - self.begin_ns) * (1e-6 * self.drift_ppm)).astype(np.int64)
        return np.asarray(stamps_ns + self.offset_ns - gained)


@dataclass(frozen=True)
class ClockOffset:
    """The robot's clock minus the control loop's, when the run began."""

    way: Fastest
    differs: bool  # whether it cannot be the loop's clock
    offset_s: float  # middle of the bounds where the clocks differ; 0 where they need not
    low_s: float  # bounds: neither way takes less than no time
    high_s: float  # likewise

    @property
    def spread_s(self) -> float:
        """One standard deviation of an offset that may be anywhere between the bounds alike."""
        return (self.high_s - self.low_s) / 12**0.5

    def by_loop(self, recording: Recording) -> Recording:
        """The recording with its capture times by the control loop's clock."""
        if not self.differs:
            return recording
        least_ns = self.way.offset_ns + round(1e9 * self.offset_s)
        return replace(recording, time_ns=self.way.arrival_ns(recording.time_ns) - least_ns)

    def words(self) -> str:
        """The result in words."""
        between = f"between {1e3 * self.low_s:.1f} and {1e3 * self.high_s:.1f} ms"
        drift = f"; it drifts by {self.way.drift_ppm:.1f} ± {self.way.spread_ppm:.1f} ppm" if self.way.drift_ppm else ""
        if self.differs:
            later = f" ({abs(self.way.drift_ppm) * 3.6:.0f} ms an hour: have both machines keep time)" if drift else ""
            return (
                f"the robot's clock is not the control loop's: it is ahead by {between}{drift}{later}; the two delays add up to "
                "what is measured, but each alone is unknown without a common clock"
            )
        return f"the robot's stamps fit the control loop's clock; an offset {between} would not show{drift}"


def by_arrival_ns(recording: Recording) -> npt.NDArray[np.int64]:
    """Capture times (M,) by the control loop's clock; where they are by another, as if the fastest observation took no time."""
    known = recording.received_ns >= 0
    late_ns = (recording.received_ns - recording.time_ns)[known]
    if not known.any() or not is_other_clock(int(late_ns.min())):
        return recording.time_ns
    return fastest_way(recording.time_ns[known], recording.received_ns[known]).arrival_ns(recording.time_ns)


def fastest_way(stamps_ns: npt.NDArray[np.int64], received_ns: npt.NDArray[np.int64]) -> Fastest:
    """The lower edge of how late observations arrive, by stamps (M,) and arrivals (M,) of those whose arrival is known.

    Raises:
        DataError: They are too few, or the robot's clock was set during the run, or does not count nanoseconds.
    """
    if len(stamps_ns) < _LEAST_ROWS:
        raise DataError(
            f"{len(stamps_ns)} observations with times of capture and arrival are too few to compare two clocks by; "
            f"{_LEAST_ROWS} are needed"
        )
    begin, late_ns = int(stamps_ns[0]), received_ns - stamps_ns
    seconds, least_ns = (stamps_ns - begin) / 1e9, int(late_ns.min())
    late = (late_ns - least_ns) / 1e9
    parts = np.array_split(np.arange(len(late)), min(_PIECES, len(late) // _PER_PIECE))
    best = [part[np.argmin(late[part])] for part in parts]
    at, least = seconds[best], late[best]
    slope, _ = np.polyfit(at, least, 1)
    if abs(slope) > 1e-6 * _MOST_DRIFT_PPM and np.ptp(np.diff(least)) < 0.5 * np.ptp(least):
        raise DataError(
            f"the robot's clock gains {-1e6 * slope:.0f} ppm on the control loop's, at most {_MOST_DRIFT_PPM:g} are "
            "believed: do the driver's times count nanoseconds?"
        )
    _refuse_jump(at, least)
    around = least - np.polyval(np.polyfit(at, least, 1), at)
    spread = float(np.sqrt(np.sum(around**2) / max(1, len(at) - 2) / np.sum((at - at.mean()) ** 2)))
    # A line through the pieces' fastest lies above some of them; the fastest of all is the edge.
    drift = -1e6 * float(slope) if abs(slope) > max(3 * spread, 1e-6 * _LEAST_DRIFT_PPM) else 0.0
    edge = int((late_ns + (stamps_ns - begin) * (1e-6 * drift)).min())
    return Fastest(begin, edge, drift, 1e6 * spread, at, least)


def _refuse_jump(at: Array, least: Array) -> None:
    steps = np.diff(least)
    usual = 1.4826 * float(np.median(np.abs(steps - np.median(steps))))
    worst = int(np.argmax(np.abs(steps - np.median(steps))))
    off = float(steps[worst] - np.median(steps))
    stays = abs(float(np.median(least[worst + 1 :]) - np.median(least[: worst + 1]))) > 0.5 * abs(off)
    if abs(off) > max(_JUMP_S, _JUMP_SPREADS * usual) and stays:
        raise DataError(
            f"one of the two clocks was set by {1e3 * abs(off):.0f} ms some {at[worst]:.0f} s into the run, or the network's "
            "way changed; measure again, with both machines' clocks left alone"
        )


def measure_offset(way: Fastest, round_trip_s: float) -> ClockOffset:
    """Bounds on the robot's clock from the fastest observation and the round trip.

    Args:
        round_trip_s: From sending a command, to the robot acting on it, to the earliest that could be seen in the loop.
    """
    here_s = way.offset_ns / 1e9
    low, high = -here_s, round_trip_s - here_s
    differs = not low - _TOLERANCE_S <= 0 <= high + _TOLERANCE_S or way.offset_ns > LATEST_NS
    return ClockOffset(way, differs, (low + high) / 2 if differs else 0.0, low, high)
