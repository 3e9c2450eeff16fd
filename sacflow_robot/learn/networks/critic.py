"""Ensemble of action-value critics, evaluated as one batched network."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _EnsembleLinear(nn.Module):
    """E linear layers side by side: (E, B, in) -> (E, B, out)."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class _EnsembleNorm(nn.Module):
    """Layer norm with a scale and a shift for each member."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(members, 1, width))
        self.shift = nn.Parameter(torch.zeros(members, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, F.layer_norm(x, x.shape[-1:]), self.scale)


class Critic(nn.Module):
    """E critics Q(s, a_{1:H}): MLPs with layer norm and GELU.

    Args:
        observation_dim: O.
        action_dim: D = H * A.
        width: Hidden width.
        depth: Hidden layers.
        members: E.
    """

    def __init__(self, observation_dim: int, action_dim: int, width: int, depth: int, members: int) -> None:
        super().__init__()
        self._members = members
        layers: list[nn.Module] = []
        inputs = observation_dim + action_dim
        for _ in range(depth):
            layers += [_EnsembleLinear(members, inputs, width), _EnsembleNorm(members, width), nn.GELU()]
            inputs = width
        self.net = nn.Sequential(*layers, _EnsembleLinear(members, inputs, 1))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """Values (E, B) of normalized observations (B, O) and flattened chunks (B, D).

        Where products are taken in half the precision, the last one is not: a value rounded to 8 bits would be noise in
        every target.
        """
        x = torch.cat([observation, action], -1)
        hidden = self.net[:-1](x.expand(self._members, *x.shape))
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                values: Tensor = self.net[-1](hidden.float())
        else:
            values = self.net[-1](hidden)
        return values.squeeze(-1)


def aggregate(values: Tensor, how: str) -> Tensor:
    """One value (B,) of the members' (E, B): their ``min`` or their ``mean``."""
    return values.amin(0) if how == "min" else values.mean(0)
