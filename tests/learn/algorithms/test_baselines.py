"""Every algorithm on the same batches: what it updates, what it leaves alone, and that its policy is exported."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sacflow_robot.data.replay_buffer import ChunkBatch, ReplayBuffer
from sacflow_robot.episode import Episode
from sacflow_robot.errors import UnknownNameError
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.learn.algorithms.agent import Agent
from sacflow_robot.learn.algorithms.registry import ALGORITHMS, make_agent
from sacflow_robot.learn.config import FlowConfig, LearnerConfig, TrainConfig
from sacflow_robot.learn.trained_run import export_agent
from sacflow_robot.spec import RobotSpec

LEARNER = LearnerConfig(critic_width=32, critic_depth=2, batch_size=32, policy_delay=1)


def tiny_agent(robot: RobotSpec, algo: Any, noise: Any = "fixed", **learner: Any) -> Agent:
    flow = FlowConfig(width=32, depth=2, gate_width=16, noise=noise)
    config = TrainConfig(algo=algo, compile="off", flow=flow, learner=replace(LEARNER, **learner))
    return make_agent(robot, config, torch.device("cpu"))


@pytest.fixture
def batch(make_episode: Callable[..., Episode], robot: RobotSpec) -> ChunkBatch:
    buffer = ReplayBuffer(robot, 5, 0.99, 200)
    for seed in range(4):
        buffer.append(make_episode(20, seed=seed))
    return buffer.sample(32, np.random.default_rng(0))


def weights(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in network.parameters()])


@pytest.mark.parametrize("algo", sorted(ALGORITHMS))
def test_learns_offline_and_online_goes_on_from_its_state_and_is_exported(
    algo: str, robot: RobotSpec, batch: ChunkBatch, tmp_path: Path
) -> None:
    best_of = 4 if algo == "qc" else 1
    agents = [tiny_agent(robot, algo, best_of=best_of) for _ in range(2)]
    agent = agents[0]
    for _ in range(3):
        agent.update_offline(batch)
    agent.begin_online()
    before = weights(agent.policy)
    metrics = agent.update_online(batch)
    assert all(value.isfinite() for value in metrics.values()) and agent.updates == 4
    assert not torch.equal(weights(agent.policy), before)
    agents[1].load_state_dict(copy.deepcopy(agent.state_dict()))
    for one in agents:
        one.update_online(batch)
    assert torch.equal(weights(agents[0].policy), weights(agents[1].policy))

    assert export_agent(agent, {"seed": 0}, tmp_path / "lift.onnx") <= 1e-5
    served = OnnxPolicy(tmp_path / "lift.onnx")
    noise = np.random.default_rng(1).standard_normal((2, 5, 7)).astype(np.float32)
    seen = {a.key: np.full((2, *a.shape), 0.1, np.float32) for a in robot.observations}
    np.testing.assert_allclose(served.infer(seen, noise), agent.act(robot.flatten(seen), noise), atol=1e-5)
    assert served.spec.notes.get("best_of", 1) == best_of and served.spec.noise_shape == (5, 7)
    assert served.spec.velocity == agent.policy.name
    assert np.abs(agent.explore(robot.flatten(seen), noise)).max() <= 1


@pytest.mark.parametrize("algo", sorted(ALGORITHMS))
def test_half_precision_takes_nearly_the_same_steps(algo: str, robot: RobotSpec, batch: ChunkBatch) -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        agent = tiny_agent(robot, algo, "learned", best_of=4 if algo == "qc" else 1)
        agent = make_agent(robot, replace(agent.config, precision=precision), torch.device("cpu"))
        agent.update_offline(batch)
        metrics = [agent.update_online(batch) for _ in range(3)][-1]
        assert {value.dtype for value in metrics.values()} == {torch.float32}
        losses[precision] = {name: float(value) for name, value in metrics.items() if name.startswith("loss")}
        assert agent.is_finite
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05, abs=0.02)


def test_cloning_alone_has_no_critic_to_learn(robot: RobotSpec, batch: ChunkBatch) -> None:
    agent = tiny_agent(robot, "bc")
    before = weights(agent.critic)
    agent.update_offline(batch)
    assert set(agent.update_online(batch)) == {"loss/flow_matching"}
    assert agent.update_online(batch, critic_only=True) == {} and agent.updates == 2
    assert torch.equal(weights(agent.critic), before)


def test_the_best_of_several_has_no_actor_and_its_targets_grow_with_their_number(
    robot: RobotSpec, batch: ChunkBatch
) -> None:
    one, many = tiny_agent(robot, "qc", best_of=1), tiny_agent(robot, "qc", best_of=32)
    many.policy.load_state_dict(one.policy.state_dict())
    many.critic.load_state_dict(one.critic.state_dict())
    many.target_critic.load_state_dict(one.critic.state_dict())
    values = []
    for agent in (one, many):
        rows = agent._on_device(batch)
        with torch.no_grad():
            values.append(agent._next_value(rows, agent._draw_next(rows))[0].mean())
    assert values[1] > values[0]
    assert "loss/actor" not in many.update_online(batch)


def test_distillation_brings_the_one_step_policy_to_the_flow_of_the_same_noise(
    robot: RobotSpec, batch: ChunkBatch
) -> None:
    agent = tiny_agent(robot, "qc-fql", bc_coef=100.0, policy_lr=3e-3)
    distances = [float(agent.update_offline(batch)["policy/distance_to_data"]) for _ in range(200)]
    assert np.mean(distances[-10:]) < 0.75 * np.mean(distances[:10])
    before = weights(agent.flow)  # type: ignore[attr-defined]
    agent.update_online(batch, critic_only=True)
    assert torch.equal(weights(agent.flow), before)  # type: ignore[attr-defined]


def test_temperature_weighs_the_entropy_of_a_gaussian_and_of_a_flow_with_learned_noise(
    robot: RobotSpec, batch: ChunkBatch
) -> None:
    for algo, noise in (("sac", "fixed"), ("sac-flow", "learned")):
        entropy = {}
        for temperature in ("fixed", "zero"):
            agent = tiny_agent(
                robot,
                algo,
                noise,
                temperature=temperature,
                initial_temperature=0.5,
                temperature_bounds=(0.1, 1.0),
                policy_lr=3e-3,
                bc_coef=0.0,
            )
            for _ in range(60):
                metrics = agent.update_online(batch)
            entropy[temperature] = float(metrics["policy/excess_entropy"])
        assert entropy["fixed"] > entropy["zero"] + 5


def test_targets_of_rlpd_leave_the_entropy_out(robot: RobotSpec, batch: ChunkBatch) -> None:
    deducted = {}
    for algo in ("rlpd", "sac"):
        agent = tiny_agent(robot, algo)
        prepared = agent._on_device(batch)
        noise = agent._draw_next(prepared)
        value, deducted[algo] = agent._next_value(prepared, noise)
        after = agent.policy.rollout(prepared.next_observation, noise)
        expected = agent._value(agent.target_critic, prepared.next_observation, after.action)
        torch.testing.assert_close(value, expected)
    assert (deducted["rlpd"] == 0).all() and (deducted["sac"] != 0).all()


def test_best_of_picks_what_the_critic_prefers_when_exploring(robot: RobotSpec) -> None:
    agent = tiny_agent(robot, "sac-flow", best_of=16)
    agent.target_critic.forward = lambda observation, action: action.sum(-1).expand(2, -1)  # type: ignore[method-assign]
    seen = np.zeros((4, 19), np.float32)
    noise = np.random.default_rng(0).standard_normal((4, 5, 7)).astype(np.float32)
    plain = tiny_agent(robot, "sac-flow")
    assert agent.explore(seen, noise).sum() > plain.explore(seen, noise).sum()
    assert agent.act(seen, noise).sum() > plain.act(seen, noise).sum()


def test_clipping_limits_the_step_of_the_policy(robot: RobotSpec, batch: ChunkBatch) -> None:
    agent = tiny_agent(robot, "bc", max_grad_norm=1e-3)
    agent.update_offline(batch)
    norm = torch.stack([p.grad.norm() for p in agent.policy.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_temperature_may_be_fixed(robot: RobotSpec, batch: ChunkBatch) -> None:
    agent = tiny_agent(robot, "sac-flow", temperature="fixed", initial_temperature=2e-3)
    for _ in range(3):
        metrics = agent.update_online(batch)
    assert metrics["policy/temperature"].item() == pytest.approx(2e-3)


def test_unknown_algorithm(robot: RobotSpec) -> None:
    with pytest.raises(UnknownNameError, match="valid names: bc, qc, qc-fql, rlpd, sac, sac-flow"):
        tiny_agent(robot, "ppo")
