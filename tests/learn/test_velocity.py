from __future__ import annotations

import pytest
import torch
from torch import nn

from sacflow_robot.errors import UnknownNameError
from sacflow_robot.learn.config import FlowConfig
from sacflow_robot.learn.velocity import VELOCITIES, FlowG, embed_time, make_velocity

OBSERVATION, D, B = 19, 35, 6
CONFIG = FlowConfig(width=32, depth=2, gate_width=16)


@pytest.mark.parametrize("name", sorted(VELOCITIES))
def test_rows_are_independent_and_every_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    velocity = make_velocity(name, OBSERVATION, D, CONFIG)
    if isinstance(velocity, FlowG):  # its gate's head starts at zero weights, which shield what is below it
        nn.init.normal_(velocity.gate.head.weight)
    observation, action, time = torch.randn(B, OBSERVATION), torch.randn(B, D), torch.rand(B, 1)
    out = velocity(time, action, velocity.encode(observation))
    assert out.shape == (B, D)
    one = velocity(time[2:3], action[2:3], velocity.encode(observation[2:3]))
    torch.testing.assert_close(out[2:3], one)
    shared = velocity(time[:1], action, velocity.encode(observation))
    torch.testing.assert_close(shared[:1], out[:1])
    out.square().sum().backward()
    dead = [n for n, p in velocity.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert dead == []
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in velocity.modules())


def test_flow_g_starts_as_published() -> None:
    velocity = FlowG(OBSERVATION, D, CONFIG)
    gate = torch.sigmoid(velocity.gate(torch.zeros(1, 1), torch.randn(B, D), torch.randn(B, 16)))
    torch.testing.assert_close(gate, torch.full((B, D), torch.sigmoid(torch.tensor(5.0)).item()))


def test_attention_over_one_token_is_linear() -> None:
    """What FlowT's decoder layers rest on: with a single key, attention is W_o W_v whatever the query."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 4, batch_first=True)
    value = torch.randn(B, 1, 8)
    outputs = [attention(torch.randn(B, 1, 8), value, value)[0] for _ in range(2)]
    w_v, b_v = attention.in_proj_weight[16:], attention.in_proj_bias[16:]
    by_hand = attention.out_proj(value @ w_v.T + b_v)
    for output in outputs:
        torch.testing.assert_close(output, by_hand)


def test_time_embedding_tells_the_euler_steps_apart() -> None:
    features = embed_time(torch.arange(10.0)[:, None] / 10)
    distance = torch.cdist(features, features) + torch.eye(10) * 9
    assert features.shape == (10, 8) and distance.min() > 0.1


def test_unknown_name() -> None:
    with pytest.raises(UnknownNameError, match="valid names: flow-g, flow-t, mlp"):
        make_velocity("flow-x", OBSERVATION, D, CONFIG)
