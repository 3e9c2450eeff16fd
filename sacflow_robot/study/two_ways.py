"""A task in the plane with two equally good ways, round an obstacle, left or right; demonstrations of both, offline-to-online
runs on it, and what their policies are judged by.

A point starts below a disc and has to reach a goal above it. The demonstrations take wide, slow detours, half of them on
either side, and a few hit the disc. So the mean of the data's actions leads into the disc, the data can be improved on
(closer round the disc, faster), and nothing in the reward prefers a side.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sacflow_robot.envs.collector import rollout
from sacflow_robot.envs.environment import SimulatedEnv
from sacflow_robot.envs.vector import ThreadVectorEnv
from sacflow_robot.episode import NOMINAL_CLOCK, Episode, EpisodeBuilder, Source, StepResult
from sacflow_robot.learn.algorithms.agent import Agent
from sacflow_robot.learn.algorithms.sac_flow import SacFlow
from sacflow_robot.learn.config import FlowConfig, LearnerConfig, TrainConfig
from sacflow_robot.spec import ArraySpec, FloatArray, RobotSpec
from sacflow_robot.study.options import TrialOptions
from sacflow_robot.study.runs import train
from sacflow_robot.utils.seeding import EVAL_SEED, TRAINING_SEED

_DEMOS, _ENVS, _NEIGHBORS = 200, 8, 10
Path = npt.NDArray[np.float32]

STEP = 0.1  # meters that an action of 1 moves the point
OBSTACLE, GOAL = 0.4, 0.15  # radii (m)
START_AT, GOAL_AT = np.array([0.0, -1.0]), np.array([0.0, 1.0])
HORIZON = 80
_BOUND = 1.3  # walls (m)
_START_SPREAD = 0.05
_DETOUR = 0.85  # how far off the middle the demonstrations pass (m), on average
_SPEED, _SHAKE = 0.55, 0.25  # of the demonstrations, in units of the action


class TwoWays(SimulatedEnv):
    """The task as a simulated robot: position (2,) in meters in, velocity command (2,) in [-1, 1] out.

    Reward 1 at the goal, which ends the episode; hitting the disc ends it too, without.
    """

    def __init__(self) -> None:
        self.robot = RobotSpec(
            robot="point",
            task="two-ways",
            controller="velocity",
            control_rate_hz=10.0,
            observations=(ArraySpec("position", (2,), "m", "world"),),
            action_names=("x", "y"),
            action_units=(f"{STEP} m",) * 2,
            action_low=(-1.0,) * 2,
            action_high=(1.0,) * 2,
        )
        self._at, self._steps = START_AT.copy(), 0

    def begin(self, seed: int) -> StepResult:
        """Start the episode that this seed decides."""
        self._at = START_AT + np.random.default_rng(seed).uniform(-_START_SPREAD, _START_SPREAD, 2)
        self._steps = 0
        return StepResult(self._observation(), success=False)

    def command(self, action: FloatArray) -> StepResult:
        """Execute one action (2,)."""
        before, self._steps = self._at, self._steps + 1
        self._at = np.clip(before + STEP * np.clip(action, -1, 1), -_BOUND, _BOUND)
        hit = distance_to_segment(before, self._at) < OBSTACLE
        solved = not hit and float(np.linalg.norm(self._at - GOAL_AT)) < GOAL
        ended = bool(hit or solved)
        late = self._steps >= HORIZON and not ended
        return StepResult(self._observation(), float(solved), ended, late, success=bool(solved))

    def _observation(self) -> dict[str, FloatArray]:
        return {"position": self._at.astype(np.float32)}


def demonstrate(seeds: Iterable[int]) -> list[Episode]:
    """An episode for each seed: slow, shaky detours, the side drawn by lot."""
    env, episodes = TwoWays(), []
    for seed in seeds:
        rng = np.random.default_rng([seed, 1])
        side = rng.choice([-1.0, 1.0])
        via = np.array([side * rng.normal(_DETOUR, 0.12), rng.normal(0.0, 0.1)])
        result, passed = env.begin(seed), False
        builder = EpisodeBuilder(result, period_ns=env.robot.period_ns)
        while not result.ended:
            at = result.observation["position"]
            passed = passed or bool(np.linalg.norm(via - at) < 0.15)
            toward = (GOAL_AT if passed else via) - at
            aim = _SPEED * toward / max(float(np.linalg.norm(toward)), 1e-6)
            action = np.clip(aim + _SHAKE * rng.standard_normal(2), -1, 1).astype(np.float32)
            result = env.command(action)
            builder.add(result, action, source=Source.EXPERT)
        episodes.append(builder.build(task=env.robot.task, seed=seed, clock=NOMINAL_CLOCK))
    return episodes


def side_taken(path: npt.NDArray[Any]) -> int:
    """-1 where a path (T + 1, 2) passes the disc's middle on the left, 1 on the right, 0 where it never comes so far."""
    above = np.flatnonzero(path[:, 1] >= 0)
    return int(np.sign(path[above[0], 0])) if len(above) else 0


def distance_to_segment(start: npt.NDArray[Any], end: npt.NDArray[Any]) -> float:
    """From the origin to the segment between two points (2,)."""
    along = end - start
    length = float(along @ along)
    share = 0.0 if length == 0 else float(np.clip(-(start @ along) / length, 0, 1))
    return float(np.linalg.norm(start + share * along))


class Outcome(NamedTuple):
    """Result of a run.

    Attributes:
        agent: The trained agent.
        observations: Observations (N, 2) in its replay buffer.
        paths: Positions (T + 1, 2) of each evaluation episode.
        solved: Whether each of these episodes arrived.
        finished: Whether training finished; false if it diverged.
        figures: ``success_rate``; ``rarer_way``, see :func:`rarer_way`; ``mean_steps`` of solved episodes; ``action_distance``
            from each action to the nearest one demonstrated near there (1 is full speed).
    """

    agent: SacFlow
    observations: Path
    paths: list[Path]
    solved: list[bool]
    finished: bool
    figures: dict[str, float]


def trial_config(options: TrialOptions, seed: int, flow: FlowConfig | None = None, **learner: Any) -> TrainConfig:
    """Configuration of a run; by default a flow-g, no regularizer."""
    full, (offline_steps, online_steps) = options.full, options.steps
    chosen = LearnerConfig(
        batch_size=256 if full else 128,
        discount=0.97,
        policy_lr=3e-4 if full else 1e-3,
        critic_lr=3e-4 if full else 1e-3,
        critic_width=512 if full else 128,
        critic_depth=4 if full else 2,
        utd_ratio=1.0 if full else 0.3,
        policy_delay=1,
        warmup_steps=min(1500, online_steps // 4),
        clone="all",
        bc_coef=0.0,
    )
    sizes = FlowConfig(width=512, depth=4, gate_width=256) if full else FlowConfig(width=128, depth=2, gate_width=64)
    return TrainConfig(
        env="two-ways",
        demos="none",
        seed=seed,
        device=options.device,
        compile="off",
        precision="float32",
        offline_steps=offline_steps,
        online_steps=online_steps,
        eval_episodes=0,
        num_envs=_ENVS,
        flow=flow or sizes,
        learner=replace(chosen, **learner),
    )


def run_trial(
    config: TrainConfig,
    judged_by: int,
    cloned: dict[str, Any] | None = None,
    prepare: Callable[[Agent], None] | None = None,
) -> Outcome:
    """Train (see ``runs.train``), and judge the policy as it would be exported by so many episodes from starts held out."""
    demos = demonstrate(range(TRAINING_SEED, TRAINING_SEED + _DEMOS))
    envs = ThreadVectorEnv([TwoWays() for _ in range(_ENVS)], background=False)
    trainer, finished = train(config, envs, demos, cloned, prepare)
    shape = config.chunk_length, envs.spec.action_dim
    seeds = range(EVAL_SEED, EVAL_SEED + judged_by)
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
    sides = [side_taken(path) for path in paths]
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
