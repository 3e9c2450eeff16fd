"""robosuite task under the compiled control step: a chunk of actions is one call without the interpreter's lock."""

import copy
import threading
from functools import cache

import mujoco
import numpy as np

from sacflow_robot.envs.environment import SimulatedEnv
from sacflow_robot.envs.fast.fast_robot import FastRobot
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.state import State
from sacflow_robot.episode import StepResult
from sacflow_robot.spec import Engine, FloatArray


class CompiledEnv(SimulatedEnv):
    """One robot of a task; those of one process share robosuite's environment, which draws their starts.

    Raises:
        UnknownNameError: No such task.
        NotCoveredError: The compiled step does not cover it.
    """

    engine: Engine = "compiled"

    def __init__(self, task: str) -> None:
        self._shared = shared_task(task)
        self.robot = self._shared.env.robot
        self._layout = self._shared.env.layout
        self._model = self._shared.model()
        self._data = mujoco.MjData(self._model)
        self._robot = FastRobot(self._shared.task, self._model, self._data)
        self._steps_left = 0

    def begin(self, seed: int | np.random.Generator) -> StepResult:
        """Start the episode that a seed decides, or the next one that a generator draws."""
        return self.begin_at(self._shared.draw_start(np.random.default_rng(seed)))

    def begin_at(self, state: State) -> StepResult:
        self._layout.write(state, self._model, self._data)
        self._robot.begin(state)
        self._steps_left = self._shared.env.task.horizon
        return StepResult(self.robot.unflatten(self._robot.observe()), state=state)

    def command(self, action: FloatArray) -> StepResult:
        return self.execute(action[None])[0]

    def execute(self, chunk: FloatArray) -> list[StepResult]:
        actions = np.array([self.robot.check_action(a) for a in chunk[: self._steps_left]], np.float64)
        flat, states, solved = self._robot.execute(actions)
        self._steps_left -= len(flat)
        observations = map(self.robot.unflatten, flat)
        results = [StepResult(seen, state=state) for seen, state in zip(observations, states, strict=True)]
        truncated = not solved and self._steps_left == 0
        results[-1] = StepResult(results[-1].observation, float(solved), solved, truncated, states[-1])
        return results


class _SharedTask:
    """Model and checked compiled step of a task, and the stock environment that draws starts."""

    def __init__(self, task: str) -> None:
        self.env = RobosuiteEnv(task)
        self.task = self.env.compile_task()
        self._lock = threading.Lock()
        self._model: mujoco.MjModel | None = None

    def model(self) -> mujoco.MjModel:
        """The model of a new robot: the same for all, except where episodes place bodies in it."""
        with self._lock:
            if self._model is None or self.env.layout.placed:
                self._model = copy.copy(self.task.model)
            return self._model

    def draw_start(self, rng: np.random.Generator) -> State:
        """A state (S,) in which robosuite starts an episode."""
        with self._lock:
            return self.env.draw_start(rng)


shared_task = cache(_SharedTask)
