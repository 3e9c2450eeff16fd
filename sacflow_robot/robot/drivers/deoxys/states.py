"""States of arm and gripper, decoded; the newest of each, as old as what it repeats; and observations made of them."""

import time
from dataclasses import dataclass, replace

import numpy as np

from sacflow_robot.errors import RobotError, WireError
from sacflow_robot.robot.drivers.deoxys import messages
from sacflow_robot.robot.drivers.deoxys.config import DeoxysConfig, split_part
from sacflow_robot.robot.drivers.deoxys.messages import RobotMode
from sacflow_robot.robot.drivers.deoxys.objects import Sighting, checked
from sacflow_robot.spec import FloatArray
from sacflow_robot.utils.rotations import Array, from_matrix, matrix_to_vector

_STILL_M = 2e-4  # between two gripper states at 40 Hz; what moves makes ten times that

STOPPED_MODES = {
    RobotMode.REFLEX: "a reflex: it touched something, or was asked for too much; unlock it in Desk and look at why",
    RobotMode.USER_STOPPED: "the user stop is pressed; release it",
    RobotMode.GUIDING: "a person is guiding it by hand; let go",
    RobotMode.AUTOMATIC_ERROR_RECOVERY: "it is recovering from an error; wait",
}
"""Modes in which an arm takes no command, and what to do."""


@dataclass(frozen=True)
class ArmState:
    """One arm state.

    Attributes:
        position: Of libfranka's end effector in base (3,), m.
        rotation: Likewise (3, 3).
        mode: libfranka's robot mode, a :class:`RobotMode` where it is known.
        errors: Names of libfranka's errors that are set.
        frame: Counter of the real-time computer.
        joints: Joint positions (7,), rad; None if the message has none.
        stamp_ns: When it was captured, by the arm's own clock (ns, told to a millisecond); 0 if the message does not say.
        received_ns: When the first message of this frame arrived (monotonic ns).
        read_ns: When the first message with this ``stamp_ns`` arrived: deoxys counts the frames that it publishes, whether or
            not it has read the arm since the one before.
    """

    position: Array
    rotation: Array
    mode: int
    errors: tuple[str, ...]
    frame: int
    joints: Array | None
    stamp_ns: int
    received_ns: int
    read_ns: int = 0


@dataclass(frozen=True)
class GripperState:
    """One gripper state.

    Attributes:
        width: Distance between the fingers (m).
        received_ns: When the first message with this ``stamp_ns`` arrived (monotonic ns).
        stamp_ns: When it was captured, by the arm's own clock; 0 if the message does not say.
        grasped: Whether libfranka holds that something is grasped.
        moving: Whether the width is another than that of the state before.
    """

    width: float
    received_ns: int
    stamp_ns: int = 0
    grasped: bool = False
    moving: bool = False


def parse_arm_state(data: bytes, received_ns: int) -> ArmState:
    """Decode an arm state.

    Raises:
        WireError: The message is not an arm state, or its pose is invalid.
    """
    state = messages.parse("FrankaRobotStateMessage", data)
    pose = np.array(state.O_T_EE, np.float64)
    if pose.shape != (16,) or not np.isfinite(pose).all():
        raise WireError("an arm state whose O_T_EE is not 16 finite numbers")
    matrix = pose.reshape(4, 4).T  # column major on the wire
    rotation = matrix[:3, :3]
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-2 or np.linalg.det(rotation) < 0:
        raise WireError("an arm state whose O_T_EE is not a pose")
    errors = tuple(messages.error_names(state.current_errors))
    joints = np.array(state.q, np.float64)
    if joints.shape not in ((0,), (7,)) or not np.isfinite(joints).all():
        raise WireError("an arm state whose q is not 7 finite numbers")
    return ArmState(
        matrix[:3, 3].copy(), rotation.copy(), state.robot_mode, errors, state.frame, joints if len(joints) else None,
        state.time.toMSec * 1_000_000, received_ns, received_ns,
    )  # fmt: skip


def parse_gripper_state(data: bytes, received_ns: int) -> GripperState:
    """Decode a gripper state.

    Raises:
        WireError: The message is not a gripper state, or its width is not finite.
    """
    state = messages.parse("FrankaGripperStateMessage", data)
    if not np.isfinite(state.width):
        raise WireError("a gripper state whose width is not a number")
    return GripperState(float(state.width), received_ns, state.time.toMSec * 1_000_000, state.is_grasped)


def fault_of(arm: ArmState) -> str:
    """The reason why the arm takes no commands; empty if it does."""
    why = STOPPED_MODES.get(RobotMode(arm.mode) if arm.mode in list(RobotMode) else RobotMode.OTHER, "")
    if arm.errors:
        return f"{', '.join(arm.errors)}{f' ({why})' if why else ''}"
    return why


class Heard:
    """The newest that was heard. A message whose counter has not advanced brings nothing new: what it repeats stays as old as
    it is.

    Attributes:
        repeats: For those of the three whose last message was a repetition, by ``arm state``, ``gripper state`` and ``object
            pose``: what it repeats.
        restarted: Those of the three that have begun to count anew, as after a restart of the other side, and how it showed.
    """

    def __init__(self) -> None:
        self.arm: ArmState | None = None
        self.gripper: GripperState | None = None
        self.sighting: Sighting | None = None
        self.repeats: dict[str, str] = {}
        self.restarted: dict[str, str] = {}

    def take_arm(self, new: ArmState) -> None:
        old, said = self.arm, ""
        if old is not None and (new.frame < old.frame or new.stamp_ns < old.stamp_ns):
            self.restarted["arm state"] = f"the arm's states began anew (frame {old.frame}, then {new.frame})"
        elif old is not None and new.frame == old.frame > 0:  # one that counts nothing has frame 0 for ever
            said = f"the state messages repeat frame {old.frame}"
            new = replace(new, received_ns=old.received_ns, read_ns=old.read_ns)
        elif old is not None and new.stamp_ns == old.stamp_ns > 0:
            said = f"the state messages repeat the arm's time {old.stamp_ns / 1e9:.3f} s, up to frame {new.frame}"
            new = replace(new, read_ns=old.read_ns)
        self._keep_count("arm state", said)
        self.arm = new

    def take_gripper(self, new: GripperState) -> None:
        old, said = self.gripper, ""
        if old is not None and new.stamp_ns < old.stamp_ns:
            self.restarted["gripper state"] = "the gripper's states began anew"
        elif old is not None and new.stamp_ns == old.stamp_ns > 0:
            said = f"the gripper's messages repeat its time {old.stamp_ns / 1e9:.3f} s"
            new = replace(new, received_ns=old.received_ns, moving=old.moving)
        elif old is not None:
            new = replace(new, moving=abs(new.width - old.width) > _STILL_M)
        self._keep_count("gripper state", said)
        self.gripper = new

    def take_sighting(self, sighting: Sighting) -> None:
        """Take in what an object source saw."""
        old, new, said = self.sighting, checked(sighting, time.monotonic_ns()), ""
        if old is not None and 0 <= new.frame < old.frame:
            self.restarted["object pose"] = f"the object source began anew (frame {old.frame}, then {new.frame})"
        elif old is not None and new.frame == old.frame >= 0:
            new, said = replace(new, time_ns=old.time_ns), f"the object source repeats frame {old.frame}"
        elif old is not None and new.time_ns < old.time_ns:
            new, said = old, "the capture times of the object source run backward"
        elif old is not None and new.time_ns == old.time_ns:
            said = "the object source repeats its capture time"
        self._keep_count("object pose", said)
        self.sighting = new

    def _keep_count(self, what: str, said: str) -> None:
        if said:
            self.repeats[what] = said
        else:
            self.repeats.pop(what, None)


class ObservationBuilder:
    """Makes observations, in which quaternions do not jump within an episode."""

    def __init__(self, config: DeoxysConfig) -> None:
        self.config = config
        self.begin()

    def begin(self) -> None:
        self._quaternion: Array | None = None
        self._before: tuple[ArmState, float] | None = None

    def commanded(self, arm: ArmState, closing: float) -> None:
        """Keep where the arm was when it was commanded, and the gripper's entry of the action."""
        self._before = arm, closing

    def measured(self, arm: ArmState) -> FloatArray | None:
        """Motion of the arm since the last command, as the action (7,) that would command it; None before the first."""
        if self._before is None:
            return None
        before, closing = self._before
        turned = matrix_to_vector(arm.rotation @ before.rotation.T)
        moved = np.concatenate([arm.position - before.position, turned]) / self.config.action_scale
        return np.append(moved, closing).astype(np.float32)

    def __call__(self, arm: ArmState, gripper: GripperState, sighting: Sighting | None) -> dict[str, FloatArray]:
        """The observation by its keys, float32.

        Raises:
            RobotError: A part of it is not available.
        """
        world = np.array(self.config.base_pos_in_world)
        eef = arm.position + arm.rotation @ np.array(self.config.eef_pos_in_ee) + world
        quaternion = from_matrix(arm.rotation)
        # q and -q are one rotation; without jumps within an episode.
        largest = quaternion[np.abs(quaternion).argmax()]
        if (largest if self._quaternion is None else quaternion @ self._quaternion) < 0:
            quaternion = -quaternion
        self._quaternion = quaternion
        arrays = {
            "robot0_eef_pos": eef,
            "robot0_eef_quat": quaternion,
            "robot0_gripper_qpos": np.array([gripper.width / 2, -gripper.width / 2]),
        }
        if self.config.joints:
            if arm.joints is None:
                raise RobotError("the arm's states have no joint positions (field q); drive it without joints=1")
            arrays["robot0_joint_pos"] = arm.joints
        if sighting is not None and self.config.object:
            arrays["object"] = np.concatenate([self._part(part, sighting, eef) for part in self.config.object])
        return {key: array.astype(np.float32) for key, array in arrays.items()}

    def _part(self, part: str, sighting: Sighting, eef: Array) -> Array:
        relative, name, what = split_part(part)
        if name not in sighting.poses:
            raise RobotError(f"the object {name!r} is not seen; seen are: {', '.join(sighting.poses) or 'none'}")
        pose = sighting.poses[name]
        if what == "quat":
            return pose[3:]
        position: Array = pose[:3] + np.array(self.config.base_pos_in_world)
        return position - eef if relative else position
