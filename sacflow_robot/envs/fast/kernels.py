"""The control step in machine code: robosuite's operational-space controller around MuJoCo's own step functions.

All of it is compiled by Numba, runs without the interpreter's lock, and is cached on disk. It is one file because Numba
notices a change to the file of the function that is called from Python, but not to the files of those it calls.

The arithmetic is that of robosuite 1.5.2 (controllers/parts/arm/osc.py, parts/gripper/simple_grip.py and
utils/control_utils.py, MIT license), operation by operation and through the same BLAS and LAPACK routines, so that the
result is the same to the last bit. That is worth its price, which is the singular value decompositions: contacts make of a
difference in the last bit one that is seen within a second.
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
from numba.extending import get_cython_function_address

from sacflow_robot.envs.robosuite_import import robosuite

Reals = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

ARM, ACTION = 7, 7
"""Joints of the robot; entries of an action, the last being the gripper's."""

DELAYED = 10
"""Substeps that torques may be late."""

GRAVITY = 9.81

# What a row of ``Plan.sights`` puts into the observation: kind, then the ids that it needs.
BODY_POSITION, BODY_QUATERNION, BODY_FROM_GRIP, BODY_FROM_BODY, SITE_POSITION, SITE_FROM_GRIP, JOINT, POSE_IN_GRIP = (
    range(8)
)
SIGHT_SIZES = (3, 4, 3, 3, 3, 3, 1, 7)


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

    joints: Indices  # (7,) of the robot, in qpos
    dofs: Indices  # (7,) of the robot, in qvel
    robot_of_dof: Indices  # (nv,) which joint of the robot a degree of freedom is, -1 if none
    dof_parent: Indices  # (nv,)
    dof_mass: Indices  # (nv,) where a degree of freedom's row of the sparse mass matrix begins
    motors: Indices  # (7,) of the robot, in ctrl
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
    # How the robot differs from what its controller believes; zeros for the nominal robot. See envs/armphysics.py.
    armature_error: Reals  # (7,) kg m²
    payload_mass: float  # kg
    payload_center: Reals  # (3,) m, in the grip site's frame
    torque_delay: float  # substeps from a torque's computation to its effect, at most DELAYED


class Memory(NamedTuple):
    """What a robot carries from step to step besides its ``mjData``."""

    time: Reals  # (1,)
    rest: Reals  # (7,) posture that the robot's nullspace is pulled to
    fingers: Reals  # (2,) the gripper's command, which moves at a limited speed
    jacobian: Reals  # (6, nv) of the gripper, linear then angular; room for MuJoCo to write it to
    goal: Reals  # (12,) that a command set and that :func:`follow` holds: position, then rotation by rows, in the base's frame
    valid: Reals  # (1,) substeps for which it still holds; negative: holding where the robot was when it ended
    gripping: Reals  # (2,) the gripper's command, and substeps until the fingers move again
    torques: Reals  # (DELAYED + 2, 7) of the last substeps, the newest first


class Scratch(NamedTuple):
    """Room for one substep's results. Matrices that BLAS reads column by column are marked."""

    jacobian: Reals  # (6, 7) of the gripper by the robot's joints
    velocity: Reals  # (6,) of the gripper, linear then angular
    mass: Reals  # (7, 7)
    mass_inverse: Reals  # (7, 7), by columns
    product: Reals  # (6, 7) J M⁻¹
    inertia: Reals  # (6, 6) (J M⁻¹ J')⁻¹, by columns; before that its inverse
    position_inertia: Reals  # (3, 3), by columns
    rotation_inertia: Reals  # (3, 3), by columns
    weighted: Reals  # (7, 6) M⁻¹ J'
    jbar: Reals  # (7, 6)
    nullspace: Reals  # (7, 7)
    posture: Reals  # (7,) acceleration toward the posture at rest
    posture_torques: Reals  # (7,)
    pulled: Reals  # (7,) torques of the nullspace
    force: Reals  # (6,) wanted, linear then angular
    wrench: Reals  # (6,)
    torques: Reals  # (7,)
    goal_position: Reals  # (3,) in the base's frame
    goal_matrix: Reals  # (3, 3) likewise
    wanted: Reals  # (3, 3)
    wanted_position: Reals  # (3,)
    svd: Reals  # (2 * 36 + 6,) U, V' and singular values, each by columns
    work: Reals  # (600,)
    integers: npt.NDArray[np.int32]  # pivots and status
    payload: Reals  # (3, 7) how its center moves with each joint
    counts: npt.NDArray[np.int32]  # 0, 1, 2, ... for BLAS to point at
    letters: npt.NDArray[np.uint8]  # N, T, L, R, U: what tells LAPACK how a matrix lies
    constants: Reals  # 1, 0


def _load_physics() -> None:
    """Make MuJoCo's functions known by name to what Numba compiles, now and from its cache."""
    folder = Path(mujoco.__file__).parent
    libraries = [p for p in sorted(folder.glob("*mujoco*")) if ".so" in p.name or p.suffix in (".dylib", ".dll")]
    if not libraries:
        raise ImportError(f"no shared library of MuJoCo in {folder}")
    llvmlite.binding.load_library_permanently(str(libraries[0]))
    lapack = ("dgebd2", "dbdsqr", "dorm2r", "dorml2", "dgetrf", "dgetri")
    for module, names in (("blas", ("dgemm", "dgemv")), ("lapack", lapack)):
        for name in names:
            address = get_cython_function_address(f"scipy.linalg.cython_{module}", name)
            llvmlite.binding.add_symbol(f"sacflow_{name}", address)


_load_physics()


def _external(name: str, *arguments: types.Type) -> Any:
    return types.ExternalFunction(name, types.void(*arguments))


_mj_step1 = _external("mj_step1", types.intp, types.intp)
_mj_step2 = _external("mj_step2", types.intp, types.intp)
_mj_step = _external("mj_step", types.intp, types.intp)
_mj_kinematics = _external("mj_kinematics", types.intp, types.intp)
_mj_collision = _external("mj_collision", types.intp, types.intp)
_mj_jac_site = _external("mj_jacSite", types.intp, types.intp, types.intp, types.intp, types.int32)

# SciPy's, which Numba uses as well; all of their arguments are addresses.
_dgemm, _dgemv = _external("sacflow_dgemm", *[types.intp] * 13), _external("sacflow_dgemv", *[types.intp] * 11)
_dgebd2, _dbdsqr = _external("sacflow_dgebd2", *[types.intp] * 10), _external("sacflow_dbdsqr", *[types.intp] * 15)
_dorm2r, _dorml2 = _external("sacflow_dorm2r", *[types.intp] * 12), _external("sacflow_dorml2", *[types.intp] * 12)
_dgetrf, _dgetri = _external("sacflow_dgetrf", *[types.intp] * 6), _external("sacflow_dgetri", *[types.intp] * 7)


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
        np.empty((6, ARM)), np.empty(6), np.empty((ARM, ARM)), np.empty((ARM, ARM)), np.empty((6, ARM)), np.empty((6, 6)),
        np.empty((3, 3)), np.empty((3, 3)), np.empty((ARM, 6)), np.empty((ARM, 6)), np.empty((ARM, ARM)), np.empty(ARM),
        np.empty(ARM), np.empty(ARM), np.empty(6), np.empty(6), np.empty(ARM), np.empty(3), np.empty((3, 3)),
        np.empty((3, 3)), np.empty(3), np.empty(78), np.empty(600), np.zeros(64, np.int32), np.empty((3, ARM)), np.arange(1024).astype(np.int32),
        np.array([78, 84, 76, 82, 85], np.uint8), np.array([1.0, 0.0]),
    )  # fmt: skip


@_kernel
def _times(x: int, x_turned: bool, y: int, y_turned: bool, out: int, m: int, k: int, n: int, s: Scratch) -> None:
    """out (m, n) = x (m, k) @ y (k, n), given by their addresses; those turned are stored by columns, the others by rows."""
    letter, count, constant = s.letters.ctypes.data, s.counts.ctypes.data, s.constants.ctypes.data
    _dgemm(
        letter + y_turned, letter + x_turned, count + 4 * n, count + 4 * m, count + 4 * k, constant,
        y, count + 4 * (k if y_turned else n), x, count + 4 * (m if x_turned else k), constant + 8, out, count + 4 * n,
    )  # fmt: skip


@_kernel
def _apply(matrix: int, turned: bool, x: int, out: int, m: int, n: int, s: Scratch) -> None:
    """out (m,) = matrix (m, n) @ x (n,), given by their addresses."""
    letter, count, constant = s.letters.ctypes.data, s.counts.ctypes.data, s.constants.ctypes.data
    rows, columns = (m, n) if turned else (n, m)
    _dgemv(
        letter + (not turned), count + 4 * rows, count + 4 * columns, constant, matrix, count + 4 * rows,
        x, count + 4, constant + 8, out, count + 4,
    )  # fmt: skip


@_kernel
def _pseudo_inverse(a: Reals, n: int, s: Scratch) -> None:
    """Numba's ``pinv`` of a matrix (n, n) stored by columns, in place; the result is stored by columns too.

    Calls what LAPACK's dgesdd calls for a small square matrix, in its order (dgesdd.f, dbdsdc.f and dormbr.f of LAPACK
    3.12), without the questions that it asks first, which take as long as a fourth of the answer.
    """
    letter, count, constant = s.letters.ctypes.data, s.counts.ctypes.data, s.constants.ctypes.data
    matrix, left, status = a.ctypes.data, s.svd.ctypes.data, s.integers.ctypes.data
    right = left + 8 * 36
    values, above = right + 8 * 36, s.work.ctypes.data
    left_reflectors, right_reflectors, work = above + 8 * 6, above + 8 * 12, above + 8 * 18
    size, less = count + 4 * n, count + 4 * (n - 1)
    _dgebd2(size, size, matrix, size, values, above, left_reflectors, right_reflectors, work, status)
    for i in range(n * n):
        s.svd[i] = s.svd[36 + i] = 1.0 if i % (n + 1) == 0 else 0.0
    _dbdsqr(
        letter + 4, size, size, size, count, values, above, right, size, left, size, left, size, work, status
    )  # fmt: skip
    _dorm2r(letter + 2, letter, size, size, size, matrix, size, left_reflectors, left, size, work, status)
    _dorml2(
        letter + 3, letter, size, less, less, matrix + 8 * n, size, right_reflectors, right + 8 * n, size, work, status
    )
    rank = 0
    for k in range(n):
        if s.svd[72 + k] > s.svd[72] * 1e-15:
            s.svd[72 + k] = 1.0 / s.svd[72 + k]
            rank = k
    for i in range(n):
        for k in range(rank + 1):
            s.svd[36 + n * i + k] *= s.svd[72 + k]
    _dgemm(
        letter + 1, letter + 1, size, size, count + 4 * (rank + 1), constant,
        right, size, left, size, constant + 8, a.ctypes.data, size,
    )  # fmt: skip


@_kernel
def _mass_matrix(views: Views, plan: Plan, mass: Reals) -> None:
    """The robot's block of the joint-space inertia matrix (7, 7)."""
    for i in range(ARM):
        for j in range(ARM):
            mass[i, j] = 0.0
    for i in range(ARM):
        dof = plan.dofs[i]
        address = plan.dof_mass[dof]
        while dof >= 0:
            j = plan.robot_of_dof[dof]
            if j >= 0:
                mass[i, j] = mass[j, i] = views.mass[address]
            address += 1
            dof = plan.dof_parent[dof]


@_kernel
def _set_goal(views: Views, plan: Plan, action: Reals, s: Scratch) -> None:
    """Where the gripper should go, in the base's frame: from where it is now, by what the action says."""
    delta, base, world, grip = np.empty(6), np.zeros((4, 4)), np.eye(4), np.eye(4)
    for i in range(6):
        given = min(max(action[i], plan.input_low[i]), plan.input_high[i])
        delta[i] = (given - plan.input_middle[i]) * plan.input_scale[i] + plan.output_middle[i]
    turned, origin = np.empty((3, 3)), np.empty(3)
    for i in range(3):
        origin[i] = views.site_position[plan.base_site, i]
        world[i, 3] = grip[i, 3] = views.site_position[plan.grip_site, i]
        for j in range(3):
            turned[i, j] = base[i, j] = views.site_matrix[plan.base_site, 3 * j + i]
            grip[i, j] = views.site_matrix[plan.grip_site, 3 * i + j]
    moved, present = np.empty(3), np.empty((4, 4))
    _apply(turned.ctypes.data, False, origin.ctypes.data, moved.ctypes.data, 3, 3, s)
    for i in range(3):
        base[i, 3] = -moved[i]
    base[3, 3] = 1.0
    _times(base.ctypes.data, False, world.ctypes.data, False, present.ctypes.data, 4, 4, 4, s)
    for i in range(3):
        s.goal_position[i] = present[i, 3] + delta[i]
    _times(base.ctypes.data, False, grip.ctypes.data, False, present.ctypes.data, 4, 4, 4, s)
    for i in range(3):
        for j in range(3):
            turned[i, j] = present[i, j]
    angle = math.sqrt(delta[3] * delta[3] + delta[4] * delta[4] + delta[5] * delta[5])
    quaternion = np.zeros(4)
    quaternion[3] = 1.0
    if angle != 0.0:
        quaternion[3] = math.cos(angle / 2.0)
        for i in range(3):
            quaternion[i] = delta[3 + i] / angle * math.sin(angle / 2.0)
    turn = _quat2mat(quaternion)
    _times(turn.ctypes.data, False, turned.ctypes.data, False, s.goal_matrix.ctypes.data, 3, 3, 3, s)


@_kernel
def _wanted_force(views: Views, plan: Plan, memory: Memory, s: Scratch) -> None:
    """Force (6,), linear then angular, that draws the gripper to its goal with critical damping."""
    base, grip = views.site_matrix.ctypes.data + 72 * plan.base_site, views.site_position[plan.grip_site]
    turned, wanted, force = views.site_matrix[plan.grip_site], s.wanted, s.force
    _apply(base, False, s.goal_position.ctypes.data, s.wanted_position.ctypes.data, 3, 3, s)
    _times(base, False, s.goal_matrix.ctypes.data, False, wanted.ctypes.data, 3, 3, 3, s)
    nv = len(views.qvel)
    rows, velocity = memory.jacobian.ctypes.data, s.velocity.ctypes.data
    _apply(rows, False, views.qvel.ctypes.data, velocity, 3, nv, s)
    _apply(rows + 24 * nv, False, views.qvel.ctypes.data, velocity + 24, 3, nv, s)
    for i in range(3):
        force[i] = (views.site_position[plan.base_site, i] + s.wanted_position[i]) - grip[i]
        b, c = (i + 1) % 3, (i + 2) % 3
        x = turned[3 * b] * wanted[c, 0] - turned[3 * c] * wanted[b, 0]
        y = turned[3 * b + 1] * wanted[c, 1] - turned[3 * c + 1] * wanted[b, 1]
        z = turned[3 * b + 2] * wanted[c, 2] - turned[3 * c + 2] * wanted[b, 2]
        force[3 + i] = 0.5 * (x + y + z)
    for i in range(6):
        force[i] = force[i] * plan.kp[i] + -s.velocity[i] * plan.kd[i]


@_kernel
def _inertias(s: Scratch) -> None:
    """Inverse of the mass matrix, and the gripper's inertia: in full, of its position alone, of its rotation alone."""
    mass_inverse, jacobian, product = s.mass_inverse.ctypes.data, s.jacobian.ctypes.data, s.product.ctypes.data
    count, status = s.counts.ctypes.data, s.integers.ctypes.data
    for i in range(ARM):
        for j in range(ARM):
            s.mass_inverse[i, j] = s.mass[i, j]
    size = count + 4 * ARM
    _dgetrf(size, size, mass_inverse, size, status + 4, status)
    _dgetri(size, mass_inverse, size, status + 4, s.work.ctypes.data, count + 4 * 600, status)
    # The product is symmetric but for rounding, so that its transpose is what has to be handed to LAPACK: it reads columns.
    _times(jacobian, False, mass_inverse, True, product, 6, ARM, ARM, s)
    _times(product, False, jacobian, True, s.inertia.ctypes.data, 6, ARM, 6, s)
    _transpose(s.inertia, 6)
    _times(jacobian, False, mass_inverse, True, product, 3, ARM, ARM, s)
    _times(product, False, jacobian, True, s.position_inertia.ctypes.data, 3, ARM, 3, s)
    _transpose(s.position_inertia, 3)
    _times(jacobian + 24 * ARM, False, mass_inverse, True, product, 3, ARM, ARM, s)
    _times(product, False, jacobian + 24 * ARM, True, s.rotation_inertia.ctypes.data, 3, ARM, 3, s)
    _transpose(s.rotation_inertia, 3)
    _pseudo_inverse(s.inertia, 6, s)
    _pseudo_inverse(s.position_inertia, 3, s)
    _pseudo_inverse(s.rotation_inertia, 3, s)


@_kernel
def _transpose(a: Reals, n: int) -> None:
    for i in range(n):
        for j in range(i):
            a[i, j], a[j, i] = a[j, i], a[i, j]


@_kernel
def _torques(views: Views, plan: Plan, rest: Reals, s: Scratch) -> None:
    """Joint torques (7,): what the wanted force takes, gravity's, and the nullspace's, which pull to the posture at rest."""
    jacobian, wrench, force = s.jacobian.ctypes.data, s.wrench.ctypes.data, s.force.ctypes.data
    _mass_matrix(views, plan, s.mass)
    _believed_mass(views, plan, s)
    _inertias(s)
    _times(s.mass_inverse.ctypes.data, True, jacobian, True, s.weighted.ctypes.data, ARM, ARM, 6, s)
    _times(s.weighted.ctypes.data, False, s.inertia.ctypes.data, True, s.jbar.ctypes.data, ARM, 6, 6, s)
    _times(s.jbar.ctypes.data, False, jacobian, False, s.nullspace.ctypes.data, ARM, 6, ARM, s)
    for i in range(ARM):
        for j in range(ARM):
            s.nullspace[i, j] = (1.0 if i == j else 0.0) - s.nullspace[i, j]
    _apply(s.position_inertia.ctypes.data, True, force, wrench, 3, 3, s)
    _apply(s.rotation_inertia.ctypes.data, True, force + 24, wrench + 24, 3, 3, s)
    _apply(jacobian, True, wrench, s.torques.ctypes.data, ARM, 6, s)
    stiffness, damping = 10, math.sqrt(10) * 2
    for k in range(ARM):
        s.posture[k] = stiffness * (rest[k] - views.qpos[plan.joints[k]]) - damping * views.qvel[plan.dofs[k]]
    _apply(s.mass.ctypes.data, True, s.posture.ctypes.data, s.posture_torques.ctypes.data, ARM, ARM, s)
    _apply(s.nullspace.ctypes.data, True, s.posture_torques.ctypes.data, s.pulled.ctypes.data, ARM, ARM, s)
    for k in range(ARM):
        s.torques[k] = (s.torques[k] + views.qfrc_bias[plan.dofs[k]]) + s.pulled[k]
    if plan.payload_mass > 0.0:
        for k in range(ARM):
            s.torques[k] -= plan.payload_mass * GRAVITY * s.payload[2, k]


@_kernel
def _move_payload(views: Views, plan: Plan, s: Scratch) -> None:
    """How the payload's center moves along the world's axes with each joint (3, 7), m/rad, into the scratch."""
    turned = views.site_matrix[plan.grip_site]
    for axis in range(3):
        b, c = (axis + 1) % 3, (axis + 2) % 3
        robot_b = robot_c = 0.0
        for i in range(3):
            robot_b += turned[3 * b + i] * plan.payload_center[i]
            robot_c += turned[3 * c + i] * plan.payload_center[i]
        for k in range(ARM):
            s.payload[axis, k] = s.jacobian[axis, k] + s.jacobian[3 + b, k] * robot_c - s.jacobian[3 + c, k] * robot_b


@_kernel
def _believed_mass(views: Views, plan: Plan, s: Scratch) -> None:
    """Take from the robot's inertia what its controller does not know of."""
    for i in range(ARM):
        s.mass[i, i] -= plan.armature_error[i]
    if plan.payload_mass > 0.0:
        _move_payload(views, plan, s)
        for axis in range(3):
            for i in range(ARM):
                for j in range(ARM):
                    s.mass[i, j] -= plan.payload_mass * s.payload[axis, i] * s.payload[axis, j]


@_kernel
def _substep(model: int, data: int, views: Views, plan: Plan, memory: Memory, s: Scratch) -> None:
    """The second half of a substep, toward the goal in the scratch; ``mj_step1`` is the first."""
    rows = memory.jacobian.ctypes.data
    row_bytes = memory.jacobian.shape[1] * 8
    _mj_jac_site(model, data, rows, rows + 3 * row_bytes, plan.grip_site)
    for i in range(6):
        for k in range(ARM):
            s.jacobian[i, k] = memory.jacobian[i, plan.dofs[k]]
    _wanted_force(views, plan, memory, s)
    _torques(views, plan, memory.rest, s)
    if plan.torque_delay > 0.0:
        _delay_torques(plan, memory, s)
    for k in range(ARM):
        motor = plan.motors[k]
        views.ctrl[motor] = min(max(s.torques[k], plan.ctrl_low[motor]), plan.ctrl_high[motor])
    for k in range(2):
        motor = plan.finger_motors[k]
        command = plan.finger_bias[k] + plan.finger_weight[k] * memory.fingers[k]
        views.ctrl[motor] = min(max(command, plan.ctrl_low[motor]), plan.ctrl_high[motor])
    _mj_step2(model, data)
    memory.time[0] += plan.timestep


@_kernel
def _delay_torques(plan: Plan, memory: Memory, s: Scratch) -> None:
    """Have the motors do what was computed a while ago, which may lie between two substeps."""
    past = memory.torques
    if math.isnan(past[0, 0]):  # an episode begins as if it had stood still
        for i in range(len(past)):
            for k in range(ARM):
                past[i, k] = s.torques[k]
    for i in range(len(past) - 1, 0, -1):
        for k in range(ARM):
            past[i, k] = past[i - 1, k]
    whole = int(plan.torque_delay)
    part = plan.torque_delay - whole
    for k in range(ARM):
        past[0, k] = s.torques[k]
        s.torques[k] = (1.0 - part) * past[whole, k] + part * past[whole + 1, k]


@_kernel
def _move_fingers(plan: Plan, memory: Memory, command: float) -> None:
    for i in range(2):
        toward = -1.0 if i == 0 else 1.0
        moved = memory.fingers[i] + toward * plan.finger_speed * np.sign(command)
        memory.fingers[i] = min(max(moved, -1.0), 1.0)


@_kernel
def _control(model: int, data: int, views: Views, plan: Plan, memory: Memory, s: Scratch, action: Reals) -> None:
    """One control period."""
    _move_fingers(plan, memory, action[ACTION - 1])
    for substep in range(plan.substeps):
        _mj_step1(model, data)
        if substep == 0:
            _set_goal(views, plan, action, s)
        _substep(model, data, views, plan, memory, s)
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
def _note(views: Views, plan: Plan, memory: Memory, observation: npt.NDArray[np.float32], state: Reals) -> None:
    """The present observation (D,), and the present state (S,) but for the poses of placed bodies at its end."""
    observe(views, plan, observation)
    nq = len(views.qpos)
    state[0] = memory.time[0]
    for i in range(nq):
        state[1 + i] = views.qpos[i]
    for i in range(len(views.qvel)):
        state[1 + nq + i] = views.qvel[i]


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
        memory: Of this robot.
        actions: What to execute.
        observations: (H, D), written.
        states: (H, S), written but for the poses of placed bodies at their end.

    Returns:
        Number of actions executed; the last one of them led to the goal if ``at_goal`` says so.
    """
    scratch = _scratch()
    for t in range(len(actions)):
        _control(model, data, views, plan, memory, scratch, actions[t])
        _note(views, plan, memory, observations[t], states[t])
        if at_goal(views, plan):
            return t + 1
    return len(actions)


@_kernel
def follow(
    model: int,
    data: int,
    views: Views,
    plan: Plan,
    memory: Memory,
    commands: Reals,
    every: int,
    grip_every: int,
    observations: npt.NDArray[np.float32],
    joints: Reals,
    states: Reals,
    solved: npt.NDArray[np.bool_],
) -> int:
    """Move a robot that takes up commands when they come, holds their goals while they are valid, and is seen now and then.

    Args:
        model: Address of the ``mjModel``.
        data: Address of its ``mjData``.
        views: The latter's arrays.
        plan: The task.
        memory: Of this robot; what it was doing goes on.
        commands: (N, 2 + 7) in order: substep at which it is taken up, substeps for which it is valid, action.
        every: Substeps between two observations.
        grip_every: Substeps between two movements of the fingers by one command.
        observations: (M, D), written; M observations are what is moved for.
        joints: (M, 7), written: positions.
        states: (M, S), written but for the poses of placed bodies at their end.
        solved: (M,), written: whether the object is where the task wants it.

    Returns:
        Observations made; fewer than M where the task was solved.
    """
    scratch, taken, still = _scratch(), 0, np.zeros(ACTION)
    for step in range(every * len(observations)):
        _mj_step1(model, data)
        fresh = False
        while taken < len(commands) and commands[taken, 0] <= step:
            fresh, taken = True, taken + 1
        if fresh:
            _set_goal(views, plan, commands[taken - 1, 2:], scratch)
            memory.valid[0] = commands[taken - 1, 1]
            memory.gripping[0] = commands[taken - 1, 2 + ACTION - 1]
        elif memory.valid[0] == 0.0:
            _set_goal(views, plan, still, scratch)
        if fresh or memory.valid[0] == 0.0:
            for i in range(3):
                memory.goal[i] = scratch.goal_position[i]
                for j in range(3):
                    memory.goal[3 + 3 * i + j] = scratch.goal_matrix[i, j]
        memory.valid[0] -= 1.0
        if memory.gripping[0] != 0.0 and memory.gripping[1] <= 0.0:
            _move_fingers(plan, memory, memory.gripping[0])
            memory.gripping[1] = grip_every
        memory.gripping[1] -= 1.0
        for i in range(3):
            scratch.goal_position[i] = memory.goal[i]
            for j in range(3):
                scratch.goal_matrix[i, j] = memory.goal[3 + 3 * i + j]
        _substep(model, data, views, plan, memory, scratch)
        if (step + 1) % every:
            continue
        row = (step + 1) // every - 1
        _mj_kinematics(model, data)
        if plan.goal_contacts:
            _mj_collision(model, data)
        _note(views, plan, memory, observations[row], states[row])
        for k in range(ARM):
            joints[row, k] = views.qpos[plan.joints[k]]
        solved[row] = at_goal(views, plan)
        if solved[row]:
            return row + 1
    return len(observations)


@_kernel
def physics_only(model: int, data: int, views: Views, states: Reals, controls: Reals, substeps: int) -> None:
    """The physics of control steps and nothing else, to measure what is left to gain.

    Args:
        model: Address of the ``mjModel``.
        data: Address of its ``mjData``.
        views: The latter's arrays.
        states: States (T, S) to take a control step from each.
        controls: What the motors do in them (T, nu).
        substeps: Calls of ``mj_step`` per control step.
    """
    nq = len(views.qpos)
    for t in range(len(states)):
        for i in range(nq):
            views.qpos[i] = states[t, 1 + i]
        for i in range(len(views.qvel)):
            views.qvel[i] = states[t, 1 + nq + i]
        for i in range(len(views.ctrl)):
            views.ctrl[i] = controls[t, i]
        for _ in range(substeps):
            _mj_step(model, data)
