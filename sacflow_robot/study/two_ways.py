"""A task in the plane with two equally good ways, and demonstrations of both: round an obstacle, left or right.

A point starts below a disc and has to reach a goal above it. The demonstrations take wide, slow detours, half of them on
either side, and a few hit the disc. So the mean of the data's actions leads into the disc, the data can be improved on
(closer round the disc, faster), and nothing in the reward prefers a side.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.envs.environment import SimulatedEnv
from sacflow_robot.episode import NOMINAL_CLOCK, Episode, EpisodeBuilder, Source, StepResult
from sacflow_robot.spec import ArraySpec, FloatArray, RobotSpec

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
