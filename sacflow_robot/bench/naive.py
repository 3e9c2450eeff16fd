"""Flow policies as a plain export sees them, to measure the folded graph against: the networks as published, called K times.

Each Euler step gets (time, action, observation): time is embedded, the observation encoded, and Flow-T's attentions have
queries and keys. Weights are those of the policy given, so that both compute the same; queries and keys, which the result does
not depend on, are torch's initial ones.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.networks.policy import squash
from sacflow_robot.learn.networks.velocity import FlowG, FlowT, Mlp, embed_time

_HEADS = 4


class NaiveFlow(nn.Module):
    """``FlowPolicy.forward`` without any of the policy's own savings; for velocities mlp, flow-g, flow-t and flow-l."""

    def __init__(self, policy: FlowPolicy) -> None:
        super().__init__()
        self.normalizer, self._steps = policy, policy.euler_steps
        velocity = policy.velocity
        self.velocity = _PUBLISHED.get(type(velocity), _Whole)(velocity)

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Actions (B, D) for raw observations (B, O) and noise (B, D)."""
        latent = noise
        for i in range(self._steps):
            time = torch.full_like(noise[:, :1], i / self._steps)
            latent = latent + self.velocity(time, latent, self.normalizer.normalize(observation)) / self._steps
        return squash(latent)


class _Whole(nn.Module):
    def __init__(self, velocity: Any) -> None:
        super().__init__()
        self.velocity = velocity

    def forward(self, time: Tensor, action: Tensor, observation: Tensor) -> Tensor:
        return cast(Tensor, self.velocity(time, action, self.velocity.encode(observation)))


class _Stacked(nn.Module):
    """An MLP on time, action and observation, stacked."""

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        parts = trunk.from_time, trunk.from_action, trunk.from_observation
        self.first = nn.Linear(sum(p.in_features for p in parts), trunk.from_action.out_features)
        with torch.no_grad():
            self.first.weight.copy_(torch.cat([p.weight for p in parts], 1))
            self.first.bias.copy_(trunk.from_observation.bias)
        self.hidden, self.head = trunk.hidden, trunk.head

    def forward(self, time: Tensor, action: Tensor, observation: Tensor) -> Tensor:
        x = F.silu(self.first(torch.cat([embed_time(time), action, observation], -1)))
        for layer in self.hidden:
            x = F.silu(layer(x))
        return cast(Tensor, self.head(x))


class _Mlp(_Stacked):
    def __init__(self, velocity: Any) -> None:
        super().__init__(velocity.trunk)


class _FlowG(nn.Module):
    def __init__(self, velocity: Any) -> None:
        super().__init__()
        self.candidate, self.gate = _Stacked(velocity.candidate), _Stacked(velocity.gate)

    def forward(self, time: Tensor, action: Tensor, observation: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(time, action, observation))
        return cast(Tensor, gate * (self.candidate(time, action, observation) - action))


class _FlowT(nn.Module):
    def __init__(self, velocity: Any) -> None:
        super().__init__()
        self.parts = velocity
        self.layers = nn.ModuleList(map(_decoder_layer, velocity.layers))

    def forward(self, time: Tensor, action: Tensor, observation: Tensor) -> Tensor:
        parts = self.parts
        state = parts.from_observation(observation)
        token = (parts.from_action(action) + parts.from_time(embed_time(time))).unsqueeze(1)
        for layer, norm in zip(self.layers, [layer.cross_attention[0] for layer in parts.layers], strict=True):
            token = layer(token, norm(state).unsqueeze(1))
        return cast(Tensor, parts.head(token.squeeze(1)))


def _decoder_layer(ours: Any) -> nn.Module:
    """torch's own pre-norm decoder layer, queries, keys and all."""
    width = len(ours.self_norm.weight)
    layer = nn.TransformerDecoderLayer(width, _HEADS, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
    attentions = (layer.self_attn, ours.self_attention), (layer.multihead_attn, ours.cross_attention[1:])
    with torch.no_grad():
        for theirs, (value, out) in attentions:
            theirs.in_proj_weight[2 * width :] = value.weight
            theirs.in_proj_bias[2 * width :] = value.bias
            theirs.out_proj.load_state_dict(out.state_dict())
    layer.norm1.load_state_dict(ours.self_norm.state_dict())
    layer.norm3.load_state_dict(ours.feed_forward[0].state_dict())
    layer.linear1.load_state_dict(ours.feed_forward[1].state_dict())
    layer.linear2.load_state_dict(ours.feed_forward[3].state_dict())
    return layer


_PUBLISHED: dict[type[nn.Module], type[nn.Module]] = {Mlp: _Mlp, FlowG: _FlowG, FlowT: _FlowT}
