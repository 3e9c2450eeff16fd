"""Flow policies folded for inference: the same function in as few operations as the mathematics allows.

What depends on the observation alone is computed once instead of K times, what depends on time alone is a constant, linear
maps in succession are one (multiplied out in float64), and residuals and biases go into the matrix products.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sacflow_robot.export.fuse import Affine, Features, FoldedVelocity, Product, after_norm, beside, constant, linear
from sacflow_robot.export.graph import ExportablePolicy
from sacflow_robot.learn.networks.policy import PolicyNetwork, squash, unsquash
from sacflow_robot.learn.networks.velocity import (
    TIME_ORDERS,
    FlowG,
    FlowL,
    FlowT,
    Mlp,
    Velocity,
    embed_time,
    legendre,
    light_gate,
)

_CONSTANT_UNIT = 10.0  # gelu(10) is 10 in float32


class FoldedFlow(ExportablePolicy):
    """``FlowPolicy.forward`` in as few operations as the mathematics allows, and with part of the chunk given.

    Committed entries follow the straight path from noise to what is committed, (1 - t) noise + t prefix, while the others flow
    toward what goes with it. This is inpainting by replacement (Diffuser, arXiv 2205.09991, section 4.2; RePaint,
    arXiv 2201.09865) on the path that flow matching is trained on; guidance through the velocity's gradient, as in
    real-time chunking (arXiv 2506.07339), would cost a backward pass a step.

    Args:
        policy: A ``FlowPolicy``; not changed.
        velocity: Its velocity network.
        with_prefix: Whether :meth:`forward` is given a prefix.
    """

    def __init__(self, policy: PolicyNetwork, velocity: Velocity, *, with_prefix: bool = False) -> None:
        super().__init__()
        self.takes_prefix = with_prefix
        self.action_dim = policy.action_dim
        self.steps = policy.euler_steps
        limit = float(policy.observation_limit)
        self.features = Features(policy.observation_mean, policy.observation_std, limit, policy.quaternions)
        # Constants that a step adds are left out of the latent; a held entry must not get them.
        self.velocity = _FOLDS[type(velocity)](velocity, self.steps, self.features.read, defer=not with_prefix)

    def forward(
        self, observation: Tensor, noise: Tensor, prefix: Tensor | None = None, held: Tensor | None = None
    ) -> Tensor:
        """Actions (B, D) for observations (B, O), noise (B, D) and, made for a prefix, what is committed (B, D).

        ``held`` (B, D) is 1 where ``prefix`` is committed and 0 elsewhere. Between them an entry is drawn to the prefix by that
        share of each step, and comes out as the mean of both, so weighted.
        """
        context = self.velocity.encode(self.features(observation))
        latent = self.velocity.begin(noise)
        if prefix is None or held is None:
            for i in range(self.steps):
                latent = self.velocity.step(i, latent, context)
            return squash(self.velocity.end(latent))
        free, pull = 1 - held, held / self.steps * (unsquash(prefix.clamp(-1, 1)) - noise)
        for i in range(self.steps):
            latent = latent + (free * self.velocity.change(i, latent, context) + pull)
        return free * squash(self.velocity.end(latent)) + held * prefix

    def normalize(self, observation: Tensor) -> Tensor:
        """As ``PolicyNetwork.normalize``."""
        return cast(Tensor, self.features.read_out(self.features(observation)))


def _times(layer: Any, steps: int) -> Tensor:
    """A layer applied to the times of all steps (K, width), in float64."""
    times = torch.arange(steps, dtype=torch.float64)[:, None] / steps
    return cast(Tensor, embed_time(times) @ layer.weight.detach().double().T)


class _FirstLayers(nn.Module):
    """First layers of trunks side by side; ``missing`` (K, D) is what the latent of each step is short of."""

    def __init__(self, trunks: Sequence[Any], steps: int, read: Affine, missing: Tensor) -> None:
        super().__init__()
        from_action = beside(*(Affine(trunk.from_action.weight.T) for trunk in trunks))
        times = torch.cat([_times(trunk.from_time, steps) for trunk in trunks], -1) + missing @ from_action.weight
        from_features = read.then(beside(*(linear(trunk.from_observation) for trunk in trunks)))
        from_features.bias = from_features.bias + times[0]
        self.from_features = Product(from_features)
        self.from_action = Product(from_action)
        self.since_first = nn.ParameterList(constant(time - times[0]) for time in times)

    def forward(self, i: int, latent: Tensor, context: Tensor) -> Tensor:
        return F.silu(self.from_action(latent, context if i == 0 else context + self.since_first[i]))


class _FoldedMlp(FoldedVelocity):
    def __init__(self, velocity: Any, steps: int, read: Affine, defer: bool) -> None:
        super().__init__()
        trunk, head = velocity.trunk, linear(velocity.trunk.head).scaled(1 / steps)
        missing = torch.arange(steps + 1)[:, None] * head.bias * defer
        self.first = _FirstLayers([trunk], steps, read, missing[:steps])
        self.hidden = nn.ModuleList(Product(linear(layer)) for layer in trunk.hidden)
        self.head = Product(head)
        self.added = constant(missing[-1]) if defer else None

    def encode(self, features: Tensor) -> Sequence[Tensor]:
        return [self.first.from_features(features)]

    def change(self, i: int, latent: Tensor, context: Sequence[Tensor]) -> Tensor:
        return cast(Tensor, self.head(self._hidden(i, latent, context)))

    def step(self, i: int, latent: Tensor, context: Sequence[Tensor]) -> Tensor:
        return cast(Tensor, self.head(self._hidden(i, latent, context), latent))

    def _hidden(self, i: int, latent: Tensor, context: Sequence[Tensor]) -> Tensor:
        x = self.first(i, latent, context[0])
        for layer in self.hidden:
            x = F.silu(layer(x))
        return cast(Tensor, x)


class _FoldedFlowG(FoldedVelocity):
    """Candidate and gate share their first product; the latent is short of the candidate's last bias."""

    def __init__(self, velocity: Any, steps: int, read: Affine, defer: bool) -> None:
        super().__init__()
        candidate, gate = velocity.candidate, velocity.gate
        head = linear(candidate.head)
        self.first = _FirstLayers([candidate, gate], steps, read, head.bias.expand(steps, -1))
        self.hidden = nn.ModuleList(Product(linear(layer)) for layer in candidate.hidden)
        self.head = Product(head)
        self.gate = Product(linear(gate.head))
        self.short = self.added = constant(head.bias)
        self._dt = 1 / steps
        self._split = [len(candidate.head.weight.T), len(gate.head.weight.T)]

    def encode(self, features: Tensor) -> Sequence[Tensor]:
        return [self.first.from_features(features)]

    def change(self, i: int, latent: Tensor, context: Sequence[Tensor]) -> Tensor:
        x, for_gate = torch.split(self.first(i, latent, context[0]), self._split, -1)
        for layer in self.hidden:
            x = F.silu(layer(x))
        gate: Tensor = torch.sigmoid(self.gate(for_gate))
        return gate * cast(Tensor, self.head(x, latent, alpha=self._dt, beta=-self._dt))


class _FoldedFlowT(FoldedVelocity):
    """Both attentions are one product, the one over the state outside the steps; biases of the last products go elsewhere.

    Of all layers' cross-attentions the layer norm's first half is the same. To leave room for the residual in the product
    after GELU, its bias is the weight of one more hidden unit, which is constant.
    """

    def __init__(self, velocity: Any, steps: int, read: Affine, defer: bool) -> None:
        super().__init__()
        first, _, second = velocity.from_observation
        self.from_features = Product(read.then(linear(first)))
        self.state = Product(linear(second))
        self.cross, parts = Product(beside(*map(self._from_state, velocity.layers))), []
        for layer in velocity.layers:
            value, out = layer.self_attention
            attention = after_norm(layer.self_norm).then(linear(value)).then(linear(out))
            norm, up, _, down = layer.feed_forward
            unit = Affine(torch.zeros(len(up.weight.T), 1), torch.tensor([_CONSTANT_UNIT]))
            widened = torch.cat([down.weight.T, down.bias[None] / _CONSTANT_UNIT])
            folded = attention, beside(after_norm(norm).then(linear(up)), unit), Affine(widened)
            parts.append(nn.ModuleList(map(Product, folded)))
        self.layers = nn.ModuleList(parts)
        norm, head = velocity.head
        to_action = after_norm(norm).then(linear(head)).scaled(1 / steps)
        missing = torch.arange(steps + 1)[:, None] * to_action.bias * defer
        from_action = linear(velocity.from_action)
        times = _times(velocity.from_time, steps) + from_action.bias + missing[:steps] @ from_action.weight
        self.from_action = Product(from_action)
        self.head = Product(to_action)
        self.times = nn.ParameterList(constant(time) for time in times)
        self.added = constant(missing[-1]) if defer else None

    @staticmethod
    def _from_state(layer: Any) -> Affine:
        """The part of one layer that does not depend on the token: cross-attention, and the bias of self-attention."""
        norm, value, out = layer.cross_attention
        own_value, own_out = layer.self_attention
        own = after_norm(layer.self_norm).then(linear(own_value)).then(linear(own_out))
        cross = after_norm(norm).then(linear(value)).then(linear(out))
        return Affine(cross.weight, cross.bias + own.bias)

    def encode(self, features: Tensor) -> Sequence[Tensor]:
        state = _normalized(self.state(F.silu(self.from_features(features))))
        return self.cross(state).chunk(len(self.layers), -1)  # type: ignore[no-any-return]

    def change(self, i: int, latent: Tensor, context: Sequence[Tensor]) -> Tensor:
        return cast(Tensor, self.head(self._decode(i, latent, context)))

    def step(self, i: int, latent: Tensor, context: Sequence[Tensor]) -> Tensor:
        return cast(Tensor, self.head(self._decode(i, latent, context), latent))

    def _decode(self, i: int, latent: Tensor, context: Sequence[Tensor]) -> Tensor:
        token = self.from_action(latent, self.times[i])
        for layer, from_state in zip(self.layers, context, strict=True):
            attention, up, down = cast(nn.ModuleList, layer)
            token = attention(_normalized(token), token + from_state)
            token = down(F.gelu(up(_normalized(token))), token)
        return _normalized(token)


def _normalized(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


class _FoldedFlowL(FoldedVelocity):
    """Gates, offsets and shifts of all steps come out of the encoder's head; of a step, what sees the action is left."""

    def __init__(self, velocity: Any, steps: int, read: Affine, defer: bool) -> None:
        super().__init__()
        first, *others = [layer for layer in velocity.from_observation if isinstance(layer, nn.Linear)]
        self.encoder = nn.ModuleList(map(Product, [read.then(linear(first)), *map(linear, others)]))
        head = linear(velocity.head)
        gate, offset, scale, shift = (
            Affine(weight, bias)
            for weight, bias in zip(
                *(torch.split(x, velocity._split, -1) for x in (head.weight, head.bias)), strict=True
            )
        )
        orders = legendre(torch.arange(steps, dtype=torch.float64)[:, None] / steps)
        scale.bias = scale.bias + 1
        shifts = [
            Affine(shift.weight + time * scale.weight, shift.bias + time * scale.bias)
            for time in _times(velocity.from_time, steps)
        ]
        self.gates = Product(beside(*(self._at(gate, order) for order in orders)))
        self.others = Product(beside(scale, *shifts, *(self._at(offset, order) for order in orders)))
        rank, size = len(scale.bias), len(gate.bias) // TIME_ORDERS
        self._split = [rank] * (1 + steps) + [size] * steps
        self._steps = steps
        self._rate = velocity._steps / steps
        self._trained_steps = velocity._steps
        self.from_action = Product(Affine(velocity.from_action.weight.T))
        self.to_action = Product(Affine(velocity.to_action.weight.T))

    @staticmethod
    def _at(expansion: Affine, order: Tensor) -> Affine:
        """A Legendre expansion at one time."""
        weight = expansion.weight.reshape(len(expansion.weight), TIME_ORDERS, -1)
        bias = expansion.bias.reshape(TIME_ORDERS, -1)
        return Affine((weight * order[:, None]).sum(1), (bias * order[:, None]).sum(0))

    def encode(self, features: Tensor) -> Sequence[Tensor]:
        for layer in self.encoder:
            features = F.silu(layer(features))
        gates = light_gate(self.gates(features), self._trained_steps)
        if self._rate != 1:  # other steps than it was trained with
            gates = self._rate * gates
        scale, *others = torch.split(self.others(features), self._split, -1)
        return [scale, *others, *gates.chunk(self._steps, -1)]

    def change(self, i: int, latent: Tensor, context: Sequence[Tensor]) -> Tensor:
        scale, shift, offset, gate = context[0], *context[1 + i :: self._steps]
        hidden = torch.tanh(self.from_action(latent) * scale + shift)
        return cast(Tensor, gate * (self.to_action(hidden, offset) - latent))


_FOLDS: dict[type[Velocity], type[Any]] = {
    Mlp: _FoldedMlp,
    FlowG: _FoldedFlowG,
    FlowT: _FoldedFlowT,
    FlowL: _FoldedFlowL,
}
