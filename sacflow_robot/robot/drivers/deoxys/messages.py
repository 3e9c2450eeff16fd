"""deoxys's protobuf messages, made at import from the table below, without a compiler or generated code.

They are in no protobuf package, as deoxys's are, and in a descriptor pool of their own, so that this module and deoxys's
own generated one can be imported side by side. Field numbers are from deoxys_control's ``franka_controller.proto`` and
``franka_robot_state.proto`` (UT-Austin-RPL/deoxys_control, Apache-2.0); messages that nobody here speaks (joint
positions and velocities, torques) are left out, and fields that nobody here reads are kept by protobuf as unknown ones.
"""

import re
from enum import IntEnum
from typing import Any

from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from sacflow_robot.errors import WireError, one_line

_FILE = "sacflow_robot/deoxys.proto"

ERRORS = (
    "joint_position_limits_violation",
    "cartesian_position_limits_violation",
    "self_collision_avoidance_violation",
    "joint_velocity_violation",
    "cartesian_velocity_violation",
    "force_control_safety_violation",
    "joint_reflex",
    "cartesian_reflex",
    "max_goal_pose_deviation_violation",
    "max_path_pose_deviation_violation",
    "cartesian_velocity_profile_safety_violation",
    "joint_position_motion_generator_start_pose_invalid",
    "joint_motion_generator_position_limits_violation",
    "joint_motion_generator_velocity_limits_violation",
    "joint_motion_generator_velocity_discontinuity",
    "joint_motion_generator_acceleration_discontinuity",
    "cartesian_position_motion_generator_start_pose_invalid",
    "cartesian_motion_generator_elbow_limit_violation",
    "cartesian_motion_generator_velocity_limits_violation",
    "cartesian_motion_generator_velocity_discontinuity",
    "cartesian_motion_generator_acceleration_discontinuity",
    "cartesian_motion_generator_elbow_sign_inconsistent",
    "cartesian_motion_generator_start_elbow_invalid",
    "cartesian_motion_generator_joint_position_limits_violation",
    "cartesian_motion_generator_joint_velocity_limits_violation",
    "cartesian_motion_generator_joint_velocity_discontinuity",
    "cartesian_motion_generator_joint_acceleration_discontinuity",
    "cartesian_position_motion_generator_invalid_frame",
    "force_controller_desired_force_tolerance_violation",
    "controller_torque_discontinuity",
    "start_elbow_sign_inconsistent",
    "communication_constraints_violation",
    "power_limit_violation",
    "joint_p2p_insufficient_torque_for_planning",
    "tau_j_range_violation",
    "instability_detected",
    "joint_move_in_wrong_direction",
)
"""libfranka's errors, in the order of their field numbers from 1."""

# Enums are declared as int32 here: the bytes are the same, and values that a newer deoxys adds need no care.
_MESSAGES = {
    "Goal": "bool is_delta = 1; double x = 2; double y = 3; double z = 4; double ax = 5; double ay = 6; double az = 7;",
    "ExponentialSmoothingConfig": (
        "double alpha_q = 1; double alpha_dq = 2; double alpha_eef = 3; double alpha_eef_vel = 4;"
    ),
    "FrankaStateEstimatorMessage": "bool is_estimation = 1; int32 estimator_type = 2; Any config = 5;",
    "FrankaOSCControllerConfig": "repeated double residual_mass_vec = 1;",
    "FrankaDummyControllerMessage": "Goal goal = 1; bool termination = 2;",
    "FrankaOSCPoseControllerMessage": (
        "Goal goal = 1; repeated double translational_stiffness = 2; repeated double rotational_stiffness = 3;"
        "bool termination = 4; FrankaOSCControllerConfig config = 5;"
    ),
    "FrankaControlMessage": (
        "bool termination = 1; int32 controller_type = 2; int32 traj_interpolator_type = 3;"
        "double traj_interpolator_time_fraction = 4; Any control_msg = 5; double timeout = 6;"
        "FrankaStateEstimatorMessage state_estimator_msg = 7;"
    ),
    "FrankaGripperHomingMessage": "bool homing = 1;",
    "FrankaGripperMoveMessage": "double width = 1; double speed = 2;",
    "FrankaGripperStopMessage": "bool stop = 1;",
    "FrankaGripperGraspMessage": (
        "double width = 1; double speed = 2; double force = 3; double epsilon_inner = 4; double epsilon_outer = 5;"
    ),
    "FrankaGripperControlMessage": "bool termination = 1; Any control_msg = 2;",
    "FrankaDuration": "double toSec = 1; uint64 toMSec = 2;",  # nested in deoxys; the bytes do not tell
    "FrankaErrors": " ".join(f"bool {name} = {i};" for i, name in enumerate(ERRORS, 1)),
    "FrankaGripperStateMessage": (
        "double width = 1; double max_width = 2; bool is_grasped = 3; uint32 temperature = 4; FrankaDuration time = 5;"
    ),
    "FrankaRobotStateMessage": (
        "repeated double O_T_EE = 1; repeated double O_T_EE_d = 2; repeated double F_T_EE = 3;"
        "repeated double tau_J = 21; repeated double tau_J_d = 22; repeated double q = 24; repeated double q_d = 25;"
        "repeated double dq = 26; repeated double dq_d = 27; repeated double tau_ext_hat_filtered = 33;"
        "repeated double O_F_ext_hat_K = 34; FrankaErrors current_errors = 42; FrankaErrors last_motion_errors = 43;"
        "double control_command_success_rate = 44; int32 robot_mode = 45; FrankaDuration time = 46; uint64 frame = 48;"
    ),
}


class Controller(IntEnum):
    """``controller_type`` of an arm command, those that are used here."""

    NO_CONTROL = 0
    OSC_POSE = 1


class Interpolator(IntEnum):
    """``traj_interpolator_type`` of an arm command, the one that is used here."""

    LINEAR_POSE = 2


class RobotMode(IntEnum):
    """``robot_mode`` of an arm state."""

    OTHER = 0
    IDLE = 1
    MOVE = 2
    GUIDING = 3
    REFLEX = 4
    USER_STOPPED = 5
    AUTOMATIC_ERROR_RECOVERY = 6


def _make_classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name=_FILE, syntax="proto3", dependency=["google/protobuf/any.proto"])
    for message, text in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for repeated, kind, name, number in re.findall(r"(repeated )?(\w+) (\w+) = (\d+);", text):
            field = described.field.add(name=name, number=int(number))
            field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            field.type = getattr(field, f"TYPE_{kind.upper()}", field.TYPE_MESSAGE)
            if field.type == field.TYPE_MESSAGE:
                field.type_name = ".google.protobuf.Any" if kind == "Any" else f".{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(any_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(file.SerializeToString())
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in _MESSAGES}


_CLASSES = _make_classes()


def make(name: str, **fields: Any) -> Any:
    """A message of that name, e.g. ``make("Goal", is_delta=True, x=0.01)``."""
    return _CLASSES[name](**fields)


def parse(name: str, data: bytes) -> Any:
    """Decode a message."""
    message = _CLASSES[name]()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise WireError(f"{len(data)} bytes that are not a {name} of deoxys ({one_line(error)})") from None
    return message


def packed(message: Any, field: str = "control_msg") -> Any:
    """The message inside a message's ``Any`` field, decoded; None if it is empty.

    Raises:
        WireError: Its type is unknown, or it is damaged.
    """
    inner = getattr(message, field)
    if not inner.type_url:
        return None
    name = inner.type_url.rpartition("/")[2]
    if name not in _CLASSES:
        raise WireError(f"a message of type {name or inner.type_url}, which is not spoken here")
    return parse(name, inner.value)


def error_names(errors: Any) -> list[str]:
    """Names of the libfranka errors that are set in an arm state's ``current_errors`` or ``last_motion_errors``."""
    return [name for name in ERRORS if getattr(errors, name)]
