"""Between a policy's own actions, in [-1, 1], and the units of a robot."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sacflow_robot.errors import UsageError
from sacflow_robot.spec import ArmSpec


class ActionScaling:
    """An action's bounds become -1 and 1, dimension by dimension; networks, losses and critics know no other range.

    Args:
        arm: The robot.
        device: Where actions are.

    Attributes:
        identity: Whether the bounds are -1 and 1 already, so that there is nothing to do.
        center: Middle of the bounds (A,), in the robot's units.
        half: Half of their distance (A,).

    Raises:
        UsageError: A dimension has no bounds, or none between which there is anything.
    """

    def __init__(self, arm: ArmSpec, device: torch.device | None = None) -> None:
        low, high = np.array(arm.action_low, np.float64), np.array(arm.action_high, np.float64)
        bounded = np.isfinite(low) & np.isfinite(high) & (low < high)
        if not bounded.all():
            names = ", ".join(name for name, fine in zip(arm.action_names, bounded, strict=True) if not fine)
            raise UsageError(
                f"robot {arm.robot!r} has no finite range of actions in {names}; give it action_low < action_high"
            )
        self.identity = bool((low == -1).all() and (high == 1).all())
        self.center = torch.tensor((low + high) / 2, dtype=torch.float32, device=device)
        self.half = torch.tensor((high - low) / 2, dtype=torch.float32, device=device)

    def to_robot(self, actions: Tensor) -> Tensor:
        """Actions (..., A) of the policy in the robot's units."""
        return actions if self.identity else actions * self.half + self.center

    def to_policy(self, actions: Tensor) -> Tensor:
        """Actions (..., A) in the robot's units as the policy knows them; what is beyond the bounds is taken to them."""
        return actions if self.identity else ((actions - self.center) / self.half).clamp(-1, 1)
