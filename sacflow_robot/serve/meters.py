"""What the server counts: for Prometheus, and for ``sacflow-robot top``."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import prometheus_client as prometheus

_RECENT = 2048
_PENDING = 256
_PHASES = "queue", "infer", "total"
_SECONDS = (50e-6, 1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.5)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class _Registry(prometheus.CollectorRegistry):
    """One that has everything counted before it is read."""

    def __init__(self, flush: Callable[[], None]) -> None:
        super().__init__()
        self._flush = flush

    def collect(self) -> Iterator[prometheus.Metric]:
        self._flush()
        yield from super().collect()


class Meters:
    """Counters and histograms of one server; the loop writes, whoever likes reads."""

    def __init__(self) -> None:
        self.registry = _Registry(self.flush)
        self._latency = prometheus.Histogram(
            *("sacflow_latency_seconds", "Time of a request in the server, by phase", ["phase"]),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._phases = [self._latency.labels(phase) for phase in _PHASES]
        self._batch = prometheus.Histogram(
            *("sacflow_batch_rows", "Rows evaluated together"), buckets=_BATCHES, registry=self.registry
        )
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
        self._pending: deque[tuple[int, Sequence[tuple[int, int, int]]]] = deque()
        self.counts: Counter[str] = Counter()
        self.last_reload: dict[str, Any] | None = None
        self._http: tuple[Any, threading.Thread] | None = None

    def evaluated(self, rows: int, answered: Sequence[tuple[int, int, int]]) -> None:
        """One call of the network, and for each request answered with it queue, infer and total (ns).

        Kept until :meth:`flush`: counting right away would push what the next request needs out of the processor's caches.
        """
        self.counts["requests"] += len(answered)
        self._recent.extend(answered)
        self._pending.append((rows, answered))
        if len(self._pending) >= _PENDING:
            self.flush()

    def flush(self) -> None:
        """Put into Prometheus' histograms what is not there yet; from any thread."""
        while True:
            try:
                rows, answered = self._pending.popleft()
            except IndexError:
                return
            self._batch.observe(rows)
            self._answered.inc(len(answered))
            for times in answered:
                for phase, ns in zip(self._phases, times, strict=True):
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
