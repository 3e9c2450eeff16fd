"""Updates per second of each algorithm and velocity, at the sizes published for offline-to-online training, beside upper bounds
by the machine's arithmetic, its memory, and on a GPU its kernel launches.

Counted is what no fusion saves: the matrix products, each with its operands read and its result written once, and what the
optimizers and running averages read and write. Measured are the machine's rates: a large matrix product, a large copy, and
the smallest kernel in a CUDA graph. The lowest of the limits is what a measured rate can be held against.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
import timeit
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

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

_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices
_COPIED = {"cpu": 2**26, "cuda": 2**29}  # float32, far beyond any cache
_LAUNCHES = 2000
_TURNS = 5


def published(algo: str, velocity: str, **changes: Any) -> TrainConfig:
    """Lift at the published sizes: batch 256, D = 35, critics 2 x 512^4; every update is of critic and policy."""
    config = preset("lift", "flow-g" if velocity == "gaussian" else velocity, algo, from_scratch=False, full=True)
    learner = replace(config.learner, policy_delay=1, num_critics=2)
    return replace(config, learner=learner, **changes)


def measure(config: TrainConfig, velocity: str, repeats: int, seconds: float, threads: int) -> dict[str, Any]:
    """Measure one case in a process of its own, whose peak memory (``peak_mb``, or on a GPU what was allocated there) is the
    case's.

    ``updates_per_s`` is of critic and policy, the median of the repeats, drawing the batch included; ``precision`` that of the
    products, weights are float32 throughout; ``first_s`` what the first update took: compiling, unless it is cached;
    ``percent_of_limit`` of the updates per second that ``limit`` allows; ``note`` why it did not compute as was asked for.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure, (config, velocity, repeats, seconds, threads))


def _measure(config: TrainConfig, velocity: str, repeats: int, seconds: float, threads: int) -> dict[str, Any]:
    import numpy as np

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
    limit, allowed = lowest_limit(count_work(eager, update, 1, device), measure_rates(device, precision))
    return {
        "algo": config.algo,
        "velocity": velocity,
        "device": torch.cuda.get_device_name(device) if gpu else f"cpu, {threads} threads",
        "precision": precision,
        "compiled": agent.compute.compiled,
        "updates_per_s": round(rate, 2),
        "peak_mb": round(peak / 1e6),
        "first_s": round(first, 1),
        "limit": limit,
        "percent_of_limit": round(100 * rate / allowed, 1),
        "note": agent.compute.note,
    }


def _peak_memory() -> int:
    """Most memory that this process has held (bytes).

    Linux's ``ru_maxrss`` begins with what the parent held when it started this process; VmHWM does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Load(NamedTuple):
    """Floating-point operations of products, bytes to move and kernels launched (None: no GPU): those of one update, or those
    that a machine gets through in a second."""

    operations: float
    bytes: float
    kernels: float | None


def lowest_limit(work: Load, rates: Load) -> tuple[str, float]:
    """The limit that is met first, ``arithmetic``, ``memory`` or ``launches``, and the updates a second that it allows."""
    names = "arithmetic", "memory", "launches"
    limits = {name: rate / cost for name, cost, rate in zip(names, work, rates, strict=True) if cost and rate}
    return min(limits.items(), key=lambda limit: limit[1])


def count_work(eager: Callable[[], object], fast: Callable[[], object], updates: int, device: torch.device) -> Load:
    """Cost of an update, averaged over so many, a multiple of the policy's delay.

    Products and optimizer steps are counted of the ``eager`` update; kernels, on a GPU, of the ``fast`` one, as measured.
    """
    traffic = _Traffic()
    with FlopCounterMode(display=False) as operations, traffic:
        for _ in range(updates):
            eager()
    kernels = _count_kernels(fast, updates) / updates if device.type == "cuda" else None
    return Load(operations.get_total_flops() / updates, traffic.bytes / updates, kernels)


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of products, optimizer steps and running averages."""

    # Operation, and which of its arguments it writes in place: of Adam the weights and both moments.
    _COUNTED: ClassVar[dict[str, tuple[int, ...]]] = {
        **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), ()),
        "_fused_adam_": (0, 2, 3),
        "_foreach_lerp_": (0,),
    }

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in self._COUNTED:
            self.bytes += _size(args) + _size(kwargs) + _size(result) + sum(_size(args[i]) for i in self._COUNTED[name])
        return result


def _size(values: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(values) if isinstance(x, torch.Tensor))


def _count_kernels(update: Callable[[], object], updates: int) -> float:
    from torch.autograd import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(updates):
            update()
        torch.cuda.synchronize()
    return len([event for event in trace.events() if event.device_type == DeviceType.CUDA])


def measure_rates(device: torch.device, precision: str) -> Load:
    """The machine's rates, of products in ``float32`` or ``bfloat16``, with as many threads as torch has; some seconds."""
    side, copied = _SIDE[device.type], _COPIED[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=getattr(torch, precision)) for _ in range(2))
    product = torch.empty_like(left)
    operations = 2 * side**3 / _shortest(lambda: torch.mm(left, right, out=product), device)
    source, copy = torch.zeros(copied, device=device), torch.zeros(copied, device=device)
    moved = 2 * 4 * copied / _shortest(lambda: copy.copy_(source), device)
    return Load(operations, moved, _launch_rate(device) if device.type == "cuda" else None)


def _launch_rate(device: torch.device) -> float:
    """The smallest kernels that a CUDA graph gets through in a second, one after the other."""
    x, graph = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
    x.add_(1)
    with torch.cuda.graph(graph):
        for _ in range(_LAUNCHES):
            x.add_(1)
    return _LAUNCHES / _shortest(graph.replay, device)


def _shortest(call: Callable[[], object], device: torch.device) -> float:
    """The shortest of several turns (s), the first of which does not count."""

    def turn() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return min(timeit.repeat(turn, number=1, repeat=_TURNS + 1)[1:])
