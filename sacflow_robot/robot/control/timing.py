"""How well a control loop kept time."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_BINS = 8


@dataclass(frozen=True)
class LoopTiming:
    """When a loop's commands were sent.

    Attributes:
        period_ns: What the time from one to the next should be.
        sent_ns: When they were sent (T,).
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
        """How far periods were off, as lines of text."""
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
