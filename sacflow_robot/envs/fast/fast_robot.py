"""One simulated robot under the compiled control step."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import mujoco
import numpy as np
import numpy.typing as npt

from sacflow_robot.envs.fast import kernels, observation
from sacflow_robot.envs.fast.compilation import compiling
from sacflow_robot.envs.fast.plan import make_plan, stacked_check
from sacflow_robot.envs.fast.step_data import ACTION, ARM, DELAYED, TERM_SIZES, Memory, Plan, Views
from sacflow_robot.envs.fast.strip_visuals import strip_visuals
from sacflow_robot.spec import FloatArray


class CompiledTask:
    """Model, plan and goal of a task, shared by all robots that perform it.

    Args:
        suite: robosuite's environment.
        task: Name of the task.
        state_size: S.

    Attributes:
        model: The model without visual geoms.

    Raises:
        NotCoveredError: The compiled step does not cover it.
    """

    def __init__(self, suite: Any, task: str, state_size: int) -> None:
        self.model = strip_visuals(suite)
        self.plan: Plan = make_plan(suite, task)
        self.contact_check = partial(stacked_check, suite) if self.plan.goal_contacts else None
        self.state_size = state_size
        self.observation_size = 9 + sum(TERM_SIZES[kind] for kind in self.plan.terms[:, 0])


class Motion(NamedTuple):
    """Record of a robot that followed commands."""

    observations: FloatArray  # (M, D) flattened
    joints: npt.NDArray[np.float64]  # (M, 7) positions (rad)
    states: npt.NDArray[np.float64]  # (M, S)
    solved: bool  # true if the last state solves the task


class FastRobot:
    """An ``mjData`` that is stepped without the interpreter.

    Args:
        task: The task.
        model: Its model, which other robots may share.
        data: Stepped in place.
    """

    def __init__(self, task: CompiledTask, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        self._task = task
        self._model = model
        self._data = data
        self.plan = task.plan
        # Nothing reads the force and torque sensors at the wrist; without them the motion is the same to the last bit.
        model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_SENSOR)
        self._contacts = None if task.contact_check is None else task.contact_check(model)
        self._views = Views(
            data.qpos, data.qvel, data.ctrl, data.qfrc_bias, data.qM, data.xpos, data.xquat, data.site_xpos,
            data.site_xmat,
        )  # fmt: skip
        self._memory = Memory(np.zeros(1), np.zeros(ARM), np.zeros(2), np.zeros((6, model.nv)), np.zeros(12),
                              np.zeros(1), np.zeros(2), np.full((DELAYED + 2, ARM), np.nan))  # fmt: skip
        self._placed = np.zeros(0)

    def begin(self, state: npt.NDArray[np.float64], rest: npt.NDArray[np.float64] | None = None) -> None:
        """Start an episode at a state (S,), which the ``mjData`` is in already.

        Args:
            state: The state.
            rest: Joint positions (7,) to which the robot's nullspace is pulled; those of the state if None.
        """
        moving = 1 + self._model.nq + self._model.nv
        self._placed = state[moving:].copy()
        self._memory.time[0] = self._data.time
        self._memory.rest[:] = self._data.qpos[self.plan.joints] if rest is None else rest
        for array in (self._memory.fingers, self._memory.valid, self._memory.gripping):
            array[:] = 0.0
        self._memory.torques[:] = np.nan

    def physics_only(self, states: npt.NDArray[np.float64], controls: npt.NDArray[np.float64]) -> None:
        """The physics alone of a control step from each of the states (T, S), with motor controls (T, nu)."""
        kernels.physics_only(
            self._model._address, self._data._address, self._views, states, controls, self.plan.substeps
        )

    def observe(self) -> FloatArray:
        """The flattened observation (D,) of the present state."""
        out = np.empty(self._task.observation_size, np.float32)
        observation.observe(self._views, self.plan, out)
        return out

    def solved(self) -> bool:
        """True if the present state solves the task."""
        at_goal = bool(observation.at_goal(self._views, self.plan))
        return at_goal and (self._contacts is None or self._contacts(self._data))

    def execute(self, actions: npt.NDArray[np.float64]) -> tuple[FloatArray, npt.NDArray[np.float64], bool]:
        """Execute actions (H, 7), stopping early when the task is solved.

        Returns:
            Observations (h, D) and states (h, S) after each of the h actions executed; True if the last solved the task.
        """
        observations = np.empty((len(actions), self._task.observation_size), np.float32)
        states = np.empty((len(actions), self._task.state_size))
        states[:, states.shape[1] - len(self._placed) :] = self._placed
        done, solved = 0, False
        while done < len(actions) and not solved:
            done += kernels.execute(
                self._model._address, self._data._address, self._views, self.plan, self._memory,
                actions[done:], observations[done:], states[done:],
            )  # fmt: skip
            solved = self.solved()
        return observations[:done], states[:done], solved

    def follow(self, commands: npt.NDArray[np.float64], every: int, rows: int, period: int) -> Motion:
        """Take up commands at their times; see ``kernels.follow``.

        Args:
            commands: (N, 9) in order: substep at which it is taken up, substeps for which it is valid, action.
            every: Substeps between two observations.
            rows: Observations to make; fewer are made if the task is solved.
            period: Substeps between two movements of the fingers by one command.
        """
        made = Motion(
            np.empty((rows, self._task.observation_size), np.float32),
            np.empty((rows, ARM)),
            np.empty((rows, self._task.state_size)),
            False,
        )
        made.states[:, made.states.shape[1] - len(self._placed) :] = self._placed
        at_goal, done = np.zeros(rows, bool), 0
        given, solved = np.ascontiguousarray(commands, np.float64).reshape(-1, 2 + ACTION), False
        while done < rows and not solved:
            with compiling(kernels.follow):
                done += kernels.follow(
                    self._model._address, self._data._address, self._views, self.plan, self._memory, given, every, period,
                    made.observations[done:], made.joints[done:], made.states[done:], at_goal[done:],
                )  # fmt: skip
            solved = bool(at_goal[done - 1]) and self.solved()
            given = given[given[:, 0] >= done * every] - np.eye(1, given.shape[1])[0] * done * every
        return Motion(made.observations[:done], made.joints[:done], made.states[:done], solved)
