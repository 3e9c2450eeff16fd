"""Velocity networks v(t, A, s) of a flow policy, chosen by name.

All share one interface: ``encode`` turns the observation into whatever depends on it alone, once per rollout;
``forward`` gives the velocity at one Euler step. A is the flattened action chunk (B, D), D = H * A.
Equations: Flow-G and Flow-T of arXiv 2509.25756, section 4; Flow-L is this project's own.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sacflow_robot.errors import UnknownNameError
from sacflow_robot.learn.config import LOG_NOISE_BOUNDS, FlowConfig

_TIME_FREQUENCIES = 4
_GATE_BIAS = 5.0  # flow-g's gate starts open: sigmoid(5) = 0.993
TIME_ORDERS = 4
LIGHT_START = 0.07  # flow-l's rate at the start: its steps start with Jacobians close to 1
_LIGHT_LIMIT = 2.0  # the largest: all gates together leave a seventh of A_0, exp(-2)


class Velocity(nn.Module):
    """Interface of a velocity network."""

    def encode(self, observation: Tensor) -> Tensor:
        """Context (B, C) from a normalized observation (B, O)."""
        raise NotImplementedError

    def forward(self, time: Tensor, action: Tensor, context: Tensor) -> Tensor:
        """Velocity (B, D) at flow time (B, 1) or (1, 1), action (B, D) and context (B, C)."""
        raise NotImplementedError


class _Trunk(nn.Module):
    """MLP on (time, action, observation) whose observation part of the first layer is computed by ``encode``."""

    def __init__(self, observation_dim: int, action_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.from_observation = nn.Linear(observation_dim, width)
        self.from_action = nn.Linear(action_dim, width, bias=False)
        self.from_time = nn.Linear(2 * _TIME_FREQUENCIES, width, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.head = nn.Linear(width, action_dim)

    def forward(self, time: Tensor, action: Tensor, context: Tensor) -> Tensor:
        x = F.silu(context + self.from_action(action) + self.from_time(embed_time(time)))
        for layer in self.hidden:
            x = F.silu(layer(x))
        return cast(Tensor, self.head(x))


class Mlp(Velocity):
    """Plain MLP, the naive control: unrolled K times it is a residual RNN whose gradients can explode."""

    def __init__(self, observation_dim: int, action_dim: int, config: FlowConfig) -> None:
        super().__init__()
        self.trunk = _Trunk(observation_dim, action_dim, config.width, config.depth)

    def encode(self, observation: Tensor) -> Tensor:
        return cast(Tensor, self.trunk.from_observation(observation))

    def forward(self, time: Tensor, action: Tensor, context: Tensor) -> Tensor:
        return cast(Tensor, self.trunk(time, action, context))


class NoiseScale(nn.Module):
    """Standard deviation sigma(t, A, s) of the noise-augmented rollout, per dimension, in exp([-5, 2]) as published.

    Args:
        observation_dim: O.
        action_dim: D.
        width: Hidden width.
        start: What it is at first, for all inputs.
    """

    def __init__(self, observation_dim: int, action_dim: int, width: int, start: float) -> None:
        super().__init__()
        self.trunk = _Trunk(observation_dim, action_dim, width, 1)
        low, high = LOG_NOISE_BOUNDS
        nn.init.zeros_(self.trunk.head.weight)
        nn.init.constant_(self.trunk.head.bias, math.atanh(2 * (math.log(start) - low) / (high - low) - 1))

    def encode(self, observation: Tensor) -> Tensor:
        """Context (B, C) from a normalized observation (B, O)."""
        return cast(Tensor, self.trunk.from_observation(observation))

    def forward(self, time: Tensor, action: Tensor, context: Tensor) -> Tensor:
        """log sigma (B, D) at flow time (B, 1) or (1, 1), action (B, D) and context (B, C)."""
        low, high = LOG_NOISE_BOUNDS  # tanh rather than a clamp, which would have no gradient beyond its bounds
        raw: Tensor = self.trunk(time, action, context)
        return low + 0.5 * (high - low) * (raw.to(action.dtype).tanh() + 1)


class FlowG(Velocity):
    """Gated velocity, sigmoid(g) * (c - A): one Euler step is a gated recurrent update of the action."""

    def __init__(self, observation_dim: int, action_dim: int, config: FlowConfig) -> None:
        super().__init__()
        self.candidate = _Trunk(observation_dim, action_dim, config.width, config.depth)
        self.gate = _Trunk(observation_dim, action_dim, config.gate_width, 1)
        self._split = [config.width, config.gate_width]
        nn.init.zeros_(self.gate.head.weight)
        nn.init.constant_(self.gate.head.bias, _GATE_BIAS)

    def encode(self, observation: Tensor) -> Tensor:
        return torch.cat([self.candidate.from_observation(observation), self.gate.from_observation(observation)], -1)

    def forward(self, time: Tensor, action: Tensor, context: Tensor) -> Tensor:
        for_candidate, for_gate = torch.split(context, self._split, -1)
        gate = torch.sigmoid(self.gate(time, action, for_gate))
        return cast(Tensor, gate * (self.candidate(time, action, for_candidate) - action))


class _DecoderLayer(nn.Module):
    """Pre-norm decoder layer on one action token and one state token.

    Softmax over a single key is 1, so each attention is W_o W_v applied to its one value, whatever the query: query
    and key weights would receive no gradient and are left out. Cross-attention then depends on the state alone, and is
    computed once per rollout. W_o and W_v stay two matrices, which trains as published and computes the same.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
        self.cross_attention = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, token: Tensor, from_state: Tensor) -> Tensor:
        token = token + self.self_attention(self.self_norm(token))
        token = token + from_state
        return cast(Tensor, token + self.feed_forward(token))


class FlowT(Velocity):
    """Decoded velocity: the action token, with its time embedding, goes through decoder layers on the state."""

    def __init__(self, observation_dim: int, action_dim: int, config: FlowConfig) -> None:
        super().__init__()
        width = config.width
        self.from_observation = nn.Sequential(nn.Linear(observation_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.from_action = nn.Linear(action_dim, width)
        self.from_time = nn.Linear(2 * _TIME_FREQUENCIES, width, bias=False)
        self.layers = nn.ModuleList(_DecoderLayer(width) for _ in range(config.depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, action_dim))

    def encode(self, observation: Tensor) -> Tensor:
        state = self.from_observation(observation)
        return torch.cat([cast(_DecoderLayer, layer).cross_attention(state) for layer in self.layers], -1)

    def forward(self, time: Tensor, action: Tensor, context: Tensor) -> Tensor:
        token = self.from_action(action) + self.from_time(embed_time(time))
        for layer, from_state in zip(self.layers, context.chunk(len(self.layers), -1), strict=True):
            token = layer(token, from_state)
        return cast(Tensor, self.head(token))


class FlowL(Velocity):
    """Light velocity, K alpha(t, s) * (c(t, s) + U tanh(V A) - A): most of it does not see A, so it is not recurrent.

    An Euler step is the convex update A + alpha * (target - A), a GRU's, whose gate and target's offset depend on time and
    state alone. ``encode`` computes their expansion in Legendre polynomials of time, once per rollout, at the cost of one
    MLP; a step then costs two narrow products, V and U, with the hidden layer between them scaled and shifted by the
    state. The Jacobian of a step is 1 - alpha + alpha U tanh' V: gate and candidate of flow-g add a product of the
    Jacobians of several layers instead.

    The gate is that of dA/dt = r (target - A), followed exactly for a step: alpha = 1 - exp(-r / K), 0 < r < 2. So the gates
    of all steps together leave exp(-2) of a gradient at least, whatever K; a GRU's, which may be 1, can leave nothing.
    """

    def __init__(self, observation_dim: int, action_dim: int, config: FlowConfig) -> None:
        super().__init__()
        self._steps, width, rank = config.euler_steps, config.width, config.gate_width
        layers: list[nn.Module] = [nn.Linear(observation_dim, width), nn.SiLU()]
        for _ in range(config.depth - 1):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.from_observation = nn.Sequential(*layers)
        self._split = [TIME_ORDERS * action_dim] * 2 + [rank] * 2
        self.head = nn.Linear(width, sum(self._split))
        self.from_action = nn.Linear(action_dim, rank, bias=False)
        self.from_time = nn.Linear(2 * _TIME_FREQUENCIES, rank, bias=False)
        self.to_action = nn.Linear(rank, action_dim, bias=False)
        nn.init.zeros_(self.head.bias)
        self.start_at(LIGHT_START)

    @torch.no_grad()
    def start_at(self, rate: float) -> None:
        """Have r begin about there, for all times and states."""
        self.head.bias[: self._split[0] // TIME_ORDERS] = math.log(rate / (_LIGHT_LIMIT - rate))

    def encode(self, observation: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.from_observation(observation)))

    def forward(self, time: Tensor, action: Tensor, context: Tensor) -> Tensor:
        gate, offset, scale, shift = torch.split(context, self._split, -1)
        orders = legendre(time).unsqueeze(-1)
        gate = light_gate((gate.reshape(-1, TIME_ORDERS, action.shape[-1]) * orders).sum(-2), self._steps)
        offset = (offset.reshape(-1, TIME_ORDERS, action.shape[-1]) * orders).sum(-2)
        hidden = torch.tanh((self.from_action(action) + self.from_time(embed_time(time))) * (1 + scale) + shift)
        return cast(Tensor, self._steps * gate * (offset + self.to_action(hidden) - action))


def light_gate(raw: Tensor, steps: int) -> Tensor:
    """Flow-l's alpha of one of so many steps."""
    return 1 - torch.exp(-_LIGHT_LIMIT / steps * torch.sigmoid(raw))


def legendre(time: Tensor) -> Tensor:
    """Legendre polynomials of orders 0 to 3 (B, 4) on flow time (B, 1) in [0, 1]."""
    x = 2 * time - 1
    return torch.cat([torch.ones_like(x), x, 1.5 * x**2 - 0.5, 2.5 * x**3 - 1.5 * x], -1)


def embed_time(time: Tensor) -> Tensor:
    """Sine and cosine features (B, 8) of flow time (B, 1) in [0, 1]."""
    angles = time * (math.pi * 2.0 ** torch.arange(_TIME_FREQUENCIES, device=time.device, dtype=time.dtype) / 2)
    return torch.cat([angles.sin(), angles.cos()], -1)


VELOCITIES: dict[str, type[Velocity]] = {"mlp": Mlp, "flow-g": FlowG, "flow-t": FlowT, "flow-l": FlowL}


def make_velocity(name: str, observation_dim: int, action_dim: int, config: FlowConfig) -> Velocity:
    """Build a velocity network for flattened chunks of ``action_dim`` = H * A dimensions.

    Raises:
        UnknownNameError: No such velocity.
    """
    if name not in VELOCITIES:
        raise UnknownNameError("velocity", name, VELOCITIES)
    return VELOCITIES[name](observation_dim, action_dim, config)


def normalize_weights(module: nn.Module) -> None:
    """Give every linear layer a weight of direction and length (Salimans and Kingma, 2016).

    But for a layer that starts at zero, as the head of flow-g's gate does: it has no direction.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and bool(layer.weight.any(-1).all()):
            nn.utils.parametrizations.weight_norm(layer)
