"""Offline-to-online runs on the task of two ways, and what their policies are judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.envs.collector import rollout
from sacflow_robot.envs.vector import ThreadVectorEnv
from sacflow_robot.learn.algorithms.agent import Agent
from sacflow_robot.learn.algorithms.sac_flow import SacFlow
from sacflow_robot.learn.config import FlowConfig, LearnerConfig, TrainConfig
from sacflow_robot.study import two_ways
from sacflow_robot.study.options import Budget
from sacflow_robot.study.runs import train
from sacflow_robot.utils.seeding import EVAL_SEED, TRAINING_SEED

_ENVS, _NEIGHBORS = 8, 10
Path = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Outcome:
    """Result of a run.

    Attributes:
        agent: The agent, trained.
        observations: What it has seen (N, 2).
        paths: Positions (T + 1, 2) of each episode that it was judged by.
        solved: Which of them arrived.
        finished: False where training diverged.
        figures: ``success_rate``; ``rarer_way``; ``mean_steps`` of episodes solved; ``action_distance``, from each action to
            the nearest one demonstrated about there (1 is full speed).
    """

    agent: SacFlow
    observations: Path
    paths: list[Path]
    solved: list[bool]
    finished: bool
    figures: dict[str, float]


def trial_config(budget: Budget, seed: int, flow: FlowConfig | None = None, **learner: Any) -> TrainConfig:
    """Configuration of a run; by default a flow-g, no regularizer."""
    full = budget.full
    chosen = LearnerConfig(
        batch_size=256 if full else 128,
        discount=0.97,
        policy_lr=3e-4 if full else 1e-3,
        critic_lr=3e-4 if full else 1e-3,
        critic_width=512 if full else 128,
        critic_depth=4 if full else 2,
        utd_ratio=1.0 if full else 0.3,
        policy_delay=1,
        warmup_steps=min(1500, budget.online_steps // 4),
        clone="all",
        bc_coef=0.0,
    )
    sizes = FlowConfig(width=512, depth=4, gate_width=256) if full else FlowConfig(width=128, depth=2, gate_width=64)
    return TrainConfig(
        env="two-ways",
        demos="none",
        seed=seed,
        device=budget.device,
        compile="off",
        precision="float32",
        offline_steps=budget.offline_steps,
        online_steps=budget.online_steps,
        eval_episodes=0,
        num_envs=_ENVS,
        flow=flow or sizes,
        learner=replace(chosen, **learner),
    )


def run_trial(
    config: TrainConfig,
    budget: Budget,
    cloned: dict[str, Any] | None = None,
    prepare: Callable[[Agent], None] | None = None,
) -> Outcome:
    """Train, and judge the policy as it would be exported.

    Args:
        config: From :func:`trial_config`.
        budget: Its demonstrations and episodes.
        cloned: State of an agent to go on from instead of cloning.
        prepare: Called with the agent before its first update.
    """
    demos = two_ways.demonstrate(range(TRAINING_SEED, TRAINING_SEED + budget.demos))
    envs = ThreadVectorEnv([two_ways.TwoWays() for _ in range(_ENVS)], background=False)
    trainer, finished = train(config, envs, demos, cloned, prepare)
    shape = config.chunk_length, envs.spec.action_dim
    seeds = range(EVAL_SEED, EVAL_SEED + budget.episodes)
    episodes = sorted(rollout(envs, shape, trainer.act, seeds), key=lambda e: int(e.info["seed"]))
    paths = [episode.observations["position"] for episode in episodes]
    solved = [episode.success for episode in episodes]
    figures = {
        "success_rate": float(np.mean(solved)),
        "rarer_way": rarer_way([p for p, success in zip(paths, solved, strict=True) if success]),
        "mean_steps": float(np.mean([len(e) for e in episodes if e.success])) if any(solved) else float("nan"),
        "action_distance": action_distance(
            np.concatenate([p[:-1] for p in paths]),
            np.concatenate([e.action for e in episodes]),
            np.concatenate([e.observations["position"][:-1] for e in demos]),
            np.concatenate([e.action for e in demos]),
        ),
    }
    assert isinstance(trainer.agent, SacFlow)
    return Outcome(trainer.agent, trainer.buffer.observations(), paths, solved, finished, figures)


def rarer_way(paths: Sequence[Path]) -> float:
    """Share of paths that take the side that fewer take: 0.5 where both are kept alike, 0 where one is lost."""
    sides = [two_ways.side_taken(path) for path in paths]
    left, right = sides.count(-1), sides.count(1)
    return min(left, right) / max(left + right, 1)


def action_distance(points: Path, actions: Path, data_points: Path, data_actions: Path) -> float:
    """Mean distance of actions (N, A) at points (N, P) to the nearest of the data's actions (M, A) about there.

    About there are the 10 of the data's points (M, P) that are nearest.
    """
    count = min(_NEIGHBORS, len(data_points))
    total = 0.0
    for point, action in zip(points, actions, strict=True):
        near = np.argpartition(((data_points - point) ** 2).sum(-1), count - 1)[:count]
        total += float(np.linalg.norm(data_actions[near] - action, axis=-1).min())
    return total / len(points)
