"""The messages against bytes put together by hand, after protobuf's encoding rules alone."""

import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sacflow_robot.errors import WireError
from sacflow_robot.robot.drivers.deoxys import messages
from sacflow_robot.robot.drivers.deoxys.messages import Controller, Interpolator, RobotMode

VARINT, FIXED64, LENGTH = 0, 1, 2


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def key(number: int, kind: int) -> bytes:
    return varint(number << 3 | kind)


def integer(number: int, value: int) -> bytes:
    return key(number, VARINT) + varint(value)


def double(number: int, value: float) -> bytes:
    return key(number, FIXED64) + struct.pack("<d", value)


def inside(number: int, data: bytes) -> bytes:
    return key(number, LENGTH) + varint(len(data)) + data


def doubles(number: int, values: list[float]) -> bytes:
    return inside(number, struct.pack(f"<{len(values)}d", *values))


def any_of(number: int, name: str, data: bytes) -> bytes:
    return inside(number, inside(1, f"type.googleapis.com/{name}".encode()) + inside(2, data))


def hand_made_command() -> bytes:
    goal = integer(1, 1) + double(2, 0.05) + double(4, -0.01) + double(7, 0.5)
    residual = doubles(1, [0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5])
    osc = inside(1, goal) + doubles(2, [150.0] * 3) + doubles(3, [250.0] * 3) + inside(5, residual)
    estimator = integer(1, 1) + integer(2, 1) + any_of(5, "ExponentialSmoothingConfig", double(1, 0.9))
    return (
        integer(2, 1)
        + integer(3, 2)
        + double(4, 0.3)
        + any_of(5, "FrankaOSCPoseControllerMessage", osc)
        + double(6, 0.2)
        + inside(7, estimator)
    )


def test_a_hand_made_arm_command_decodes() -> None:
    command = messages.parse("FrankaControlMessage", hand_made_command())
    assert (command.termination, command.timeout, command.traj_interpolator_time_fraction) == (False, 0.2, 0.3)
    assert command.controller_type == Controller.OSC_POSE
    assert command.traj_interpolator_type == Interpolator.LINEAR_POSE
    osc = messages.packed(command)
    assert (osc.goal.is_delta, osc.goal.x, osc.goal.y, osc.goal.z, osc.goal.az) == (True, 0.05, 0.0, -0.01, 0.5)
    assert list(osc.translational_stiffness) == [150.0] * 3
    assert list(osc.rotational_stiffness) == [250.0] * 3
    assert list(osc.config.residual_mass_vec) == [0.0] * 5 + [0.5] * 2
    assert messages.packed(command.state_estimator_msg, "config").alpha_q == 0.9


def test_the_same_arm_command_encodes_to_the_same_bytes() -> None:
    goal = messages.make("Goal", is_delta=True, x=0.05, z=-0.01, az=0.5)
    config = messages.make("FrankaOSCControllerConfig", residual_mass_vec=[0.0] * 5 + [0.5] * 2)
    gains = {"translational_stiffness": [150.0] * 3, "rotational_stiffness": [250.0] * 3}
    command = messages.make(
        "FrankaControlMessage",
        controller_type=1,
        traj_interpolator_type=2,
        traj_interpolator_time_fraction=0.3,
        timeout=0.2,
    )
    command.control_msg.Pack(messages.make("FrankaOSCPoseControllerMessage", goal=goal, config=config, **gains))
    command.state_estimator_msg.is_estimation, command.state_estimator_msg.estimator_type = True, 1
    command.state_estimator_msg.config.Pack(messages.make("ExponentialSmoothingConfig", alpha_q=0.9))
    assert command.SerializeToString() == hand_made_command()


def test_a_hand_made_arm_state_decodes_with_fields_that_are_not_spoken_here() -> None:
    pose = [float(i) for i in range(16)]
    joints = [0.1 * i for i in range(7)]
    data = (
        doubles(1, pose)
        + doubles(5, [1.0] * 16)  # NE_T_EE
        + double(7, 0.73)  # m_ee
        + doubles(24, joints)
        + inside(42, integer(7, 1) + integer(36, 1))
        + double(44, 0.99)
        + integer(45, 4)
        + inside(46, double(1, 12.5) + integer(2, 12500))
        + integer(48, 2**40)
    )
    state = messages.parse("FrankaRobotStateMessage", data)
    assert (list(state.O_T_EE), list(state.q)) == (pose, joints)
    assert messages.error_names(state.current_errors) == ["joint_reflex", "instability_detected"]
    assert (state.robot_mode, state.time.toMSec, state.frame) == (RobotMode.REFLEX, 12500, 2**40)
    assert messages.parse("FrankaRobotStateMessage", state.SerializeToString()).SerializeToString() == (
        state.SerializeToString()
    )


def test_repeated_doubles_are_read_one_by_one_too() -> None:
    unpacked = b"".join(double(24, float(i)) for i in range(7))
    assert list(messages.parse("FrankaRobotStateMessage", unpacked).q) == [float(i) for i in range(7)]


@pytest.mark.parametrize(
    ("name", "fields", "data"),
    [
        ("FrankaGripperMoveMessage", {"width": 0.08, "speed": 0.1}, double(1, 0.08) + double(2, 0.1)),
        (
            "FrankaGripperGraspMessage",
            {"width": -0.01, "speed": 0.5, "force": 30.0, "epsilon_inner": 0.08, "epsilon_outer": 0.08},
            double(1, -0.01) + double(2, 0.5) + double(3, 30.0) + double(4, 0.08) + double(5, 0.08),
        ),
        ("FrankaGripperHomingMessage", {"homing": True}, integer(1, 1)),
        ("FrankaGripperStopMessage", {"stop": True}, integer(1, 1)),
    ],
)
def test_gripper_commands(name: str, fields: dict[str, float], data: bytes) -> None:
    message = messages.make("FrankaGripperControlMessage")
    message.control_msg.Pack(messages.make(name, **fields))
    assert message.SerializeToString() == any_of(2, name, data)
    inner = messages.packed(messages.parse("FrankaGripperControlMessage", any_of(2, name, data)))
    assert {field: getattr(inner, field) for field in fields} == fields


def test_a_hand_made_gripper_state_decodes() -> None:
    data = double(1, 0.04) + double(2, 0.08) + integer(3, 1) + integer(4, 31) + inside(5, integer(2, 7))
    state = messages.parse("FrankaGripperStateMessage", data)
    assert (state.width, state.max_width, state.is_grasped, state.temperature, state.time.toMSec) == (
        *(0.04, 0.08, True),
        *(31, 7),
    )


def test_what_is_no_message_is_said_to_be_none() -> None:
    with pytest.raises(WireError, match="3 bytes that are not a FrankaControlMessage"):
        messages.parse("FrankaControlMessage", b"\x2a\xff\xff")
    with pytest.raises(WireError, match="type FrankaTeleport, which is not spoken here"):
        messages.packed(messages.parse("FrankaControlMessage", any_of(5, "FrankaTeleport", b"")))
    assert messages.packed(messages.make("FrankaControlMessage")) is None


@given(st.binary(max_size=200))
@settings(max_examples=2000)
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    for name in ("FrankaControlMessage", "FrankaRobotStateMessage", "FrankaGripperControlMessage"):
        try:
            message = messages.parse(name, data)
            if "Control" in name:
                messages.packed(message)
        except WireError:
            continue


@given(st.lists(st.floats(), min_size=6, max_size=6))
@settings(max_examples=500)
def test_goals_go_round_bit_for_bit(values: list[float]) -> None:
    goal = messages.make("Goal", **dict(zip(("x", "y", "z", "ax", "ay", "az"), values, strict=True)))
    back = messages.parse("Goal", goal.SerializeToString())
    for name, value in zip(("x", "y", "z", "ax", "ay", "az"), values, strict=True):
        found = getattr(back, name)
        assert found == value or (math.isnan(found) and math.isnan(value))
