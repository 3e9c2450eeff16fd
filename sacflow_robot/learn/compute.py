"""How the update is computed: compiled or not, in float32 or in bfloat16 with float32 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from sacflow_robot.errors import UsageError, one_line
from sacflow_robot.learn.config import TrainConfig

F = TypeVar("F", bound=Callable[..., object])


class Compute:
    """Prepares losses for a device.

    Args:
        config: The run's configuration.
        device: Where to compute.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self._config, self._device = config, device

    def prepare(self, loss: F) -> F:
        """The same function, faster where that is possible."""
        return loss


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
