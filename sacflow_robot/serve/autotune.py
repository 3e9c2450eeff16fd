"""Find the thread settings that answer one request soonest, by trying: it differs from network to network and machine to machine."""

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sacflow_robot.export.onnx_policy import Engine, OnnxPolicy
from sacflow_robot.utils.processes import core_count

_BUDGET_S = 1.0
_MOST_THREADS = 8
_GAIN = 0.9  # several threads have to be this much quicker than one, whose bits are the same on every machine
_CALLS = 5


class Trial(NamedTuple):
    """One engine that was tried.

    Attributes:
        engine: The engine.
        p50_us: Median of single evaluations (microseconds).
        p90_us: Their 90th percentile (microseconds).
    """

    engine: Engine
    p50_us: float
    p90_us: float


def candidates(cores: int) -> list[Engine]:
    """Engines worth trying on the CPU."""
    counts = [n for n in (2, 4, _MOST_THREADS) if n <= cores]
    return [Engine(), *(Engine(threads=n, spin=spin) for n in counts for spin in (False, True))]


def quickest(path: Path, budget_s: float = _BUDGET_S) -> tuple[OnnxPolicy, list[Trial]]:
    """The policy on the engine that answers single requests soonest, loading included in ``budget_s``.

    All engines are tried in turn, so that what else the machine does at that moment meets all of them.

    Raises:
        PolicyFileError: As :class:`OnnxPolicy`.
    """
    deadline = time.perf_counter() + budget_s
    policies: list[OnnxPolicy] = []
    for engine in candidates(core_count()):
        policies.append(OnnxPolicy(path, engine))
        if time.perf_counter() > deadline - budget_s / 2:
            break
    times: list[list[int]] = [[] for _ in policies]
    inputs = policies[0].blank_inputs(1)
    while not times[0] or time.perf_counter() < deadline:
        for policy, own in zip(policies, times, strict=True):
            policy.run(inputs)
            for _ in range(_CALLS):
                began = time.perf_counter_ns()
                policy.run(inputs)
                own.append(time.perf_counter_ns() - began)
    trials = [
        Trial(policy.engine, *(round(float(v) / 1e3, 1) for v in np.percentile(own, [50, 90])))
        for policy, own in zip(policies, times, strict=True)
    ]
    best = min(range(len(trials)), key=lambda i: trials[i].p50_us)
    if trials[best].p50_us > _GAIN * trials[0].p50_us:
        best = 0
    return policies[best], trials
