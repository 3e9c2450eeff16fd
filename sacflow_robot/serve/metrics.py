"""Counters of the server, for Prometheus and for ``sacflow-robot top``, and its log, for people and for programs."""

import json
import logging
import sys
import threading
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

_RECENT = 2048
_PHASES = "queue", "infer", "total"
_SECONDS = (50e-6, 1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.5)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_COUNTERS = {
    "requests": "Requests answered with actions",
    "late": "Requests answered 'late'",
    "dropped": "Answers that a slow or dead client did not take",
}
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class _Histogram:
    """Observations by size, as Prometheus counts them; one thread writes, others read.

    prometheus_client's own takes a lock and sums up floats behind it: ten times as long, on each phase of every request.
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


class Meters:
    """Counters and histograms of one server; the loop writes, any thread may read. A collector of Prometheus' registry.

    Attributes:
        last_reload: What came of the last new policy file; None before one.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.last_reload: dict[str, Any] | None = None
        self._phases = {name: _Histogram(_SECONDS) for name in _PHASES}
        self._rows = _Histogram(_BATCHES)
        self._refused: Counter[str] = Counter()
        self._clients = 0
        self._policy: tuple[str, str] | None = None
        self._recent: deque[tuple[int, int, int]] = deque(maxlen=_RECENT)
        self._http: tuple[Any, threading.Thread] | None = None

    def collect(self) -> Iterator[prometheus.Metric]:
        latency = HistogramMetricFamily(
            "sacflow_latency_seconds", "Time of a request in the server, by phase", labels=["phase"]
        )
        for name, histogram in self._phases.items():
            latency.add_metric([name], *histogram.read())
        yield latency
        rows = HistogramMetricFamily("sacflow_batch_rows", "Rows evaluated together")
        rows.add_metric([], *self._rows.read())
        yield rows
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"sacflow_{name}", text, self.counts[name])
        refused = CounterMetricFamily("sacflow_refused", "Requests refused, by kind", labels=["kind"])
        for kind, count in self._refused.copy().items():
            refused.add_metric([kind], count)
        yield refused
        reloads = CounterMetricFamily("sacflow_reloads", "Policy files taken over or refused", labels=["result"])
        for result in ("taken", "refused"):
            if count := self.counts[f"reloads_{result}"]:
                reloads.add_metric([result], count)
        yield reloads
        yield GaugeMetricFamily("sacflow_clients", "Clients heard from in the last five seconds", self._clients)
        policy = GaugeMetricFamily(
            "sacflow_policy_info", "1 for the policy being served", labels=["version", "velocity"]
        )
        if self._policy is not None:
            policy.add_metric(self._policy, 1)
        yield policy

    def evaluated(self, rows: int, answered: Sequence[tuple[int, int, int]]) -> None:
        """One call of the network, and for each request answered with it queue, infer and total (ns)."""
        self.counts["requests"] += len(answered)
        self._recent.extend(answered)
        self._rows.observe(rows)
        for times in answered:
            for phase, ns in zip(self._phases.values(), times, strict=True):
                phase.observe(ns * 1e-9)

    def refused(self, kind: str) -> None:
        """One request was refused, or answered ``late``."""
        if kind == "late":
            self.counts["late"] += 1
        else:
            self.counts["refused"] += 1
            self._refused[kind] += 1

    def dropped(self, answers: int = 1) -> None:
        """So many answers could not be delivered."""
        self.counts["dropped"] += answers

    def reloaded(self, result: str, details: Mapping[str, Any]) -> None:
        """A policy file was ``"taken"`` over or ``"refused"``; how far it differs from the one before, or why."""
        self.last_reload = {"result": result, **details}
        self.counts[f"reloads_{result}"] += 1

    def clients(self, count: int) -> None:
        self._clients = count

    def serves(self, version: str, velocity: str) -> None:
        self._policy = version, velocity

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
            OSError: The address cannot be bound.
        """
        registry = prometheus.CollectorRegistry()
        registry.register(self)
        server, thread = prometheus.start_http_server(port, host, registry)
        self._http = server, thread
        return int(server.server_port)

    def close(self) -> None:
        if self._http is not None:
            server, thread = self._http
            server.shutdown()
            server.server_close()
            thread.join()
            self._http = None


class StructuredFormatter(logging.Formatter):
    """Message and fields (``extra``) of a record: one JSON object a line, or text with ``field=value`` after the message."""

    def __init__(self, as_json: bool) -> None:
        super().__init__(datefmt="%Y-%m-%dT%H:%M:%S%z")
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {k: v for k, v in vars(record).items() if k not in _STANDARD}
        message = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            fields["exception"] = self.formatException(record.exc_info)
        if self._as_json:
            line = {"time": self.formatTime(record, self.datefmt), "level": record.levelname.lower(), "event": message}
            return json.dumps({**line, **fields}, default=str)
        text = " ".join([message, *(f"{name}={value}" for name, value in fields.items())])
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def set_up_logging(as_json: bool) -> None:
    """Write this package's log to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(StructuredFormatter(as_json))
    logger = logging.getLogger("sacflow_robot")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
