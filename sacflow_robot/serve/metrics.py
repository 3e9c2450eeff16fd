"""Counters of the server: for Prometheus, and for ``sacflow-robot top``."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import prometheus_client as prometheus
from prometheus_client.core import HistogramMetricFamily

_RECENT = 2048
_PHASES = "queue", "infer", "total"
_SECONDS = (50e-6, 1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.5)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class _Histogram:
    """Observations by size, as Prometheus counts them; one thread writes, others read.

    prometheus_client's own takes a lock and sums up floats behind it: ten times as long, on each phase of every request.

    Args:
        bounds: Upper bounds, rising.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by bound, and the sum."""
        names = [*(f"{float(bound)}" for bound in self._bounds), "+Inf"]
        return list(zip(names, accumulate(self._counts), strict=True)), self._sum


class _Histograms:
    """Collect the counters for Prometheus' registry."""

    def __init__(self, phases: Mapping[str, _Histogram], rows: _Histogram) -> None:
        self._phases, self._rows = phases, rows

    def collect(self) -> Iterator[prometheus.Metric]:
        latency = HistogramMetricFamily(
            *("sacflow_latency_seconds", "Time of a request in the server, by phase"), labels=["phase"]
        )
        for name, histogram in self._phases.items():
            latency.add_metric([name], *histogram.read())
        yield latency
        rows = HistogramMetricFamily("sacflow_batch_rows", "Rows evaluated together")
        rows.add_metric([], *self._rows.read())
        yield rows


class Meters:
    """Counters and histograms of one server; the loop writes, whoever likes reads."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        self._phases = {name: _Histogram(_SECONDS) for name in _PHASES}
        self._rows = _Histogram(_BATCHES)
        self.registry.register(_Histograms(self._phases, self._rows))
        self._answered = self._counter("sacflow_requests", "Requests answered with actions")
        self._late = self._counter("sacflow_late", "Requests answered 'late'")
        self._dropped = self._counter("sacflow_dropped", "Answers that a slow or dead client did not take")
        self._refused = prometheus.Counter(
            *("sacflow_refused", "Requests refused, by kind", ["kind"]), registry=self.registry
        )
        self._reloads = prometheus.Counter(
            *("sacflow_reloads", "Policy files taken over or refused", ["result"]), registry=self.registry
        )
        self._clients = prometheus.Gauge(
            *("sacflow_clients", "Clients heard from in the last five seconds"), registry=self.registry
        )
        self._policy = prometheus.Gauge(
            *("sacflow_policy_info", "1 for the policy being served", ["version", "velocity"]), registry=self.registry
        )
        self._recent: deque[tuple[int, int, int]] = deque(maxlen=_RECENT)
        self.counts: Counter[str] = Counter()
        self.last_reload: dict[str, Any] | None = None
        self._http: tuple[Any, threading.Thread] | None = None

    def evaluated(self, rows: int, answered: Sequence[tuple[int, int, int]]) -> None:
        """One call of the network, and for each request answered with it queue, infer and total (ns)."""
        self.counts["requests"] += len(answered)
        self._answered.inc(len(answered))
        self._recent.extend(answered)
        self._rows.observe(rows)
        for times in answered:
            for phase, ns in zip(self._phases.values(), times, strict=True):
                phase.observe(ns * 1e-9)

    def late(self) -> None:
        """One request was answered ``late``."""
        self.counts["late"] += 1
        self._late.inc()

    def refused(self, kind: str) -> None:
        """One request was refused."""
        self.counts["refused"] += 1
        self._refused.labels(kind).inc()

    def dropped(self) -> None:
        """One answer could not be delivered."""
        self.counts["dropped"] += 1
        self._dropped.inc()

    def reloaded(self, result: str, details: Mapping[str, Any]) -> None:
        """A policy file was ``"taken"`` over or ``"refused"``; how far it differs from the one before, or why."""
        self.last_reload = {"result": result, **details}
        self.counts[f"reloads_{result}"] += 1
        self._reloads.labels(result).inc()

    def clients(self, count: int) -> None:
        """So many clients are there."""
        self._clients.set(count)

    def serves(self, version: str, velocity: str) -> None:
        """This policy is served from now on."""
        self._policy.clear()
        self._policy.labels(version, velocity).set(1)

    def snapshot(self) -> dict[str, Any]:
        """Counts since the start, and p50, p99 of each phase (microseconds) over the last requests."""
        recent = np.array(self._recent, np.float64).reshape(-1, len(_PHASES)) / 1e3
        latency = {}
        for name, column in zip(_PHASES, recent.T, strict=True):
            p50, p99 = np.percentile(column, [50, 99]) if len(column) else (0.0, 0.0)
            latency[name] = {"p50": round(float(p50), 1), "p99": round(float(p99), 1)}
        names = "requests", "late", "refused", "dropped", "reloads_taken", "reloads_refused"
        return {**{name: self.counts[name] for name in names}, "latency_us": latency, "last_reload": self.last_reload}

    def expose(self, host: str, port: int) -> int:
        """Answer Prometheus at ``http://host:port/metrics``; returns the port, chosen where 0 was given.

        Raises:
            OSError: The address cannot be had.
        """
        server, thread = prometheus.start_http_server(port, host, self.registry)
        self._http = server, thread
        return int(server.server_port)

    def close(self) -> None:
        """Stop answering Prometheus."""
        if self._http is not None:
            server, thread = self._http
            server.shutdown()
            server.server_close()
            thread.join()
            self._http = None

    def _counter(self, name: str, text: str) -> prometheus.Counter:
        return prometheus.Counter(name, text, registry=self.registry)
