"""Comparison of the compiled step with robosuite's own over whole episodes."""

from dataclasses import dataclass
from typing import Literal, get_args

import mujoco
import numpy as np

from sacflow_robot.envs.compiled_env import CompiledEnv
from sacflow_robot.envs.experts.expert import make_expert
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.episode import StepResult
from sacflow_robot.spec import FloatArray

Kind = Literal["random", "expert", "extreme"]
KINDS: tuple[Kind, ...] = get_args(Kind)

TOLERANCE = 1e-9  # m, rad, and per second


@dataclass(frozen=True)
class Comparison:
    """One episode under both engines."""

    steps: int  # control steps taken
    step_deviation: float  # largest difference in time, qpos and qvel after one control step from the same state
    free_deviation: float  # the same with both left to themselves from the start; contacts amplify rounding
    free_steps: int  # control steps for which that stays within 1e-9
    # true if observations, rewards, ends and success were equal in every step: all of them as computed from the same
    # state, and rewards, ends and success also after the step from the same state
    alike: bool


class Comparer:
    """Compares three robots of one task: the stock engine's, a compiled one that is set to its state before each step, and
    a free one, of the stripped model that robots in threads have."""

    def __init__(self, task: str) -> None:
        self.task = task
        self._stock = RobosuiteEnv(task)
        self._following = RobosuiteEnv(task, engine="compiled")
        self._free = CompiledEnv(task)

    @property
    def engine(self) -> str:
        return self._following.engine

    def episode(self, kind: Kind, seed: int, steps: int) -> Comparison:
        """Take ``steps`` control steps, beyond success if need be."""
        stock, following, free = self._stock, self._following, self._free
        expert, rng = make_expert(self.task, seed, "mixed"), np.random.default_rng(seed)
        seen = stock.begin(seed)
        alike = _equal(seen, following.begin(seed)) and _equal(seen, free.begin(seed))
        worst = free_worst = 0.0
        free_steps = 0
        held = np.zeros(7, np.float32)
        for _ in range(steps):
            if kind == "expert" and not expert.done:
                action = expert.act(seen.observation)
            elif kind == "extreme":
                held = np.where(rng.uniform(size=7) < 0.1, np.sign(rng.normal(size=7)), held).astype(np.float32)
                action = held
            else:
                action = rng.uniform(-1, 1, 7).astype(np.float32)
            mujoco.mj_copyData(following.data, following.model, stock.data)
            seen, theirs = stock.command(action), following.command(action)
            worst = max(worst, _deviation(seen, theirs))
            free_worst = max(free_worst, _deviation(seen, free.command(action)))
            free_steps += free_worst < TOLERANCE
            ours, other = ((r.reward, r.terminated, r.truncated) for r in (seen, theirs))
            mujoco.mj_copyData(following.data, following.model, stock.data)
            observation, solved = following.observe()
            alike &= ours == other and _same(seen.observation, observation) and solved == seen.terminated
        return Comparison(steps, worst, free_worst, free_steps, alike)


def _deviation(a: StepResult, b: StepResult) -> float:
    return float(np.abs(np.asarray(a.state) - np.asarray(b.state)).max())


def _equal(a: StepResult, b: StepResult) -> bool:
    return _deviation(a, b) == 0 and _same(a.observation, b.observation)


def _same(a: dict[str, FloatArray], b: dict[str, FloatArray]) -> bool:
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and np.array_equal(a[key], b[key]) for key in a)
