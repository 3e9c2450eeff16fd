"""One simulated robot under the compiled control step, its model without visual geoms, and a check against robosuite."""

import copy
from functools import partial
from typing import Any, NamedTuple

import mujoco
import numpy as np

from sacflow_robot.envs.fast import kernels, observation
from sacflow_robot.envs.fast.compilation import compiling
from sacflow_robot.envs.fast.plan import NotCoveredError, make_plan, stacked_check
from sacflow_robot.envs.fast.step_data import ACTION, ARM, DELAYED, TERM_SIZES, Memory, Plan, Views
from sacflow_robot.envs.state import StateLayout
from sacflow_robot.episode import StepResult
from sacflow_robot.spec import Array, FloatArray, RobotSpec

_MOVES = ("body_", "jnt_", "dof_", "actuator_", "eq_", "tendon_", "qpos", "site_pos", "site_quat", "site_bodyid")
_OF_GEOMS = ("body_geom", "body_bvh", "body_rbound", "body_plugin", "dof_length")  # lists of geoms, not motion
_GEOM = ("type", "contype", "conaffinity", "condim", "priority", "size", "pos", "quat", "friction", "solref", "solimp",
         "solmix", "margin", "gap", "rbound", "aabb", "bodyid")  # fmt: skip


def strip_visuals(suite: Any) -> mujoco.MjModel:
    """The model of a robosuite environment without visual geoms and their meshes; it moves the same to the last bit.

    MuJoCo clears a flag for every node of every mesh's bounding volumes in each step, 364 kB in the Panda's scene; without
    the visual meshes it is 29 kB, and the whole model is 3 MB instead of 64. Bodies, joints, motors and sites keep their
    ids, geoms do not.

    Returns:
        The stripped model; a copy of the whole one if anything that moves differs between the two.
    """
    whole = suite.sim.model._model
    spec = mujoco.MjSpec.from_string(suite.model.get_xml())
    spec.compiler.discardvisual = True
    stripped = spec.compile()
    stripped.body_pos[:] = whole.body_pos  # resets place bodies in the model itself
    stripped.body_quat[:] = whole.body_quat
    return stripped if _moves_the_same(stripped, whole) else copy.copy(whole)


def _moves_the_same(stripped: mujoco.MjModel, whole: mujoco.MjModel) -> bool:
    arrays = [
        (getattr(stripped, name), getattr(whole, name))
        for name in dir(whole)
        if name.startswith(_MOVES) and not name.startswith(_OF_GEOMS)
    ]
    colliding = np.flatnonzero(whole.geom_contype | whole.geom_conaffinity)
    kept = np.flatnonzero(stripped.geom_contype | stripped.geom_conaffinity)
    if len(kept) != len(colliding):
        return False
    arrays += [(getattr(stripped, f"geom_{name}")[kept], getattr(whole, f"geom_{name}")[colliding]) for name in _GEOM]
    arrays += [(getattr(stripped.opt, n), getattr(whole.opt, n)) for n in dir(whole.opt) if not n.startswith("_")]
    return all(callable(a) or np.array_equal(a, b) for a, b in arrays)


class CompiledTask:
    """Model (without visual geoms), plan and goal of a task of robosuite's, shared by all robots that perform it.

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
    joints: Array  # (M, 7) positions (rad)
    states: Array  # (M, S)
    solved: bool  # true if the last state solves the task


class FastRobot:
    """An ``mjData`` that is stepped in place without the interpreter; other robots may share its model."""

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

    def begin(self, state: Array, rest: Array | None = None) -> None:
        """Start an episode at a state (S,), which the ``mjData`` is in already.

        The robot's nullspace is pulled to joint positions ``rest`` (7,); to those of the state if None.
        """
        moving = 1 + self._model.nq + self._model.nv
        self._placed = state[moving:].copy()
        self._memory.time[0] = self._data.time
        self._memory.rest[:] = self._data.qpos[self.plan.joints] if rest is None else rest
        for array in (self._memory.fingers, self._memory.valid, self._memory.gripping):
            array[:] = 0.0
        self._memory.torques[:] = np.nan

    def physics_only(self, states: Array, controls: Array) -> None:
        """The physics alone of a control step from each of the states (T, S), with motor controls (T, nu)."""
        addresses = self._model._address, self._data._address
        kernels.physics_only(*addresses, self._views, states, controls, self.plan.substeps)

    def observe(self) -> FloatArray:
        """The flattened observation (D,) of the present state."""
        out = np.empty(self._task.observation_size, np.float32)
        observation.observe(self._views, self.plan, out)
        return out

    def solved(self) -> bool:
        """True if the present state solves the task."""
        at_goal = bool(observation.at_goal(self._views, self.plan))
        return at_goal and (self._contacts is None or self._contacts(self._data))

    def execute(self, actions: Array) -> tuple[FloatArray, Array, bool]:
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

    def follow(self, commands: Array, every: int, rows: int, period: int) -> Motion:
        """Take up commands (N, 9), making ``rows`` observations, or fewer if the task is solved; see ``kernels.follow``."""
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


CHECK_ACTION = np.array([0.3, -0.2, -0.5, 0.1, -0.3, 0.2, 1.0], np.float32)
_TOLERANCE = 1e-9  # m, rad, and per second, after one control step


def check_step(task: CompiledTask, layout: StateLayout, spec: RobotSpec, start: StepResult, stock: StepResult) -> None:
    """Check the compiled step before it is used: from ``start``, ``CHECK_ACTION`` has to lead where it led the stock engine.

    Raises:
        NotCoveredError: The two differ.
    """
    data, state = mujoco.MjData(task.model), np.asarray(start.state)
    layout.write(state, task.model, data)
    robot = FastRobot(task, task.model, data)
    robot.begin(state)
    first = robot.observe()
    observations, states, solved = robot.execute(CHECK_ACTION[None].astype(np.float64))
    difference = float(np.abs(states[0] - np.asarray(stock.state)).max())
    if not difference < _TOLERANCE:
        raise NotCoveredError(f"it differs from robosuite's by {difference:.1e} after one step on this machine")
    for compiled, result in ((first, start), (observations[0], stock)):
        if not np.allclose(compiled, spec.flatten(result.observation), rtol=0, atol=1e-6):
            raise NotCoveredError("it observes differently from robosuite on this machine")
    if solved != stock.terminated:
        raise NotCoveredError("it tells success differently from robosuite on this machine")
