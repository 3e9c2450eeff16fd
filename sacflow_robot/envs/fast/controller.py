"""robosuite's operational-space controller: torques of the robot's joints from where the gripper should go.

The arithmetic is that of robosuite 1.5.2 (controllers/parts/arm/osc.py and utils/control_utils.py, MIT license), operation
by operation, so that the result is the same to the last bit. That costs singular value decompositions, and is worth it: in
contacts, a difference in the last bit becomes visible within a second.
"""

import math

import numpy as np

from sacflow_robot.envs.fast.jit import compiled, kernel
from sacflow_robot.envs.fast.linear_algebra import apply, invert_mass, pseudo_inverse, times, transpose
from sacflow_robot.envs.fast.step_data import ARM, Memory, Plan, Reals, Scratch, Views
from sacflow_robot.envs.robosuite_import import robosuite

GRAVITY = 9.81

_quat2mat = compiled(robosuite.utils.transform_utils.quat2mat)


@kernel
def set_goal(views: Views, plan: Plan, action: Reals, s: Scratch) -> None:
    """Goal of the gripper in the base's frame: its present pose, moved by the action."""
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
    apply(turned.ctypes.data, False, origin.ctypes.data, moved.ctypes.data, 3, 3, s)
    for i in range(3):
        base[i, 3] = -moved[i]
    base[3, 3] = 1.0
    times(base.ctypes.data, False, world.ctypes.data, False, present.ctypes.data, 4, 4, 4, s)
    for i in range(3):
        s.goal_position[i] = present[i, 3] + delta[i]
    times(base.ctypes.data, False, grip.ctypes.data, False, present.ctypes.data, 4, 4, 4, s)
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
    times(turn.ctypes.data, False, turned.ctypes.data, False, s.goal_matrix.ctypes.data, 3, 3, 3, s)


@kernel
def wanted_force(views: Views, plan: Plan, memory: Memory, s: Scratch) -> None:
    """Force (6,), linear then angular, that draws the gripper to its goal with critical damping."""
    base, grip = views.site_matrix.ctypes.data + 72 * plan.base_site, views.site_position[plan.grip_site]
    turned, wanted, force = views.site_matrix[plan.grip_site], s.wanted, s.force
    apply(base, False, s.goal_position.ctypes.data, s.wanted_position.ctypes.data, 3, 3, s)
    times(base, False, s.goal_matrix.ctypes.data, False, wanted.ctypes.data, 3, 3, 3, s)
    nv = len(views.qvel)
    rows, velocity = memory.jacobian.ctypes.data, s.velocity.ctypes.data
    apply(rows, False, views.qvel.ctypes.data, velocity, 3, nv, s)
    apply(rows + 24 * nv, False, views.qvel.ctypes.data, velocity + 24, 3, nv, s)
    for i in range(3):
        force[i] = (views.site_position[plan.base_site, i] + s.wanted_position[i]) - grip[i]
        b, c = (i + 1) % 3, (i + 2) % 3
        x = turned[3 * b] * wanted[c, 0] - turned[3 * c] * wanted[b, 0]
        y = turned[3 * b + 1] * wanted[c, 1] - turned[3 * c + 1] * wanted[b, 1]
        z = turned[3 * b + 2] * wanted[c, 2] - turned[3 * c + 2] * wanted[b, 2]
        force[3 + i] = 0.5 * (x + y + z)
    for i in range(6):
        force[i] = force[i] * plan.kp[i] + -s.velocity[i] * plan.kd[i]


@kernel
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


@kernel
def _believed_mass(views: Views, plan: Plan, s: Scratch) -> None:
    """Subtract from the robot's inertia what its controller does not know of."""
    for i in range(ARM):
        s.mass[i, i] -= plan.armature_error[i]
    if plan.payload_mass > 0.0:
        _move_payload(views, plan, s)
        for axis in range(3):
            for i in range(ARM):
                for j in range(ARM):
                    s.mass[i, j] -= plan.payload_mass * s.payload[axis, i] * s.payload[axis, j]


@kernel
def _move_payload(views: Views, plan: Plan, s: Scratch) -> None:
    """Jacobian (3, 7) of the payload's center in the world, m/rad, into the scratch."""
    turned = views.site_matrix[plan.grip_site]
    for axis in range(3):
        b, c = (axis + 1) % 3, (axis + 2) % 3
        robot_b = robot_c = 0.0
        for i in range(3):
            robot_b += turned[3 * b + i] * plan.payload_center[i]
            robot_c += turned[3 * c + i] * plan.payload_center[i]
        for k in range(ARM):
            s.payload[axis, k] = s.jacobian[axis, k] + s.jacobian[3 + b, k] * robot_c - s.jacobian[3 + c, k] * robot_b


@kernel
def _inertias(s: Scratch) -> None:
    """Inverse of the mass matrix, and the gripper's inertia: in full, of its position alone, of its rotation alone."""
    mass_inverse, jacobian, product = s.mass_inverse.ctypes.data, s.jacobian.ctypes.data, s.product.ctypes.data
    invert_mass(s)
    # The product is symmetric apart from rounding, so that its transpose is what has to be handed to LAPACK: it reads columns.
    times(jacobian, False, mass_inverse, True, product, 6, ARM, ARM, s)
    times(product, False, jacobian, True, s.inertia.ctypes.data, 6, ARM, 6, s)
    transpose(s.inertia, 6)
    times(jacobian, False, mass_inverse, True, product, 3, ARM, ARM, s)
    times(product, False, jacobian, True, s.position_inertia.ctypes.data, 3, ARM, 3, s)
    transpose(s.position_inertia, 3)
    times(jacobian + 24 * ARM, False, mass_inverse, True, product, 3, ARM, ARM, s)
    times(product, False, jacobian + 24 * ARM, True, s.rotation_inertia.ctypes.data, 3, ARM, 3, s)
    transpose(s.rotation_inertia, 3)
    pseudo_inverse(s.inertia, 6, s)
    pseudo_inverse(s.position_inertia, 3, s)
    pseudo_inverse(s.rotation_inertia, 3, s)


@kernel
def torques(views: Views, plan: Plan, rest: Reals, s: Scratch) -> None:
    """Joint torques (7,): what the wanted force takes, gravity's, and the nullspace's, which pull to the posture at rest."""
    jacobian, wrench, force = s.jacobian.ctypes.data, s.wrench.ctypes.data, s.force.ctypes.data
    _mass_matrix(views, plan, s.mass)
    _believed_mass(views, plan, s)
    _inertias(s)
    times(s.mass_inverse.ctypes.data, True, jacobian, True, s.weighted.ctypes.data, ARM, ARM, 6, s)
    times(s.weighted.ctypes.data, False, s.inertia.ctypes.data, True, s.jbar.ctypes.data, ARM, 6, 6, s)
    times(s.jbar.ctypes.data, False, jacobian, False, s.nullspace.ctypes.data, ARM, 6, ARM, s)
    for i in range(ARM):
        for j in range(ARM):
            s.nullspace[i, j] = (1.0 if i == j else 0.0) - s.nullspace[i, j]
    apply(s.position_inertia.ctypes.data, True, force, wrench, 3, 3, s)
    apply(s.rotation_inertia.ctypes.data, True, force + 24, wrench + 24, 3, 3, s)
    apply(jacobian, True, wrench, s.torques.ctypes.data, ARM, 6, s)
    stiffness, damping = 10, math.sqrt(10) * 2
    for k in range(ARM):
        s.posture[k] = stiffness * (rest[k] - views.qpos[plan.joints[k]]) - damping * views.qvel[plan.dofs[k]]
    apply(s.mass.ctypes.data, True, s.posture.ctypes.data, s.posture_torques.ctypes.data, ARM, ARM, s)
    apply(s.nullspace.ctypes.data, True, s.posture_torques.ctypes.data, s.pulled.ctypes.data, ARM, ARM, s)
    for k in range(ARM):
        s.torques[k] = (s.torques[k] + views.qfrc_bias[plan.dofs[k]]) + s.pulled[k]
    if plan.payload_mass > 0.0:
        for k in range(ARM):
            s.torques[k] -= plan.payload_mass * GRAVITY * s.payload[2, k]


@kernel
def delay_torques(plan: Plan, memory: Memory, s: Scratch) -> None:
    """Replace the torques by those of ``plan.torque_delay`` substeps ago, interpolated between two substeps."""
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
