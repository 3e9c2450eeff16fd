"""The control step in machine code: robosuite's operational-space controller around MuJoCo's own step functions.

All of it is compiled by Numba, runs without the interpreter's lock, and is cached on disk. It is one file because Numba
notices a change to the file of the function that is called from Python, but not to the files of those it calls.

The arithmetic is that of robosuite 1.5.2 (controllers/parts/arm/osc.py, parts/gripper/simple_grip.py and
utils/control_utils.py, MIT licence) but for one thing: where robosuite inverts matrices by singular value decomposition, 25
times per control step, here they are factorised by Cholesky. That is an order of magnitude faster and agrees to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding
import mujoco
import numba
import numpy as np
import numpy.typing as npt
from numba import types

from sacflow_robot.envs.suite import robosuite

Reals = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

ARM, ACTION = 7, 7
"""Joints of the arm; entries of an action, the last being the gripper's."""

# What a row of ``Plan.sights`` puts into the observation: kind, then the ids that it needs.
BODY_POSITION, BODY_QUATERNION, BODY_FROM_GRIP, BODY_FROM_BODY, SITE_POSITION, SITE_FROM_GRIP, JOINT, POSE_IN_GRIP = (
    range(8)
)
SIGHT_SIZES = (3, 4, 3, 3, 3, 3, 1, 7)

_FLOAT64_MIN = 2.2250738585072014e-308


class Views(NamedTuple):
    """The arrays of an ``mjData`` that the step reads and writes, as NumPy views of MuJoCo's own memory."""

    qpos: Reals
    qvel: Reals
    ctrl: Reals
    qfrc_bias: Reals
    mass: Reals
    body_position: Reals
    body_quaternion: Reals
    site_position: Reals
    site_matrix: Reals


class Plan(NamedTuple):
    """What stays the same from step to step: indices into the model, gains and limits, as robosuite's controllers have
    them, and what a task's observation and success are made of."""

    joints: Indices  # (7,) of the arm, in qpos
    dofs: Indices  # (7,) of the arm, in qvel
    arm_of_dof: Indices  # (nv,) which joint of the arm a degree of freedom is, -1 if none
    dof_parent: Indices  # (nv,)
    dof_mass: Indices  # (nv,) where a degree of freedom's row of the sparse mass matrix begins
    motors: Indices  # (7,) of the arm, in ctrl
    finger_motors: Indices  # (2,)
    fingers: Indices  # (2,) in qpos
    ctrl_low: Reals  # (nu,)
    ctrl_high: Reals  # (nu,)
    finger_bias: Reals  # (2,)
    finger_weight: Reals  # (2,)
    finger_speed: float
    kp: Reals  # (6,)
    kd: Reals  # (6,)
    input_low: Reals  # (6,)
    input_high: Reals  # (6,)
    input_middle: Reals  # (6,)
    input_scale: Reals  # (6,)
    output_middle: Reals  # (6,)
    grip_site: int
    grip_body: int
    base_site: int
    substeps: int
    timestep: float
    sights: Indices  # (K, 3)
    goal_kind: int  # 0: the position of body goal_id; 1: the joint at goal_id of qpos
    goal_id: int
    goal_low: Reals  # (3,)
    goal_high: Reals  # (3,)
    goal_body: int  # body that x and y are relative to, or -1
    goal_contacts: bool  # whether contacts decide as well; the caller looks at them
    goal_released: bool  # whether the gripper has to be away from the body


class Memory(NamedTuple):
    """What an arm carries from step to step besides its ``mjData``."""

    time: Reals  # (1,)
    rest: Reals  # (7,) posture that the arm's nullspace is pulled to
    fingers: Reals  # (2,) the gripper's command, which moves at a limited speed
    jacobian: Reals  # (6, nv) of the gripper, linear then angular; room for MuJoCo to write it to


class Scratch(NamedTuple):
    """Room for one substep's results."""

    jacobian: Reals  # (6, 7) of the gripper by the arm's joints
    columns: Reals  # (6, 7) the same over the mass matrix's factor
    mass: Reals  # (7, 7)
    inertia: Reals  # (6, 6) inverse of the gripper's, J M⁻¹ J'
    block: Reals  # (3, 3)
    posture: Reals  # (7,) acceleration towards the posture at rest
    pulled: Reals  # (6,) what of it the gripper would feel
    wrench: Reals  # (6,)
    torques: Reals  # (7,)
    goal_position: Reals  # (3,)
    goal_matrix: Reals  # (3, 3)
    wanted: Reals  # (3, 3)


def _load_physics() -> None:
    """Make MuJoCo's functions known by name to what Numba compiles, now and from its cache."""
    folder = Path(mujoco.__file__).parent
    libraries = [p for p in sorted(folder.glob("*mujoco*")) if ".so" in p.name or p.suffix in (".dylib", ".dll")]
    if not libraries:
        raise ImportError(f"no shared library of MuJoCo in {folder}")
    llvmlite.binding.load_library_permanently(str(libraries[0]))


_load_physics()


def _physics(name: str, *arguments: types.Type) -> Any:
    return types.ExternalFunction(name, types.void(*arguments))


_mj_step1 = _physics("mj_step1", types.intp, types.intp)
_mj_step2 = _physics("mj_step2", types.intp, types.intp)
_mj_kinematics = _physics("mj_kinematics", types.intp, types.intp)
_mj_collision = _physics("mj_collision", types.intp, types.intp)
_mj_jac_site = _physics("mj_jacSite", types.intp, types.intp, types.intp, types.intp, types.int32)


def _kernel(function: Callable[..., Any]) -> Any:
    """Compile without the interpreter's lock, cached where a folder for that can be written."""
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # Numba found no folder that it may write to
        return numba.njit(nogil=True, error_model="numpy")(function)


def _theirs(function: Any) -> Any:
    """A function that robosuite has compiled, or compiles here if its own switch for that is off."""
    return function if hasattr(function, "py_func") else _kernel(function)


_quat2mat = _theirs(robosuite.utils.transform_utils.quat2mat)
_mat2quat = _theirs(robosuite.utils.transform_utils.mat2quat)


@_kernel
def _scratch() -> Scratch:
    return Scratch(
        np.empty((6, ARM)), np.empty((6, ARM)), np.empty((ARM, ARM)), np.empty((6, 6)), np.empty((3, 3)), np.empty(ARM),
        np.empty(6), np.empty(6), np.empty(ARM), np.empty(3), np.empty((3, 3)), np.empty((3, 3)),
    )  # fmt: skip


@_kernel
def _factorise(a: Reals, n: int) -> None:
    """Cholesky factor of a positive definite matrix, in place of its lower triangle."""
    for j in range(n):
        pivot = a[j, j]
        for k in range(j):
            pivot -= a[j, k] * a[j, k]
        a[j, j] = math.sqrt(max(pivot, _FLOAT64_MIN))
        for i in range(j + 1, n):
            rest = a[i, j]
            for k in range(j):
                rest -= a[i, k] * a[j, k]
            a[i, j] = rest / a[j, j]


@_kernel
def _forward(factor: Reals, b: Reals, n: int) -> None:
    """Solve L x = b in place."""
    for i in range(n):
        rest = b[i]
        for k in range(i):
            rest -= factor[i, k] * b[k]
        b[i] = rest / factor[i, i]


@_kernel
def _backward(factor: Reals, b: Reals, n: int) -> None:
    """Solve L' x = b in place."""
    for i in range(n - 1, -1, -1):
        rest = b[i]
        for k in range(i + 1, n):
            rest -= factor[k, i] * b[k]
        b[i] = rest / factor[i, i]


@_kernel
def _solve_block(a: Reals, start: int, b: Reals, block: Reals) -> None:
    """Solve the 3x3 diagonal block of a positive definite matrix at ``start`` for three entries of b, in place."""
    for i in range(3):
        for j in range(i + 1):
            block[i, j] = a[start + i, start + j]
    part = b[start : start + 3]
    _factorise(block, 3)
    _forward(block, part, 3)
    _backward(block, part, 3)


@_kernel
def _mass_matrix(views: Views, plan: Plan, mass: Reals) -> None:
    """The arm's block of the joint-space inertia matrix (7, 7)."""
    for i in range(ARM):
        for j in range(ARM):
            mass[i, j] = 0.0
    for i in range(ARM):
        dof = plan.dofs[i]
        address = plan.dof_mass[dof]
        while dof >= 0:
            j = plan.arm_of_dof[dof]
            if j >= 0:
                mass[i, j] = mass[j, i] = views.mass[address]
            address += 1
            dof = plan.dof_parent[dof]


@_kernel
def _set_goal(views: Views, plan: Plan, action: Reals, s: Scratch) -> None:
    """Where the gripper should go, in the base's frame: from where it is now, by what the action says."""
    delta = np.empty(6)
    for i in range(6):
        given = min(max(action[i], plan.input_low[i]), plan.input_high[i])
        delta[i] = (given - plan.input_middle[i]) * plan.input_scale[i] + plan.output_middle[i]
    origin, base = views.site_position[plan.base_site], views.site_matrix[plan.base_site].reshape(3, 3)
    grip, turned = views.site_position[plan.grip_site], views.site_matrix[plan.grip_site].reshape(3, 3)
    for i in range(3):
        shift = base[0, i] * origin[0] + base[1, i] * origin[1] + base[2, i] * origin[2]
        position = base[0, i] * grip[0] + base[1, i] * grip[1] + base[2, i] * grip[2]
        s.goal_position[i] = (position - shift) + delta[i]
        for j in range(3):
            s.wanted[i, j] = base[0, i] * turned[0, j] + base[1, i] * turned[1, j] + base[2, i] * turned[2, j]
    angle = math.sqrt(delta[3] * delta[3] + delta[4] * delta[4] + delta[5] * delta[5])
    quaternion = np.zeros(4)
    quaternion[3] = 1.0
    if angle != 0.0:
        quaternion[3] = math.cos(angle / 2.0)
        for i in range(3):
            quaternion[i] = delta[3 + i] / angle * math.sin(angle / 2.0)
    _multiply(_quat2mat(quaternion), s.wanted, s.goal_matrix)


@_kernel
def _multiply(a: Reals, b: Reals, out: Reals) -> None:
    """Product of matrices (3, 3)."""
    for i in range(3):
        for j in range(3):
            out[i, j] = a[i, 0] * b[0, j] + a[i, 1] * b[1, j] + a[i, 2] * b[2, j]


@_kernel
def _wrench(views: Views, plan: Plan, s: Scratch) -> None:
    """Acceleration (6,), linear then angular, that the gripper should have: critically damped towards its goal."""
    origin, base = views.site_position[plan.base_site], views.site_matrix[plan.base_site].reshape(3, 3)
    grip, turned = views.site_position[plan.grip_site], views.site_matrix[plan.grip_site].reshape(3, 3)
    goal, wanted, wrench = s.goal_position, s.wanted, s.wrench
    _multiply(base, s.goal_matrix, wanted)
    for i in range(3):
        wrench[i] = origin[i] + (base[i, 0] * goal[0] + base[i, 1] * goal[1] + base[i, 2] * goal[2]) - grip[i]
        wrench[3 + i] = 0.0
    for k in range(3):  # half the sum of the cross products of present and wanted axes
        wrench[3] += 0.5 * (turned[1, k] * wanted[2, k] - turned[2, k] * wanted[1, k])
        wrench[4] += 0.5 * (turned[2, k] * wanted[0, k] - turned[0, k] * wanted[2, k])
        wrench[5] += 0.5 * (turned[0, k] * wanted[1, k] - turned[1, k] * wanted[0, k])
    for i in range(6):
        velocity = 0.0
        for k in range(ARM):
            velocity += s.jacobian[i, k] * views.qvel[plan.dofs[k]]
        wrench[i] = wrench[i] * plan.kp[i] - velocity * plan.kd[i]


@_kernel
def _torques(views: Views, plan: Plan, rest: Reals, s: Scratch) -> None:
    """Joint torques (7,): J' Λ a, with position and orientation uncoupled, gravity's, and the nullspace's.

    With Λ = (J M⁻¹ J')⁻¹ and the posture's torque M b, the nullspace's is (I - J' Λ J M⁻¹) M b = M b - J' Λ J b.
    """
    mass, columns, inertia, pulled = s.mass, s.columns, s.inertia, s.pulled
    _mass_matrix(views, plan, mass)
    stiffness = 10.0
    damping = math.sqrt(stiffness) * 2
    for k in range(ARM):
        s.posture[k] = stiffness * (rest[k] - views.qpos[plan.joints[k]]) - damping * views.qvel[plan.dofs[k]]
    for k in range(ARM):
        s.torques[k] = views.qfrc_bias[plan.dofs[k]]
        for j in range(ARM):
            s.torques[k] += mass[k, j] * s.posture[j]
    _factorise(mass, ARM)
    for i in range(6):
        pulled[i] = 0.0
        for k in range(ARM):
            columns[i, k] = s.jacobian[i, k]
            pulled[i] += columns[i, k] * s.posture[k]
        _forward(mass, columns[i], ARM)
        for j in range(i + 1):
            total = 0.0
            for k in range(ARM):
                total += columns[i, k] * columns[j, k]
            inertia[i, j] = total
    _solve_block(inertia, 0, s.wrench, s.block)
    _solve_block(inertia, 3, s.wrench, s.block)
    _factorise(inertia, 6)
    _forward(inertia, pulled, 6)
    _backward(inertia, pulled, 6)
    for i in range(6):
        for k in range(ARM):
            s.torques[k] += s.jacobian[i, k] * (s.wrench[i] - pulled[i])


@_kernel
def _control(model: int, data: int, views: Views, plan: Plan, memory: Memory, s: Scratch, action: Reals) -> None:
    """One control period."""
    for i in range(2):
        toward = -1.0 if i == 0 else 1.0
        moved = memory.fingers[i] + toward * plan.finger_speed * np.sign(action[ACTION - 1])
        memory.fingers[i] = min(max(moved, -1.0), 1.0)
    rows = memory.jacobian.ctypes.data
    row_bytes = memory.jacobian.shape[1] * 8
    for substep in range(plan.substeps):
        _mj_step1(model, data)
        if substep == 0:
            _set_goal(views, plan, action, s)
        _mj_jac_site(model, data, rows, rows + 3 * row_bytes, plan.grip_site)
        for i in range(6):
            for k in range(ARM):
                s.jacobian[i, k] = memory.jacobian[i, plan.dofs[k]]
        _wrench(views, plan, s)
        _torques(views, plan, memory.rest, s)
        for k in range(ARM):
            motor = plan.motors[k]
            views.ctrl[motor] = min(max(s.torques[k], plan.ctrl_low[motor]), plan.ctrl_high[motor])
        for k in range(2):
            motor = plan.finger_motors[k]
            command = plan.finger_bias[k] + plan.finger_weight[k] * memory.fingers[k]
            views.ctrl[motor] = min(max(command, plan.ctrl_low[motor]), plan.ctrl_high[motor])
        _mj_step2(model, data)
        memory.time[0] += plan.timestep
    _mj_kinematics(model, data)
    if plan.goal_contacts:
        _mj_collision(model, data)


@_kernel
def _pose(position: Reals, quaternion: Reals) -> npt.NDArray[np.float32]:
    """robosuite's ``pose2mat``, upper three rows (3, 4), in its single precision; quaternion w x y z."""
    matrix = _quat2mat(np.array((quaternion[1], quaternion[2], quaternion[3], quaternion[0])))
    pose = np.empty((3, 4), np.float32)
    for i in range(3):
        for j in range(3):
            pose[i, j] = matrix[i, j]
        pose[i, 3] = position[i]
    return pose


@_kernel
def _pose_in_grip(grip: npt.NDArray[np.float32], pose: npt.NDArray[np.float32], out: npt.NDArray[np.float32]) -> None:
    """Position and quaternion x y z w (7,) of one pose seen from another."""
    matrix = np.zeros((3, 3))
    for i in range(3):
        away = np.zeros(2)
        for k in range(3):
            across = np.float64(grip[k, i])
            for j in range(3):
                matrix[i, j] += across * np.float64(pose[k, j])
            away[0] += across * np.float64(pose[k, 3])
            away[1] += across * np.float64(grip[k, 3])
        out[i] = away[0] - away[1]
    quaternion = _mat2quat(matrix)
    for i in range(4):
        out[3 + i] = quaternion[i]


@_kernel
def observe(views: Views, plan: Plan, out: npt.NDArray[np.float32]) -> None:
    """The flattened observation (D,) of the present state."""
    grip = views.site_position[plan.grip_site]
    turned = views.body_quaternion[plan.grip_body]
    for i in range(3):
        out[i] = grip[i]
    for i in range(4):
        out[3 + i] = turned[(i + 1) % 4]
    for i in range(2):
        out[7 + i] = views.qpos[plan.fingers[i]]
    at = 9
    for row in range(len(plan.sights)):
        kind, a, b = plan.sights[row, 0], plan.sights[row, 1], plan.sights[row, 2]
        size = 3
        if kind == BODY_QUATERNION:
            size = 4
            for i in range(4):
                out[at + i] = views.body_quaternion[a, (i + 1) % 4]
        elif kind == JOINT:
            size = 1
            out[at] = views.qpos[a]
        elif kind == POSE_IN_GRIP:
            size = 7
            pose = _pose(views.body_position[a], views.body_quaternion[a])
            _pose_in_grip(_pose(grip, turned), pose, out[at : at + 7])
        else:
            for i in range(3):
                if kind == BODY_POSITION:
                    out[at + i] = views.body_position[a, i]
                elif kind == BODY_FROM_GRIP:
                    out[at + i] = views.body_position[a, i] - grip[i]
                elif kind == BODY_FROM_BODY:
                    out[at + i] = views.body_position[a, i] - views.body_position[b, i]
                elif kind == SITE_POSITION:
                    out[at + i] = views.site_position[a, i]
                else:
                    out[at + i] = views.site_position[a, i] - grip[i]
        at += size


@_kernel
def at_goal(views: Views, plan: Plan) -> bool:
    """Whether the object is where the task wants it; contacts are not looked at."""
    if plan.goal_kind == 1:
        return bool(plan.goal_low[0] < views.qpos[plan.goal_id] < plan.goal_high[0])
    position = views.body_position[plan.goal_id]
    distance = 0.0
    for i in range(3):
        origin = views.body_position[plan.goal_body, i] if plan.goal_body >= 0 and i < 2 else 0.0
        if not plan.goal_low[i] < position[i] - origin < plan.goal_high[i]:
            return False
        away = views.site_position[plan.grip_site, i] - position[i]
        distance += away * away
    # robosuite's reaching reward, by which it tells whether the gripper has let go
    return not plan.goal_released or 1 - math.tanh(10.0 * math.sqrt(distance)) < 0.6


@_kernel
def execute(
    model: int,
    data: int,
    views: Views,
    plan: Plan,
    memory: Memory,
    actions: Reals,
    observations: npt.NDArray[np.float32],
    states: Reals,
) -> int:
    """Execute actions (H, 7) until the object is where the task wants it.

    Args:
        model: Address of the ``mjModel``.
        data: Address of its ``mjData``.
        views: The latter's arrays.
        plan: The task.
        memory: Of this arm.
        actions: What to execute.
        observations: (H, D), written.
        states: (H, S), written but for the poses of placed bodies at their end.

    Returns:
        Number of actions executed; the last one of them led to the goal if ``at_goal`` says so.
    """
    nq, nv = len(views.qpos), len(views.qvel)
    scratch = _scratch()
    for t in range(len(actions)):
        _control(model, data, views, plan, memory, scratch, actions[t])
        observe(views, plan, observations[t])
        states[t, 0] = memory.time[0]
        for i in range(nq):
            states[t, 1 + i] = views.qpos[i]
        for i in range(nv):
            states[t, 1 + nq + i] = views.qvel[i]
        if at_goal(views, plan):
            return t + 1
    return len(actions)


def is_cached() -> bool:
    """Whether an earlier process left what it compiled; it may yet turn out to be of another version."""
    return any(Path(execute.stats.cache_path or "").glob(f"{Path(__file__).stem}.execute-*.nbi"))
