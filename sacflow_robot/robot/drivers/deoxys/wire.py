"""The workstation's side of deoxys's wire: commands to the arm and its gripper, those that keep the arm where it is, the sockets
on which they are sent, and the newest of what the others bring."""

import json
import threading
import time
from collections.abc import Mapping

import numpy as np
import zmq

from sacflow_robot.errors import RobotError, UsageError, WireError, one_line
from sacflow_robot.robot.drivers.deoxys import messages
from sacflow_robot.robot.drivers.deoxys.config import DeoxysConfig
from sacflow_robot.robot.drivers.deoxys.messages import Controller, Interpolator
from sacflow_robot.robot.drivers.deoxys.objects import parse_sighting
from sacflow_robot.robot.drivers.deoxys.states import (
    ArmState,
    GripperState,
    Heard,
    parse_arm_state,
    parse_gripper_state,
)
from sacflow_robot.utils.rotations import Array, matrix_to_vector

GRASP = {"width": -0.01, "speed": 0.5, "force": 30.0, "epsilon_inner": 0.08, "epsilon_outer": 0.08}
OPEN = {"width": 0.08, "speed": 0.1}
"""As deoxys's own client commands the gripper; a width below 0 closes on whatever is there."""

# Commands between this program and the network. Not one: ZeroMQ looks only once a millisecond at what has left, and a publisher
# drops what comes while its queue is full, such as a stop right after a standstill. The arm's side takes the newest it has.
_QUEUE = 16

_STARTS_NS = 1_000_000_000  # a command to the gripper that is older has been begun
_BRAKE_NS = 150_000_000
_AWAY_M, _AWAY_RAD = 0.02, 0.1
_TIMEOUT_S = 0.2  # what deoxys's client puts there, and its control node does not read
_ESTIMATOR = {"alpha_q": 0.9, "alpha_dq": 0.9, "alpha_eef": 1.0}


def pose_command(config: DeoxysConfig, pose: Array, *, is_delta: bool = True) -> bytes:
    """An OSC_POSE command.

    Args:
        pose: Target (6,): position (m), rotation vector (rad), base axes.
        is_delta: Relative to the current pose; else absolute, which needs deoxys from August 2023 on.
    """
    goal = dict(zip(("x", "y", "z", "ax", "ay", "az"), map(float, pose), strict=True))
    inner = messages.make(
        "FrankaOSCPoseControllerMessage",
        goal=messages.make("Goal", is_delta=is_delta, **goal),
        translational_stiffness=[config.translational_stiffness] * 3,
        rotational_stiffness=[config.rotational_stiffness] * 3,
        config=messages.make("FrankaOSCControllerConfig", residual_mass_vec=config.residual_mass_vec),
    )
    command = messages.make(
        "FrankaControlMessage",
        controller_type=Controller.OSC_POSE,
        traj_interpolator_type=Interpolator.LINEAR_POSE,
        traj_interpolator_time_fraction=config.time_fraction,
        timeout=_TIMEOUT_S,
    )
    command.control_msg.Pack(inner)
    command.state_estimator_msg.estimator_type = 1  # exponential smoothing; off, for is_estimation is not set
    command.state_estimator_msg.config.Pack(messages.make("ExponentialSmoothingConfig", **_ESTIMATOR))
    return bytes(command.SerializeToString())


def idle_command(*, termination: bool = False) -> bytes:
    """A command that asks for no controller; with ``termination``, the arm stops at once and its control ends."""
    command = messages.make("FrankaControlMessage", timeout=_TIMEOUT_S, termination=termination)
    command.control_msg.Pack(messages.make("FrankaDummyControllerMessage"))
    return bytes(command.SerializeToString())


def gripper_command(closing: float, force_n: float | None = None, width_m: tuple[float, float] | None = None) -> bytes:
    """A gripper command: grasp if ``closing`` is above 0, else open.

    deoxys's own client opens by as much as the action is negative; here its sign alone counts, as in robosuite.

    Args:
        force_n: Largest force to grasp with (N); None for no limit but deoxys's own choice.
        width_m: Least and greatest width to go to (m), likewise.
    """
    grasp, width = dict(GRASP), dict(OPEN)
    if force_n is not None:
        grasp["force"] = min(grasp["force"], force_n)
    if width_m is not None:
        width["width"] = min(width["width"], width_m[1])
        grasp["width"] = width_m[0] if width_m[0] > 0 else grasp["width"]
    command = messages.make("FrankaGripperControlMessage")
    if closing > 0:
        command.control_msg.Pack(messages.make("FrankaGripperGraspMessage", **grasp))
    else:
        command.control_msg.Pack(messages.make("FrankaGripperMoveMessage", **width))
    return bytes(command.SerializeToString())


def gripper_stop() -> bytes:
    """A gripper command that ends what the gripper does, at once."""
    command = messages.make("FrankaGripperControlMessage")
    command.control_msg.Pack(messages.make("FrankaGripperStopMessage", stop=True))
    return bytes(command.SerializeToString())


class Gripper:
    """The gripper, which finishes by itself what it was told.

    Attributes:
        force_n: Largest force to grasp with (N); None for no limit.
        width_m: Least and greatest width to go to (m), likewise.
    """

    def __init__(self) -> None:
        self.force_n: float | None = None
        self.width_m: tuple[float, float] | None = None
        self._closing = 0.0  # what it was told last; 0 for nothing
        self._since_ns = 0

    def command(self, closing: float, now_ns: int) -> bytes | None:
        """The command that closes the gripper above 0 and opens it below; None for 0."""
        if not closing:
            return None
        if closing * self._closing <= 0:
            self._closing = closing
            self._since_ns = now_ns
        return gripper_command(closing, self.force_n, self.width_m)

    def stop(self, seen: GripperState | None, now_ns: int) -> bytes | None:
        """The command that ends a motion; None for fingers at rest, which would let go of what they hold."""
        closing = self._closing
        self._closing = 0.0
        if not closing:
            return None
        starting = now_ns - self._since_ns < _STARTS_NS
        if seen is None or seen.moving or (starting and not (closing > 0 and seen.grasped)):
            return gripper_stop()
        return None


class Standstill:
    """The commands that hold an arm.

    A delta of nothing aims at where the arm is when deoxys reads it: it brakes a moving arm by the controller's damping, and
    pulls it nowhere. Under a load it gives way: each one aims at a place a little lower than the one before, as far below as
    the load moves the arm in a control period. With ``ABSOLUTE_HOLD`` such deltas only brake, for 0.15 s, in which the
    damping of deoxys's own gains takes 97 % of the speed; then the pose at which the arm stands is latched and sent as an
    absolute goal. It is a pose that was seen, so it lies within whatever limits the arm was in, and under a load the arm sags
    once, by the load over the stiffness, and stays.

    deoxys before 14 August 2023 added an absolute position to the current one. There is no asking which one runs: no message
    has a version, and a goal that is harmless under both meanings does not exist. (One without stiffness would be, but would
    show nothing, for joints stick.) So the setting is off unless the operator turns it on, and where it is wrong, or somebody
    pushes the arm, an arm that leaves the latched pose by 20 mm or 0.1 rad is held by deltas until it is connected again.
    """

    def __init__(self, config: DeoxysConfig) -> None:
        self._config = config
        self.reset()

    def reset(self) -> None:
        self._may_latch, self._paused = self._config.absolute_hold, False
        self.end()

    def end(self) -> None:
        """Forget the pose: the arm is commanded to move."""
        self._since_ns: int | None = None
        self._pose: tuple[Array, Array] | None = None

    def pause(self, paused: bool) -> None:
        """Latch nothing meanwhile: the arm is put somewhere else."""
        self.end()
        self._paused = paused

    def command(self, arm: ArmState | None, now_ns: int) -> bytes:
        """The command to send now.

        Args:
            arm: The arm's state; None if none is recent enough to hold at.
        """
        self._since_ns = now_ns if self._since_ns is None else self._since_ns
        may_latch = self._may_latch and not self._paused and now_ns - self._since_ns >= _BRAKE_NS
        if self._pose is None and arm is not None and may_latch:
            self._pose = arm.position, arm.rotation
        if self._pose is None:
            return pose_command(self._config, np.zeros(6))
        position, rotation = self._pose
        goal = np.concatenate([position, matrix_to_vector(rotation)])
        return pose_command(self._config, goal, is_delta=False)

    def left(self, arm: ArmState) -> str:
        """Message, once, about an arm that is not where it is held; empty if it is."""
        if self._pose is None:
            return ""
        meters = float(np.linalg.norm(arm.position - self._pose[0]))
        radians = float(np.linalg.norm(matrix_to_vector(arm.rotation @ self._pose[1].T)))
        if meters < _AWAY_M and radians < _AWAY_RAD:
            return ""
        self.end()
        self._may_latch = False
        return (
            f"the arm moved by {1e3 * meters:.0f} mm and {radians:.2f} rad from where it was held; was it pushed, or is deoxys "
            "older than August 2023, which needs SACFLOW.ABSOLUTE_HOLD: false?"
        )


def reset_twin(address: str, seed: int, within_s: float) -> int:
    """Have a twin start an episode; the number of the first frame that belongs to it.

    Raises:
        RobotError: It does not answer within that time (s), or refuses.
    """
    try:
        with zmq.Context() as context, context.socket(zmq.REQ) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(address)
            socket.send(json.dumps({"reset": seed}).encode())
            if not socket.poll(round(within_s * 1e3)):
                raise RobotError(f"the twin does not answer at {address}; SACFLOW.RESET is for a twin alone")
            reply: Mapping[str, object] = json.loads(socket.recv())
            return int(str(reply["frame"]))
    except (ValueError, KeyError, TypeError, zmq.ZMQError) as error:
        raise RobotError(f"the twin was not reset: {one_line(error)}") from None


class DeoxysWire(Heard):
    """The sockets. Sending is safe from any thread; what is received is read on a thread that calls :meth:`receive`.

    Commands are published with a short queue, and with none where nobody has subscribed, so that nothing old is acted on
    after a reconnect.

    Attributes:
        malformed: Messages that could not be read.
        complaint: What was wrong with the last of them.

    Raises:
        UsageError: A port is taken, or the address is not this computer's.
    """

    def __init__(self, config: DeoxysConfig) -> None:
        super().__init__()
        self.malformed = 0
        self.complaint = ""
        self._context = zmq.Context()
        self._lock = threading.Lock()
        try:
            self._commands = self._publisher(config, config.command_port)
            self._gripper_commands = self._publisher(config, config.gripper_command_port)
            self._poller = zmq.Poller()
            self._arm_states = self._subscriber(f"tcp://{config.nuc_ip}:{config.state_port}")
            self._gripper_states = self._subscriber(f"tcp://{config.nuc_ip}:{config.gripper_state_port}")
            published = config.objects.startswith(("tcp://", "ipc://"))
            self._sightings = self._subscriber(config.objects) if published else None
        except zmq.ZMQError as error:
            self._context.destroy(0)
            raise UsageError(
                f"deoxys's sockets cannot be opened on {config.pc_ip}: {one_line(error)}; is PC.IP this computer's, and no "
                "other program on these ports?"
            ) from None

    def _publisher(self, config: DeoxysConfig, port: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.PUB)
        socket.setsockopt(zmq.SNDHWM, _QUEUE)
        socket.setsockopt(zmq.LINGER, 100)
        socket.bind(f"tcp://{config.pc_ip}:{port}")
        return socket

    def _subscriber(self, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.SUB)
        socket.setsockopt(zmq.CONFLATE, 1)
        socket.setsockopt(zmq.LINGER, 0)
        socket.subscribe(b"")
        socket.connect(address)
        self._poller.register(socket, zmq.POLLIN)
        return socket

    def send(self, command: bytes, gripper: bytes | None = None) -> None:
        """Publish an arm command, and a gripper command with it."""
        with self._lock:
            self._commands.send(command)
            if gripper is not None:
                self._gripper_commands.send(gripper)

    def receive(self, wait_s: float = 0.005) -> None:
        """Wait for news at most that long, and keep it."""
        for socket, _ in self._poller.poll(round(wait_s * 1e3)):
            data, now = socket.recv(), time.monotonic_ns()
            try:
                if socket is self._arm_states:
                    self.take_arm(parse_arm_state(data, now))
                elif socket is self._gripper_states:
                    self.take_gripper(parse_gripper_state(data, now))
                else:
                    self.take_sighting(parse_sighting(data, now))
            except WireError as error:
                self.malformed, self.complaint = self.malformed + 1, str(error)

    def close(self) -> None:
        """Close the sockets; what was just sent still goes out."""
        for socket in (self._commands, self._gripper_commands, self._arm_states, self._gripper_states, self._sightings):
            if socket is not None:
                socket.close()
        self._context.term()
