"""Data of the compiled control step: constants, the plan of a task, and the arrays that kernels read and write."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Reals = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

ARM, ACTION = 7, 7  # joints of the robot; entries of an action, the last being the gripper's
DELAYED = 10  # substeps that torques may be late

# Kinds of terms of the observation ``object``: a row of ``Plan.terms`` is a kind, then the ids that it needs.
BODY_POSITION, BODY_QUATERNION, BODY_FROM_GRIP, BODY_FROM_BODY, SITE_POSITION, SITE_FROM_GRIP, JOINT, POSE_IN_GRIP = (
    range(8)
)
TERM_SIZES = (3, 4, 3, 3, 3, 3, 1, 7)


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
    """Constants of a task: indices into the model, gains and limits of robosuite's controllers, terms of the observation, and
    the goal."""

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
    terms: Indices  # (K, 3) of the observation ``object``
    goal_kind: int  # 0: the position of body goal_id; 1: the joint at goal_id of qpos
    goal_id: int
    goal_low: Reals  # (3,)
    goal_high: Reals  # (3,)
    goal_body: int  # body that x and y are relative to, or -1
    goal_contacts: bool  # contacts decide as well; the caller checks them
    goal_released: bool  # the gripper has to be away from the body
    # Differences of the robot from what its controller assumes; zeros for the nominal robot. See envs/robot_dynamics.py.
    armature_error: Reals  # (7,) kg m²
    payload_mass: float  # kg
    payload_center: Reals  # (3,) m, in the grip site's frame
    torque_delay: float  # substeps from a torque's computation to its effect, at most DELAYED


class Memory(NamedTuple):
    """State of a robot besides its ``mjData``."""

    time: Reals  # (1,)
    rest: Reals  # (7,) posture that the robot's nullspace is pulled to
    fingers: Reals  # (2,) the gripper's command, which moves at a limited speed
    jacobian: Reals  # (6, nv) of the gripper, linear then angular; room for MuJoCo to write it to
    goal: Reals  # (12,) of the command that ``follow`` holds: position, then rotation by rows, in the base's frame
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
    letters: npt.NDArray[np.uint8]  # N, T, L, R, U: LAPACK's options for the layout of a matrix
    constants: Reals  # 1, 0
