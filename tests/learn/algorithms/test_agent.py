from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sacflow_robot.data.replay_buffer import ChunkBatch, ReplayBuffer
from sacflow_robot.episode import Episode
from sacflow_robot.errors import UsageError
from sacflow_robot.learn.algorithms.registry import ALGORITHMS, make_agent
from sacflow_robot.learn.algorithms.sac_flow import SacFlow
from sacflow_robot.learn.compile import pick_device
from sacflow_robot.learn.config import AlgorithmName, FlowConfig, TrainConfig
from sacflow_robot.learn.presets import preset
from sacflow_robot.spec import RobotSpec

FLOW = FlowConfig(width=32, depth=2, gate_width=16)


def tiny_agent(robot: RobotSpec, **learner: Any) -> SacFlow:
    config = TrainConfig(compile="off", flow=FLOW)
    sizes = {"critic_width": 32, "critic_depth": 2, "batch_size": 32}
    config = replace(config, learner=replace(config.learner, **{**sizes, **learner}))
    return SacFlow(robot, config, torch.device("cpu"))


@pytest.fixture
def batch(make_episode: Callable[..., Episode], robot: RobotSpec) -> ChunkBatch:
    buffer = ReplayBuffer(robot, 5, 0.99, 200)
    for seed in range(4):
        buffer.append(make_episode(20, seed=seed))
    return buffer.sample(32, np.random.default_rng(0))


def test_offline_updates_clone_and_leave_the_temperature_alone(robot: RobotSpec, batch: ChunkBatch) -> None:
    """One loss per optimizer and step; the policy's offline step does not depend on the critic."""
    agents = [tiny_agent(robot), tiny_agent(robot, critic_lr=0.1)]
    for _ in range(3):
        for agent in agents:
            agent.generator.manual_seed(agent.updates)
            agent.update_offline(batch)
    for a, b in zip(agents[0].policy.parameters(), agents[1].policy.parameters(), strict=True):
        assert torch.equal(a, b)
    assert agents[0].temperature.item() == pytest.approx(1e-3)


def test_cloning_reduces_its_loss(robot: RobotSpec, batch: ChunkBatch) -> None:
    agent = tiny_agent(robot, policy_lr=1e-3)
    history = [float(agent.update_offline(batch)["loss/flow_matching"]) for _ in range(200)]
    assert np.mean(history[-20:]) < 0.8 * np.mean(history[:20])


def test_cloning_is_from_solved_episodes_where_there_are_some(robot: RobotSpec, batch: ChunkBatch) -> None:
    """Actions of failed episodes make no difference to the policy; without a solved one, all are cloned."""
    half = np.arange(32) < 16
    other = np.where(half[:, None, None], batch.actions, -batch.actions)

    def cloned(clone: str, solved: np.ndarray, actions: np.ndarray) -> list[torch.Tensor]:
        agent = tiny_agent(robot, clone=clone, critic_lr=0.0)
        agent.update_offline(replace(batch, solved=solved, actions=actions))
        return list(agent.policy.parameters())

    def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    assert same(cloned("solved", half, batch.actions), cloned("solved", half, other))
    assert not same(cloned("all", half, batch.actions), cloned("all", half, other))
    none, unlucky = np.zeros(32, bool), cloned("solved", np.zeros(32, bool), batch.actions)
    assert same(unlucky, list(tiny_agent(robot).policy.parameters())), "a batch without one, of a buffer that has some"
    batch = replace(batch, any_solved=False)
    assert same(cloned("solved", none, batch.actions), cloned("all", none, batch.actions))


@pytest.mark.parametrize("reference", ["frozen", "cloning"])
def test_same_noise_measures_the_distance_to_the_clone(robot: RobotSpec, batch: ChunkBatch, reference: str) -> None:
    agent = tiny_agent(robot, policy_delay=1, bc_loss="same-noise", reference=reference, bc_coef=0.5)
    for _ in range(3):
        agent.update_offline(batch)
    agent.begin_online()
    frozen = [p.clone() for p in agent.reference.parameters()]
    first = agent.update_online(batch)
    assert first["policy/distance_to_data"].item() == 0.0, "the same flow makes the same of the same noise"
    assert agent.update_online(batch)["policy/distance_to_data"].item() > 0.0
    pairs = zip(agent.reference.parameters(), frozen, strict=True)
    assert all(torch.equal(now, then) for now, then in pairs) == (reference == "frozen")
    alone = tiny_agent(robot, policy_delay=1, bc_loss="same-noise", bc_coef=0.0)
    held = tiny_agent(robot, policy_delay=1, bc_loss="same-noise", bc_coef=100.0)
    for other in (alone, held):
        other.begin_online()
        for _ in range(30):
            metrics = other.update_online(batch)
        other.moved = metrics["policy/distance_to_data"].item()  # type: ignore[attr-defined]
    assert held.moved < alone.moved / 2  # type: ignore[attr-defined]


def test_optimizers_share_nothing(robot: RobotSpec, batch: ChunkBatch) -> None:
    """The actor's momentum is not the clone's, nor does an agent move the moments of the one it was loaded from."""

    def moments(optimizer: torch.optim.Optimizer) -> set[int]:
        return {part.data_ptr() for state in optimizer.state.values() for part in state.values()}

    agent = tiny_agent(robot, policy_delay=1, bc_loss="same-noise", reference="cloning", bc_coef=0.5)
    for _ in range(3):
        agent.update_offline(batch)
    agent.begin_online()
    assert not moments(agent.policy_optimizer) & moments(agent.reference_optimizer)
    other = tiny_agent(robot, policy_delay=1, bc_loss="same-noise", reference="cloning", bc_coef=0.5)
    state = agent.state_dict()
    state["reference_optimizer"] = state["policy_optimizer"]  # as saved by the releases in which they were shared
    other.load_state_dict(state)
    optimizers = [
        a for one in (agent, other) for a in (one.policy_optimizer, one.reference_optimizer, one.critic_optimizer)
    ]
    assert sum(len(moments(o)) for o in optimizers) == len(set.union(*map(moments, optimizers)))
    agent.update_online(batch)
    steps = {int(state["step"]) for o in optimizers[:2] for state in o.state.values()}
    assert steps == {4}, "each has made one of its own"


def test_step_sizes_are_the_configurations(robot: RobotSpec, batch: ChunkBatch) -> None:
    old, new = tiny_agent(robot), tiny_agent(robot, policy_lr=1e-5)
    old.update_offline(batch)
    new.load_state_dict(old.state_dict())
    assert new.policy_optimizer.param_groups[0]["lr"] == 1e-5 != old.policy_optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("network", ["policy", "reference", "target_critic"])
def test_a_weight_anywhere_that_is_not_finite_is_noticed(robot: RobotSpec, network: str) -> None:
    agent = tiny_agent(robot)
    assert agent.is_finite
    with torch.no_grad():
        next(getattr(agent, network).parameters()).flatten()[0] = torch.nan
    assert not agent.is_finite


def test_flow_matching_as_the_regularizer_goes_on_cloning(robot: RobotSpec, batch: ChunkBatch) -> None:
    agent = tiny_agent(robot, policy_delay=1, bc_loss="flow-matching", bc_coef=10.0, policy_lr=1e-3)
    losses = [float(agent.update_online(batch)["policy/distance_to_data"]) for _ in range(100)]
    assert np.mean(losses[-20:]) < 0.9 * np.mean(losses[:20])


def test_what_the_critic_learns_toward(robot: RobotSpec, batch: ChunkBatch) -> None:
    """r + discount (min or mean Q'(s', a') - alpha (log p(a') + reference)) over windows with a return, by hand."""
    for how in ("min", "mean"):
        agent = tiny_agent(robot, critic_aggregate=how, initial_temperature=1e-2)
        half = replace(batch, critic_valid=np.arange(32) < 16)
        ours = agent._on_device(half)
        noise = agent._draw_next(ours)
        with torch.no_grad():
            after = agent.policy.rollout(ours.next_observation, noise)
            members = agent.target_critic(agent.policy.normalize(ours.next_observation), after.action)
            value = members.min(0).values if how == "min" else members.mean(0)
            bonus = -1e-2 * (after.log_prob + agent.policy.reference_entropy)
            target = ours.reward + ours.discount * (value + bonus)
            error = agent.critic(agent.policy.normalize(ours.observation), ours.chunk) - target
        loss, _ = agent._critic_loss(ours, noise)
        torch.testing.assert_close(loss, error[:, :16].square().mean())
        assert bonus.abs().max() > 1e-3, "it counts"


def test_value_scale_makes_the_pull_to_the_data_mean_the_same_for_any_reward(
    robot: RobotSpec, batch: ChunkBatch
) -> None:
    def actor_loss(factor: float, *, normalize_q: bool) -> float:
        agent = tiny_agent(robot, normalize_q=normalize_q, temperature="zero")
        critic = agent.critic.forward
        agent.critic.forward = lambda *args: factor * critic(*args)  # type: ignore[method-assign]
        ours = agent._on_device(batch)
        noise = agent.policy.draw(32, torch.Generator().manual_seed(0))
        return agent._actor_loss(ours, noise, None, torch.tensor(0.1)).loss.item()

    assert actor_loss(1000.0, normalize_q=True) == pytest.approx(actor_loss(100.0, normalize_q=True), rel=1e-4)
    assert actor_loss(1000.0, normalize_q=False) != pytest.approx(actor_loss(100.0, normalize_q=False), rel=1e-2)


def test_policy_moves_only_every_policy_delay_and_critic_gets_no_actor_gradient(
    robot: RobotSpec, batch: ChunkBatch
) -> None:
    agent = tiny_agent(robot, policy_delay=2)
    before = [p.clone() for p in agent.policy.parameters()]
    assert "loss/actor" not in agent.update_online(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True))
    assert "loss/actor" in agent.update_online(batch)
    assert not all(torch.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True))
    before = [p.clone() for p in agent.policy.parameters()]
    for _ in range(2):
        agent.update_online(batch, critic_only=True)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True))
    for parameter in agent.critic.parameters():
        parameter.grad = None
    before = [p.clone() for p in agent.critic.parameters()]
    agent._update_policy(agent._on_device(batch))
    for old, parameter in zip(before, agent.critic.parameters(), strict=True):
        assert parameter.requires_grad and parameter.grad is None and torch.equal(old, parameter)


def test_actor_follows_the_critic(robot: RobotSpec, batch: ChunkBatch) -> None:
    """With a critic that prefers larger actions and no regularization, the actions grow."""
    agent = tiny_agent(robot, bc_coef=0.0, temperature="zero", policy_delay=1, critic_lr=0.0, policy_lr=1e-3)
    agent.critic.forward = lambda observation, action: action.sum(-1).expand(2, -1)  # type: ignore[method-assign]
    observation = batch.observation[:8]
    noise = np.random.default_rng(0).standard_normal((8, 5, 7)).astype(np.float32)
    agent.config = replace(agent.config, learner=replace(agent.config.learner, ema_rate=1.0))
    agent._average()
    start = agent.act(observation, noise).mean()
    for _ in range(40):
        agent._update_policy(agent._on_device(batch))
    assert agent.act(observation, noise).mean() > start + 0.2


def test_temperature_stays_within_its_bounds(robot: RobotSpec, batch: ChunkBatch) -> None:
    bounds = (5e-4, 2e-3)
    for target, limit in ((-100.0, bounds[1]), (100.0, bounds[0])):
        agent = tiny_agent(robot, target_entropy_per_dim=target, temperature_bounds=bounds, alpha_lr=0.1)
        for _ in range(30):
            agent.update_online(batch)
        assert agent.temperature.item() == pytest.approx(limit, rel=1e-4)


def test_zero_temperature_is_a_mode_of_its_own(robot: RobotSpec, batch: ChunkBatch) -> None:
    agent = tiny_agent(robot, temperature="zero")
    before = agent.log_temperature.item()
    for _ in range(4):
        metrics = agent.update_online(batch)
    assert metrics["policy/temperature"].item() == 0 and agent.log_temperature.item() == before


def test_target_critic_and_average_policy_lag(robot: RobotSpec, batch: ChunkBatch) -> None:
    agent = tiny_agent(robot, tau=0.25, ema_rate=0.25)
    before = [p.clone() for p in agent.target_critic.parameters()]
    agent.update_offline(batch)
    for old, target, latest in zip(before, agent.target_critic.parameters(), agent.critic.parameters(), strict=True):
        torch.testing.assert_close(target, old + 0.25 * (latest - old))
    assert not any(p.requires_grad for p in agent.average_policy.parameters())


def test_acting_is_deterministic_exploring_is_not(robot: RobotSpec) -> None:
    agent = tiny_agent(robot)
    observation = np.zeros((2, 19), np.float32)
    noise = np.random.default_rng(0).standard_normal((2, 5, 7)).astype(np.float32)
    assert np.array_equal(agent.act(observation, noise), agent.act(observation, noise))
    assert not np.array_equal(agent.explore(observation, noise), agent.explore(observation, noise))
    assert agent.explore(observation, noise).shape == (2, 5, 7)


def test_arms_with_other_bounds_are_refused(robot: RobotSpec) -> None:
    with pytest.raises(UsageError, match="beyond -1 to 1"):
        tiny_agent(replace(robot, action_high=(2.0,) * 7))


def test_divergence_shows(robot: RobotSpec) -> None:
    agent = tiny_agent(robot)
    assert agent.is_finite
    with torch.no_grad():
        next(agent.critic.parameters())[0, 0, 0] = float("nan")
    assert not agent.is_finite


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_computes_what_the_cpu_does(robot: RobotSpec, batch: ChunkBatch) -> None:
    config = TrainConfig(flow=FLOW)
    cpu, cuda = (make_agent(robot, config, torch.device(name)) for name in ("cpu", "cuda"))
    cuda.policy.load_state_dict(cpu.policy.state_dict())
    cuda.average_policy.load_state_dict(cpu.policy.state_dict())
    observation = batch.observation[:8]
    noise = np.random.default_rng(0).standard_normal((8, 5, 7)).astype(np.float32)
    np.testing.assert_allclose(cuda.act(observation, noise), cpu.act(observation, noise), atol=1e-4)
    for _ in range(4):
        cuda.update_offline(batch)
        assert all(value.isfinite() for value in cuda.update_online(batch).values())


def test_devices_by_name() -> None:
    assert pick_device("cpu").type == "cpu"
    for name in ("abacus", "cuda:99", "meta"):
        with pytest.raises(UsageError, match="try --device cpu"):
            pick_device(name)


@pytest.mark.slow
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_compiled_updates_are_those_that_are_not(
    robot: RobotSpec, batch: ChunkBatch, algo: AlgorithmName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config = preset("lift", algo=algo, from_scratch=algo == "sac")
    learner = replace(config.learner, critic_width=32, critic_depth=2, batch_size=32, policy_delay=1)
    flow = replace(config.flow, width=32, depth=2, gate_width=16)
    config = replace(config, chunk_length=5, precision="float32", flow=flow, learner=learner)
    plain, compiled = (make_agent(robot, replace(config, compile=how), torch.device("cpu")) for how in ("off", "on"))
    for agent in (plain, compiled):
        for _ in range(2):
            agent.update_offline(batch)
        agent.begin_online()
        for _ in range(2):
            agent.update_online(batch)
    assert compiled.compute.compiled and not compiled.compute.note
    for a, b in zip(plain.policy.parameters(), compiled.policy.parameters(), strict=True):
        # Adam's first steps are of the sign of the gradient, which rounding turns where it is next to nothing.
        moved = 4 * config.learner.policy_lr
        assert (a - b).abs().max() <= 2.1 * moved and (a - b).abs().mean() < 0.02 * moved
