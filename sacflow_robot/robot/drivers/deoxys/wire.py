"""The workstation's side of deoxys's wire: four sockets, what is sent on two, and the newest of what the others bring."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping

import zmq

from sacflow_robot.errors import RobotError, UsageError, WireError, one_line
from sacflow_robot.robot.drivers.deoxys import messages
from sacflow_robot.robot.drivers.deoxys.config import DeoxysConfig
from sacflow_robot.robot.drivers.deoxys.messages import Controller, Interpolator
from sacflow_robot.robot.drivers.deoxys.objects import parse_sighting
from sacflow_robot.robot.drivers.deoxys.states import Heard, parse_arm_state, parse_gripper_state
from sacflow_robot.utils.rotations import Array

GRASP = {"width": -0.01, "speed": 0.5, "force": 30.0, "epsilon_inner": 0.08, "epsilon_outer": 0.08}
OPEN = {"width": 0.08, "speed": 0.1}
"""As deoxys's own client commands the gripper; a width below 0 closes on whatever is there."""

# Commands between this program and the network. Not one: ZeroMQ looks only once a millisecond at what has left, and a publisher
# drops what comes while its queue is full, such as a stop right after a standstill. The arm's side takes the newest it has.
_QUEUE = 16

_TIMEOUT_S = 0.2  # what deoxys's client puts there, and its control node does not read
_ESTIMATOR = {"alpha_q": 0.9, "alpha_dq": 0.9, "alpha_eef": 1.0}


def pose_command(config: DeoxysConfig, pose: Array, *, is_delta: bool = True) -> bytes:
    """An OSC_POSE command.

    Args:
        config: Gains and interpolation.
        pose: (6,), m and rad (rotation vector), base axes: how far to go from where the arm is, or where to.
        is_delta: Which of the two. Where to, as a pose of the end effector in base, only deoxys from August 2023 on takes.
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
        closing: The gripper's entry of the action.
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

    Args:
        config: Where.

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
