"""Computation of the update: compiled or not, in float32 or in bfloat16 with float32 weights; and the device."""

import os
import warnings
from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar

import torch
from torch.utils._pytree import tree_map_only

from sacflow_robot.errors import UsageError, one_line
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.utils.caches import compiler_cache

_P = ParamSpec("_P")
_T = TypeVar("_T")

_LARGE = 256 * 256
"""Rows of a batch times width of a critic from which products in bfloat16 gain more on a CPU than converting costs."""

_MANY_UPDATES = 10_000
"""Updates of a run from which compiling pays on a CPU: it takes up to a minute the first time, and Lift's 11,500 updates then
make 45 a second in bfloat16 where they make 25 as they come (qc 10 where 4, rlpd 24 where 11)."""


class Compute:
    """Prepares losses for a device.

    ``auto`` depends on the device and the run's sizes alone, so that a resumed run goes on as it was: on a GPU everything, as
    CUDA graphs; on a CPU compiled where there are many updates, and in bfloat16 where batch and networks are large and the
    hardware multiplies it.

    Attributes:
        compiled: Whether losses are compiled; turns false when the compiler fails.
        precision: ``float32`` or ``bfloat16``.
        note: Reason for which it is not as configured, in a line; empty if it is.

    Args:
        config: The run's configuration.
        device: Where to compute.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self._device = device
        gpu = device.type == "cuda"
        large = config.learner.batch_size * config.learner.critic_width >= _LARGE
        pays = gpu or config.updates >= _MANY_UPDATES
        self.compiled = config.compile == "on" or (config.compile == "auto" and pays)
        kept = compiler_cache("compiled") if self.compiled else None
        if kept is not None:  # the compiler's own choice needs a user with a name
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept))
        half = config.precision == "bfloat16"
        if config.precision == "auto":
            half = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else large and multiplies_bfloat16()
        self.precision: Literal["float32", "bfloat16"] = "bfloat16" if half else "float32"
        self.note = ""
        if config.precision == "bfloat16" and not gpu and not multiplies_bfloat16():
            self.note = (
                "this CPU has no instructions for bfloat16, which will be slow; --precision float32 leaves it out"
            )

    def prepare(self, loss: Callable[_P, _T]) -> Callable[_P, _T]:
        """The same function, compiled and in the precision chosen. It must not draw random numbers: it may be called twice."""

        def plain(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            if self.precision == "float32":
                return loss(*args, **kwargs)
            with torch.autocast(self._device.type, torch.bfloat16):
                return loss(*args, **kwargs)

        if not self.compiled:
            return plain
        # The compiler counts by code object how often it compiled, and without a word leaves off after eight times, which the
        # losses of a few agents in one process would use up together.
        plain.__code__ = plain.__code__.replace()
        gpu = self._device.type == "cuda"
        fast: Callable[_P, _T] | None = None

        def compiled(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            nonlocal fast
            if not self.compiled:
                return plain(*args, **kwargs)
            try:
                # Else the backward half is compiled when it is first needed, where nothing here would catch a failure.
                both_halves = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
                with warnings.catch_warnings(), both_halves:
                    warnings.simplefilter("ignore")  # the compiler's remarks on its own deprecated parts
                    if fast is None:
                        fast = torch.compile(plain, dynamic=False, mode="reduce-overhead" if gpu else None)
                    return _own(fast(*args, **kwargs)) if gpu else fast(*args, **kwargs)
            except Exception as error:  # the compiler's own family is wide: no C++ compiler, an operation it lacks
                if is_out_of_memory(error):
                    raise
                self.compiled = False
                self.note = f"not compiled: {one_line(error, 120)}; --compile off leaves it out"
                return plain(*args, **kwargs)

        return compiled


def _own(result: _T) -> _T:
    """Copies of what a CUDA graph returned, in memory that its next run writes to."""
    return tree_map_only(torch.Tensor, torch.Tensor.clone, result)  # type: ignore[no-any-return]


def is_out_of_memory(error: BaseException) -> bool:
    """True for an error that says that memory ran out: Python's, the processor's, or one of the GPU's kinds."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def multiplies_bfloat16() -> bool:
    """True if this CPU multiplies bfloat16 faster than float32: with AMX, or AVX-512's bf16 instructions."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def pick_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is CUDA where there is one.

    Raises:
        UsageError: The device is unknown or absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} is not usable here ({one_line(error)}); try --device cpu") from None
    return device
