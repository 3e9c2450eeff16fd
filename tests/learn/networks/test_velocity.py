import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sacflow_robot.errors import UnknownNameError
from sacflow_robot.learn.config import FlowConfig, VelocityName
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.networks.policy import squash
from sacflow_robot.learn.networks.velocity import (
    VELOCITIES,
    FlowG,
    FlowL,
    FlowT,
    embed_time,
    make_velocity,
    normalize_weights,
)
from sacflow_robot.learn.presets import preset

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


@pytest.mark.parametrize("name", sorted(VELOCITIES))
def test_the_rollout_is_a_residual_recurrent_network_on_the_action(name: str) -> None:
    """h_{k+1} = h_k + v(k / K, h_k, s) / K, h_0 the noise, read out through the squashing: what the policy plays, and, without
    its noise and the drift for it, what it is trained by."""
    torch.manual_seed(0)
    policy = FlowPolicy(name, OBSERVATION, D, replace(CONFIG, drift=False, noise_scale=1e-9))
    observation, noise = torch.randn(B, OBSERVATION), policy.draw(B, torch.Generator().manual_seed(0))

    class Cell(nn.Module):
        def forward(self, hidden: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            state = policy.velocity.encode(policy.normalize(observation))  # at every step anew
            return hidden + policy.velocity(time, hidden, state) / CONFIG.euler_steps

    cell, hidden = Cell(), noise[0]
    for k in range(CONFIG.euler_steps):
        hidden = cell(hidden, torch.tensor([[k / CONFIG.euler_steps]]))
    torch.testing.assert_close(policy(observation, noise[0]), squash(hidden))
    torch.testing.assert_close(policy.rollout(observation, noise).action, squash(hidden))
    backward = torch.autograd.grad(policy.rollout(observation, noise).latent.sum(), [*policy.velocity.parameters()])
    through_time = torch.autograd.grad(hidden.sum(), [*policy.velocity.parameters()])
    torch.testing.assert_close(backward, through_time, atol=1e-4, rtol=1e-4)


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
    with pytest.raises(UnknownNameError, match="valid names: flow-g, flow-l, flow-t, mlp"):
        make_velocity("flow-x", OBSERVATION, D, CONFIG)


def test_a_step_of_flow_g_by_hand() -> None:
    """One dimension, one hidden unit, every weight another number: sigmoid(g) (c - A)."""
    velocity = FlowG(1, 1, FlowConfig(width=1, depth=1, gate_width=1))
    s, a, t = 0.3, -0.7, 0.25
    # Weight of the observation and its bias, of the action, of sin(pi t / 2) and of cos(2 pi t), of the head, its bias.
    numbers = {"candidate": (0.5, 0.1, -1.1, 0.9, 0.2, 1.7, -0.4), "gate": (-0.3, 0.6, 0.7, -0.8, 0.35, -1.3, 0.15)}
    heads = {}
    for name, (of_s, bias, of_a, of_sine, of_cosine, weight, offset) in numbers.items():
        trunk = getattr(velocity, name)
        with torch.no_grad():
            trunk.from_observation.weight.fill_(of_s)
            trunk.from_observation.bias.fill_(bias)
            trunk.from_action.weight.fill_(of_a)
            trunk.from_time.weight.zero_()
            trunk.from_time.weight[0, 0] = of_sine
            trunk.from_time.weight[0, 6] = of_cosine
            trunk.head.weight.fill_(weight)
            trunk.head.bias.fill_(offset)
        x = of_s * s + bias + of_a * a + of_sine * math.sin(math.pi * t / 2) + of_cosine * math.cos(2 * math.pi * t)
        heads[name] = weight * x / (1 + math.exp(-x)) + offset
    by_hand = 1 / (1 + math.exp(-heads["gate"])) * (heads["candidate"] - a)
    out = velocity(torch.tensor([[t]]), torch.tensor([[a]]), velocity.encode(torch.tensor([[s]])))
    assert out.item() == pytest.approx(by_hand, rel=1e-5)


def test_a_step_of_flow_t_is_that_of_a_decoder_with_attention() -> None:
    """Against torch's own pre-norm decoder layer with four heads and one token, given the same weights."""
    torch.manual_seed(0)
    width = 8
    velocity = FlowT(OBSERVATION, D, FlowConfig(width=width, depth=1))
    layer = nn.TransformerDecoderLayer(width, 4, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
    ours = velocity.layers[0]
    with torch.no_grad():
        for theirs, (value, out) in (
            (layer.self_attn, ours.self_attention),
            (layer.multihead_attn, ours.cross_attention[1:]),
        ):
            theirs.in_proj_weight[2 * width :] = value.weight
            theirs.in_proj_bias[2 * width :] = value.bias
            theirs.out_proj.load_state_dict(out.state_dict())
        layer.linear1.load_state_dict(ours.feed_forward[1].state_dict())
        layer.linear2.load_state_dict(ours.feed_forward[3].state_dict())
    observation, action, time = torch.randn(B, OBSERVATION), torch.randn(B, D), torch.rand(B, 1)
    state = F.layer_norm(velocity.from_observation(observation), (width,))
    token = velocity.from_action(action) + velocity.from_time(embed_time(time))
    decoded = layer(token.unsqueeze(1), state.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(velocity(time, action, velocity.encode(observation)), velocity.head(decoded))


def test_a_step_of_flow_l_is_convex_and_its_gate_does_not_see_the_action() -> None:
    """A + v / K = (1 - alpha) A + alpha * target; without the narrow term, the Jacobian is 1 - alpha, diagonal."""
    torch.manual_seed(0)
    velocity = FlowL(OBSERVATION, D, CONFIG)
    nn.init.zeros_(velocity.to_action.weight)
    observation, time = torch.randn(1, OBSERVATION), torch.rand(1, 1)
    context = velocity.encode(observation)

    def step(action: torch.Tensor) -> torch.Tensor:
        return action + velocity(time, action, context) / CONFIG.euler_steps

    jacobians = [torch.func.jacrev(step)(torch.randn(1, D)).squeeze() for _ in range(2)]
    torch.testing.assert_close(*jacobians)
    kept = jacobians[0].diagonal()
    torch.testing.assert_close(jacobians[0], torch.diag(kept))
    assert ((kept > 0) & (kept < 1)).all()


def rollout_gradients(name: VelocityName, euler_steps: int) -> torch.Tensor:
    """Norm of dL/dA_k, k = 0 to K, for a loss linear in A_K, at initialization."""
    torch.manual_seed(0)
    velocity = make_velocity(name, OBSERVATION, D, replace(preset("lift", name).flow, euler_steps=euler_steps))
    context = velocity.encode(torch.randn(64, OBSERVATION))
    actions = [torch.randn(64, D, requires_grad=True)]
    for k in range(euler_steps):
        actions.append(actions[-1] + velocity(torch.full((1, 1), k / euler_steps), actions[-1], context) / euler_steps)
    gradients = torch.autograd.grad((actions[-1] @ torch.randn(D)).sum(), actions)
    return torch.stack([g.norm() for g in gradients])


def operations(name: VelocityName) -> int:
    """Multiplications of one rollout with a preset's sizes."""
    policy = FlowPolicy(name, OBSERVATION, D, preset("lift", name).flow)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy(torch.zeros(1, OBSERVATION), torch.zeros(1, D))
    return int(counter.get_total_flops()) // 2


@pytest.mark.parametrize("euler_steps", [4, 10])
def test_flow_l_keeps_gradients_as_flat_as_flow_t_with_fewer_operations_than_flow_g(euler_steps: int) -> None:
    gradients = {name: rollout_gradients(name, euler_steps) for name in get_args(VelocityName)}
    spread = {name: float(norms.max() / norms.min()) for name, norms in gradients.items()}
    assert spread["flow-l"] < spread["flow-t"] < spread["flow-g"]
    assert 2 * operations("flow-l") < operations("flow-g") < operations("flow-t")


@pytest.mark.parametrize("name", get_args(VelocityName))
def test_normalized_weights_start_where_plain_ones_do(name: VelocityName) -> None:
    torch.manual_seed(0)
    velocity = make_velocity(name, OBSERVATION, D, CONFIG)
    observation, action, time = torch.randn(B, OBSERVATION), torch.randn(B, D), torch.rand(B, 1)
    before = velocity(time, action, velocity.encode(observation))
    normalize_weights(velocity)
    torch.testing.assert_close(velocity(time, action, velocity.encode(observation)), before)
    assert any("parametrizations" in key for key in velocity.state_dict())
