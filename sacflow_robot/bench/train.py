"""Updates per second of each algorithm and velocity, at the sizes published for offline-to-online training."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.presets import preset

if TYPE_CHECKING:
    from sacflow_robot.learn.algorithms.agent import Agent

CASES = (
    ("sac-flow", "flow-g"),
    ("sac-flow", "flow-t"),
    ("sac-flow", "flow-l"),
    ("sac-flow", "mlp"),
    ("bc", "flow-g"),
    ("qc-fql", "mlp"),
    ("qc", "flow-g"),
    ("rlpd", "gaussian"),
    ("sac", "gaussian"),
)
"""(algorithm, velocity)."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        algo: Algorithm.
        velocity: Velocity of its flow.
        device: What computed.
        precision: Of the products; weights are float32 throughout.
        compiled: Whether the update was compiled.
        updates_per_s: Updates of critic and policy a second, the median of the repeats; drawing the batch included.
        peak_mb: Largest memory of the process, or on a GPU what was allocated there (MB).
        first_s: Seconds that the first update took: compiling, unless it is cached.
        limit: What the machine would run into first: arithmetic, memory or launches (bench/limits.py).
        percent_of_limit: Of the updates per second that this allows, those made.
        note: Why it did not compute as was asked for; empty if it did.
    """

    algo: str
    velocity: str
    device: str
    precision: str
    compiled: bool
    updates_per_s: float
    peak_mb: float
    first_s: float
    limit: str
    percent_of_limit: float
    note: str


def published(algo: str, velocity: str, **changes: Any) -> TrainConfig:
    """Lift at the published sizes: batch 256, D = 35, critics 2 x 512^4; every update is of critic and policy."""
    config = preset("lift", "flow-g" if velocity == "gaussian" else velocity, algo, from_scratch=False, full=True)
    learner = replace(config.learner, policy_delay=1, num_critics=2)
    return replace(config, learner=learner, **changes)


def measure(config: TrainConfig, velocity: str, repeats: int, seconds: float, threads: int) -> Row:
    """Measure one case in a process of its own, whose peak memory is the case's."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure, (config, velocity, repeats, seconds, threads))


def _measure(config: TrainConfig, velocity: str, repeats: int, seconds: float, threads: int) -> Row:
    import numpy as np
    import torch

    from sacflow_robot.bench.limits import count_work, lowest_limit, measure_rates
    from sacflow_robot.bench.replay_buffer import made_up_episodes
    from sacflow_robot.data.replay_buffer import ReplayBuffer
    from sacflow_robot.envs.registry import get_robot
    from sacflow_robot.learn.algorithms.registry import make_agent
    from sacflow_robot.learn.compile import pick_device

    torch.set_num_threads(threads)
    device = pick_device(config.device)
    robot = get_robot(config.env)
    buffer = ReplayBuffer(robot, config.chunk_length, config.learner.discount, 20_000)
    for episode in made_up_episodes(robot, 20_000):
        buffer.append(episode)
    rng = np.random.default_rng(0)

    def update_of(config: TrainConfig) -> tuple[Agent, Callable[[], object]]:
        agent = make_agent(robot, config, device)
        agent.fit_normalizer(buffer.observations())
        return agent, lambda: agent.update_online(buffer.sample(config.learner.batch_size, rng))

    agent, update = update_of(config)

    def run(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            update()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    first = run(1)
    run(3)
    count = max(1, round(seconds / run(1)))
    rates = [count / run(count) for _ in range(repeats)]
    gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if gpu else _peak_memory()
    rate, precision = statistics.median(rates), agent.compute.precision
    eager = update_of(replace(config, compile="off", precision=precision))[1]
    limit = lowest_limit(count_work(eager, update, 1, device), measure_rates(device, precision))
    return Row(
        algo=config.algo,
        velocity=velocity,
        device=torch.cuda.get_device_name(device) if gpu else f"cpu, {threads} threads",
        precision=precision,
        compiled=agent.compute.compiled,
        updates_per_s=round(rate, 2),
        peak_mb=round(peak / 1e6),
        first_s=round(first, 1),
        limit=limit.name,
        percent_of_limit=round(100 * rate / limit.updates_per_s, 1),
        note=agent.compute.note,
    )


def _peak_memory() -> int:
    """Most memory that this process has held (bytes).

    Linux's ``ru_maxrss`` begins with what the parent held when it started this process; VmHWM does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
