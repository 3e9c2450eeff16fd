"""A control loop's deadlines, and how well it kept them."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sacflow_robot.interfaces import Clock
from sacflow_robot.robot.safety.filter import LEAST_SPACING

_BINS = 8
_PHASE_LAG = 0.1  # a command later than this share of its period skips the next deadline
_LEAST_PHASE_LAG_NS = 500_000


@dataclass(frozen=True)
class LoopTiming:
    """Times at which a loop's commands were sent.

    Attributes:
        period_ns: Control period (ns).
        sent_ns: When they were sent (T,), in nanoseconds.
        missed: Deadlines that passed while the loop was busy with something else.
    """

    period_ns: int
    sent_ns: npt.NDArray[np.int64]
    missed: int

    @property
    def periods_us(self) -> npt.NDArray[np.float64]:
        """Times from each command to the next (T - 1,), in microseconds."""
        return np.asarray(np.diff(self.sent_ns) / 1e3)

    def row(self) -> dict[str, float | int]:
        """Percentiles of the period, in microseconds, and deadlines missed."""
        periods = self.periods_us
        if not len(periods):
            periods = np.array([self.period_ns / 1e3])
        p50, p99, p999, most = np.percentile(periods, [50, 99, 99.9, 100])
        return {
            "hz": round(1e9 / self.period_ns, 3),
            "period_p50_us": round(float(p50), 1),
            "period_p99_us": round(float(p99), 1),
            "period_p999_us": round(float(p999), 1),
            "period_max_us": round(float(most), 1),
            "missed": self.missed,
        }

    def histogram(self) -> str:
        """Deviations of the periods, as lines of text."""
        off = np.abs(self.periods_us - self.period_ns / 1e3)
        edges = [0, 20, 50, 100, 200, 500, 1000, 5000, np.inf]
        counts = np.histogram(off, edges)[0]
        width = max(1, int(counts.max(initial=1)))
        lines = []
        for low, high, count in zip(edges[:_BINS], edges[1:], counts, strict=True):
            label = f"over {low:g} us" if np.isinf(high) else f"{low:g} to {high:g} us"
            bar = "█" * max(round(40 * count / width), int(count > 0))
            lines.append(f"  {label:>15} {count:>8,} {bar}".rstrip())
        row = self.row()
        head = (
            f"{len(off) + 1:,} commands, every {self.period_ns / 1e6:g} ms: period p50 {row['period_p50_us'] / 1e3:.3f}"
        )
        tail = f"p99 {row['period_p99_us'] / 1e3:.3f}, max {row['period_max_us'] / 1e3:.3f} ms, {self.missed} deadlines missed"
        return "\n".join([f"{head}, {tail}; how far periods were off:", *lines])


def joined(timings: Sequence[LoopTiming]) -> LoopTiming:
    """One timing of several episodes; the time between them is left out."""
    parts, offset = [], 0
    for timing in timings:
        if len(timing.sent_ns):
            parts.append(timing.sent_ns - timing.sent_ns[0] + offset)
            offset = int(parts[-1][-1]) + timing.period_ns
    sent = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    return LoopTiming(timings[0].period_ns, sent, sum(t.missed for t in timings))


class Pacer:
    """Deadlines of a robot that moves on its own time; they do not drift. A robot in lockstep waits for none.

    After a late command, the next deadline is the first one that leaves the robot its whole period: nothing is sent in haste,
    so that limits hold over wall time.

    Attributes:
        deadline_ns: When the next command is due (ns).
        sent_ns: When commands were sent (ns).
        missed: Deadlines at which nothing was sent.
    """

    def __init__(self, clock: Clock, period_ns: int, lockstep: bool) -> None:
        self._clock = clock
        self._period_ns = period_ns
        self._lockstep = lockstep
        self.deadline_ns = 0
        self.sent_ns: list[int] = []
        self.missed = 0

    def begin(self, now_ns: int) -> None:
        """Set the first deadline: now."""
        self.deadline_ns = now_ns

    def wait_for_spacing(self, earliest_ns: int) -> None:
        """Wait until the command before has had its period, less what a clock and a scheduler are off.

        Args:
            earliest_ns: When the filter lets the robot move again, after a command of the last episode, too.
        """
        if not self._lockstep:
            self._clock.sleep_until(max(self._own_earliest_ns, earliest_ns))

    def wait_for_deadline(self) -> None:
        """Wait until the next deadline that has not passed and leaves the last command its period.

        A command that was a little late (a scheduler's jitter) takes the deadline after it a little late as well, by less and
        less; one that was later skips it, or two commands would move the robot within one period.
        """
        if self._lockstep:
            return
        lag_ns = max(round(_PHASE_LAG * self._period_ns), min(_LEAST_PHASE_LAG_NS, self._period_ns // 4))
        self.deadline_ns += self._period_ns
        behind_ns = max(self._clock.now_ns(), self._own_earliest_ns - lag_ns) - self.deadline_ns
        if behind_ns > 0:
            skipped = -(-behind_ns // self._period_ns)
            self.missed += skipped
            self.deadline_ns += skipped * self._period_ns
        self._clock.sleep_until(self.deadline_ns)

    @property
    def timing(self) -> LoopTiming:
        return LoopTiming(self._period_ns, np.array(self.sent_ns, np.int64), self.missed)

    @property
    def _own_earliest_ns(self) -> int:
        return self.sent_ns[-1] + round(LEAST_SPACING * self._period_ns) if self.sent_ns else 0


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect now, and not again before the end: the collector would stop the loop at a moment of its own choosing."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
