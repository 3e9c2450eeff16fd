"""Upper bounds on updates per second: by the machine's arithmetic, its memory, and on a GPU its kernel launches.

Counted is what no fusion saves: the matrix products, each with its operands read and its result written once, and what the
optimizers and running averages read and write. Measured are the machine's rates: a large matrix product, a large copy, and
the smallest kernel in a CUDA graph. The lowest of the limits is what a measured rate can be held against.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices
_COPIED = {"cpu": 2**26, "cuda": 2**29}  # float32, far beyond any cache
_LAUNCHES = 2000
_TURNS = 5


class Work(NamedTuple):
    """Cost of one update: floating-point operations of its products, bytes to move, kernels launched (None: no GPU)."""

    operations: float
    bytes: float
    kernels: float | None


class Rates(NamedTuple):
    """Rates of a machine per second: operations in products, bytes copied (read and written), kernels (None: no GPU)."""

    operations: float
    bytes: float
    kernels: float | None


class Limit(NamedTuple):
    """The lowest limit: ``arithmetic``, ``memory`` or ``launches``, and the updates a second that it allows."""

    name: str
    updates_per_s: float


def lowest_limit(work: Work, rates: Rates) -> Limit:
    """The limit that is met first."""
    limits = [
        Limit("arithmetic", rates.operations / work.operations if work.operations else math.inf),
        Limit("memory", rates.bytes / work.bytes if work.bytes else math.inf),
    ]
    if work.kernels and rates.kernels:
        limits.append(Limit("launches", rates.kernels / work.kernels))
    return min(limits, key=lambda limit: limit.updates_per_s)


def count_work(eager: Callable[[], object], fast: Callable[[], object], updates: int, device: torch.device) -> Work:
    """Cost of an update, averaged over ``updates`` of them.

    Args:
        eager: The update, not compiled; its products and optimizer steps are counted.
        fast: The update as it is measured; on a GPU its kernels are counted.
        updates: A multiple of the policy's delay.
        device: Where both compute.
    """
    traffic = _Traffic()
    with FlopCounterMode(display=False) as operations, traffic:
        for _ in range(updates):
            eager()
    kernels = _count_kernels(fast, updates) / updates if device.type == "cuda" else None
    return Work(operations.get_total_flops() / updates, traffic.bytes / updates, kernels)


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


def measure_rates(device: torch.device, precision: str) -> Rates:
    """The machine's rates, with as many threads as torch has been given; some seconds.

    Args:
        device: Which machine.
        precision: Of the products, ``float32`` or ``bfloat16``.
    """
    side, copied = _SIDE[device.type], _COPIED[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=getattr(torch, precision)) for _ in range(2))
    product = torch.empty_like(left)
    operations = 2 * side**3 / _shortest(lambda: torch.mm(left, right, out=product), device)
    source, copy = torch.zeros(copied, device=device), torch.zeros(copied, device=device)
    moved = 2 * 4 * copied / _shortest(lambda: copy.copy_(source), device)
    return Rates(operations, moved, _launch_rate(device) if device.type == "cuda" else None)


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
    turns = []
    for _ in range(_TURNS + 1):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        turns.append(time.perf_counter() - began)
    return min(turns[1:])
