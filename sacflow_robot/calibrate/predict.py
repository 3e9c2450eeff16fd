"""Motion of a robot of a given model: logged commands played into the simulator, window by window.

A window begins in the state that was observed there, so that what a model gets wrong adds up over a second or two and not
over an episode. A pure delay of commands moves a window's whole prediction in time, and is applied to the result.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

from sacflow_robot.envs import gl as gl  # before MuJoCo, which else loads OpenGL

# isort: split

import mujoco
import numpy as np

from sacflow_robot.calibrate.recording import Recording
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.robot_dynamics import RobotDynamics
from sacflow_robot.envs.robot_parameters import RobotParameters
from sacflow_robot.envs.transport import JOINT_POSITION
from sacflow_robot.errors import DataError
from sacflow_robot.spec import Array
from sacflow_robot.utils.rotations import normalize, rotation_between, without_jumps

_STATE_SPAN_S = 0.06  # readings on either side from which a state is estimated
_IK_STEPS, _IK_DAMPING = 60, 1e-3


@dataclass(frozen=True)
class Window:
    """A piece of a recording that is predicted by itself."""

    commands: Array  # (N, 9): seconds after the first one, seconds for which it is valid, action
    start: Array  # joint positions and velocities (2, 7) in rad and rad/s when the first command is acted on
    rest: Array  # joint positions (7,) when the recording began, to which the controller pulls the robot's nullspace
    time_s: Array  # capture times (M,) of what was observed, after the first command's sending
    position: Array  # gripper positions (M, 3) in m
    quat: Array  # orientations x y z w (M, 4)
    joints: Array | None  # joint positions (M, 7) in rad, or None
    seconds: float  # length of what is predicted


@dataclass(frozen=True)
class Predicted:
    """A prediction at the times of a window's observations: position (M, 3), quat (M, 4), joints (M, 7)."""

    position: Array
    quat: Array
    joints: Array


class Predictor:
    """The simulator of a task as a function from commands and a model to motion, without objects to touch."""

    def __init__(self, task: str) -> None:
        self._env = RobosuiteEnv(task, engine="compiled", step_rate_hz=500)
        self._robot = self._env.compiled
        self._env.model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_CONTACT)
        self._home = np.asarray(self._env.begin(0).state)
        self._step_s = float(self._env.model.opt.timestep)
        plan = self._robot.plan
        self._joints, self._dofs, self._site = plan.joints, plan.dofs, plan.grip_site
        self._body = plan.grip_body

    @cached_property
    def nominal(self) -> RobotParameters:
        """The simulator's own dynamics."""
        return RobotDynamics(self._env.model, self._robot.plan).nominal()

    def set(self, model: RobotParameters) -> None:
        """Predict a robot of this model from now on."""
        self._env.set_robot_model(model.part("controller", "joints", "payload"))

    def predict(self, window: Window, delay_s: float) -> Predicted:
        """Predict observations where commands are acted on ``delay_s`` after they were sent."""
        state = self._home.copy()
        data, model = self._env.data, self._env.model
        mujoco.mj_resetData(model, data)
        data.qpos[:], data.qvel[:] = state[1 : 1 + model.nq], 0
        data.qpos[self._joints], data.qvel[self._dofs] = window.start
        mujoco.mj_forward(model, data)
        self._robot.begin(state, window.rest)
        commands = window.commands.copy()
        commands[:, 1] = np.maximum(commands[:, 1] - delay_s, 0)  # it counts from the sending
        commands[:, :2] = np.round(commands[:, :2] / self._step_s)
        made = self._robot.follow(commands, 1, round(window.seconds / self._step_s), round(0.05 / self._step_s))
        grid = self._step_s * np.arange(1, len(made.joints) + 1)
        at = np.clip(window.time_s - delay_s, grid[0], grid[-1])
        seen = made.observations[:, :7].astype(np.float64)
        return Predicted(
            _between(at, grid, seen[:, :3]),
            normalize(_between(at, grid, without_jumps(seen[:, 3:]))),
            _between(at, grid, made.joints),
        )

    def forward(self, joints: Array) -> tuple[Array, Array]:
        """Position (M, 3) and orientation x y z w (M, 4) of the gripper at joint positions (M, 7)."""
        data, model = self._env.data, self._env.model
        positions, quats = np.empty((len(joints), 3)), np.empty((len(joints), 4))
        for i, row in enumerate(joints):
            data.qpos[self._joints] = row
            mujoco.mj_kinematics(model, data)
            positions[i], quats[i] = data.site_xpos[self._site], data.xquat[self._body][[1, 2, 3, 0]]
        return positions, quats

    def inverse(self, position: Array, quat: Array, velocity: Array) -> Array:
        """Joint positions and velocities (2, 7) of a gripper pose and velocity (6,), nearest to where episodes start."""
        data, model = self._env.data, self._env.model
        mujoco.mj_resetData(model, data)
        data.qpos[:] = self._home[1 : 1 + model.nq]
        jacobian = np.zeros((6, model.nv))
        for _ in range(_IK_STEPS):
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            mujoco.mj_jacSite(model, data, jacobian[:3], jacobian[3:], self._site)
            j = jacobian[:, self._dofs]
            turn = rotation_between(data.xquat[self._body][[1, 2, 3, 0]], quat)
            error = np.concatenate([position - data.site_xpos[self._site], turn])
            data.qpos[self._joints] += j.T @ np.linalg.solve(j @ j.T + _IK_DAMPING * np.eye(6), error)
        if np.abs(error).max() > 5e-3:
            raise DataError(
                "no joint positions of this robot reach the gripper pose observed; is the frame another one?"
            )
        return np.stack([data.qpos[self._joints], np.linalg.pinv(j) @ velocity])


def make_windows(
    recording: Recording, pieces: Sequence[tuple[int, int]], predictor: Predictor, delay_s: float
) -> list[Window]:
    """The windows of a recording.

    Args:
        pieces: First and one past the last command of each.
        predictor: For robots that do not observe their joints.
        delay_s: From sending a command to acting on it, as far as is known.
    """
    robot_s = (recording.time_ns - recording.sent_ns[0]) / 1e9
    sent_s = (recording.sent_ns - recording.sent_ns[0]) / 1e9
    position = recording.observations["robot0_eef_pos"].astype(np.float64)
    quat = without_jumps(recording.observations["robot0_eef_quat"].astype(np.float64))
    joints = recording.observations.get(JOINT_POSITION)
    period_s = 1 / recording.robot.control_rate_hz
    if joints is not None:
        rest = joints[:5].mean(axis=0).astype(np.float64)
    else:
        rest = predictor.inverse(position[:3].mean(axis=0), normalize(quat[:3].mean(axis=0)), np.zeros(6))[0]
    found = []
    for first, end in pieces:
        begin_s = sent_s[first]
        until_s = (sent_s[end] if end < len(sent_s) else sent_s[-1] + period_s) - begin_s
        seen = (robot_s > begin_s + delay_s) & (robot_s < begin_s + delay_s + until_s)
        if seen.sum() < 3:
            continue
        far = np.abs(robot_s - (begin_s + delay_s))  # a state is told from the rows around it, five at least
        around = np.flatnonzero((far <= _STATE_SPAN_S) | (far <= np.sort(far)[:5][-1]))
        if joints is not None:
            start = _state(robot_s[around] - begin_s - delay_s, joints[around].astype(np.float64))
        else:
            pose, speed = _state(robot_s[around] - begin_s - delay_s, np.hstack([position[around], quat[around]]))
            turn = normalize(pose[3:])
            angular = rotation_between(turn, normalize(turn + 1e-3 * speed[3:])) / 1e-3
            start = predictor.inverse(pose[:3], turn, np.append(speed[:3], angular))
        commands = np.column_stack(
            [sent_s[first:end] - begin_s, recording.valid_ns[first:end] / 1e9, recording.actions[first:end]]
        ).astype(np.float64)
        rows = joints[seen].astype(np.float64) if joints is not None else None
        time_s, turned = robot_s[seen] - begin_s, normalize(quat[seen])
        found.append(Window(commands, start, rest, time_s, position[seen], turned, rows, until_s + 0.02))
    return found


class Predictors:
    """As many predictors as there are cores, working at once."""

    def __init__(self, task: str, count: int) -> None:
        self._all = [Predictor(task) for _ in range(max(1, count))]
        self._threads = ThreadPoolExecutor(len(self._all), "predict")
        self._free = list(self._all)

    @property
    def first(self) -> Predictor:
        return self._all[0]

    def predict(
        self, models: Sequence[tuple[RobotParameters, float]], windows: Sequence[Window]
    ) -> list[list[Predicted]]:
        """Predictions of all windows by each model and command delay (s)."""

        def one(given: tuple[RobotParameters, float]) -> list[Predicted]:
            predictor = self._free.pop()
            try:
                predictor.set(given[0])
                return [predictor.predict(window, given[1]) for window in windows]
            finally:
                self._free.append(predictor)

        return list(self._threads.map(one, models))

    def close(self) -> None:
        self._threads.shutdown()


def _state(times: Array, rows: Array) -> Array:
    """Value and rate (2, D) at time 0 of readings (M, D) around it, by a parabola; rates within the noise are none.

    A robot at rest is held by its dry friction, which a velocity that is not there would overcome.
    """
    basis = np.stack([np.ones_like(times), times, times**2], axis=1)
    found = np.linalg.lstsq(basis, rows, rcond=None)[0]
    noise = np.sqrt(np.sum((rows - basis @ found) ** 2, axis=0) / max(1, len(times) - 3))
    spread = noise * np.sqrt(np.linalg.inv(basis.T @ basis + 1e-12 * np.eye(3))[1, 1])
    rate: Array = np.where(np.abs(found[1]) < 3 * spread, 0.0, found[1])
    return np.stack([np.where(rate == 0, rows.mean(axis=0), found[0]), rate])


def _between(at: Array, grid: Array, rows: Array) -> Array:
    return np.stack([np.interp(at, grid, column) for column in rows.T], axis=1)
