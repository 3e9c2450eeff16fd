"""The arm's side of deoxys's wire without a simulator, and an object source: both do what a test has them do."""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import zmq

from sacflow_robot.robot.drivers.deoxys import messages
from sacflow_robot.robot.drivers.deoxys.config import DeoxysConfig
from sacflow_robot.robot.drivers.deoxys.messages import Controller, RobotMode
from sacflow_robot.robot.drivers.deoxys.objects import Sighting

DOWN = [1.0, 0, 0, 0, 0, -1, 0, 0, 0, 0, -1, 0]
"""Rotation part of O_T_EE of a gripper that looks down, column major."""


class BareArm:
    """Publishes states at 100 Hz, in which frame and time advance unless a test holds them.

    Attributes:
        position: Of the end effector in base (3,), m.
        frame: Frame of the next state.
        stamp_ms: The arm's own time in it.
        counting: Whether frames advance.
        reading: Whether the arm's time does.
        publishing: Whether anything is sent at all.
        width: Distance between the fingers (m).
        arm_commands: Arm commands heard, with the time of their arrival (monotonic s).
        gripper_commands: Names of gripper commands heard.
    """

    def __init__(self, config: DeoxysConfig) -> None:
        self.position, self.frame, self.stamp_ms, self.width = np.array([0.5, 0.0, 0.4]), 1, 5000, 0.08
        self.counting = self.reading = self.publishing = True
        self.mode, self.grasped = RobotMode.MOVE, False
        self.arm_commands: list[tuple[float, Any]] = []
        self.gripper_commands: list[str] = []
        self._config, self._ending = config, threading.Event()
        self._thread = threading.Thread(target=self._live)
        self._thread.start()

    def close(self) -> None:
        self._ending.set()
        self._thread.join()

    def goals(self, since: float = 0.0) -> list[tuple[bool, list[float]]]:
        """Goals of the OSC_POSE commands heard since then: whether they are deltas, and their six numbers."""
        found = []
        for at, command in list(self.arm_commands):
            if at >= since and command.controller_type == Controller.OSC_POSE:
                goal = messages.packed(command).goal
                found.append((bool(goal.is_delta), [goal.x, goal.y, goal.z, goal.ax, goal.ay, goal.az]))
        return found

    def _live(self) -> None:
        config = self._config
        with zmq.Context() as context:
            states, grippers = context.socket(zmq.PUB), context.socket(zmq.PUB)
            states.bind(f"tcp://{config.nuc_ip}:{config.state_port}")
            grippers.bind(f"tcp://{config.nuc_ip}:{config.gripper_state_port}")
            commands, gripper_commands = context.socket(zmq.SUB), context.socket(zmq.SUB)
            for socket, port in ((commands, config.command_port), (gripper_commands, config.gripper_command_port)):
                socket.setsockopt(zmq.RECONNECT_IVL, 20)
                socket.subscribe(b"")
                socket.connect(f"tcp://{config.pc_ip}:{port}")
            while not self._ending.wait(0.01):
                if self.publishing:
                    states.send(self._state())
                    grippers.send(self._gripper_state())
                while commands.poll(0):
                    self.arm_commands.append(
                        (time.monotonic(), messages.parse("FrankaControlMessage", commands.recv()))
                    )
                while gripper_commands.poll(0):
                    heard = messages.parse("FrankaGripperControlMessage", gripper_commands.recv())
                    self.gripper_commands.append(messages.packed(heard).DESCRIPTOR.name)
            for socket in (states, grippers, commands, gripper_commands):
                socket.close(0)

    def _state(self) -> bytes:
        pose = [*DOWN, *self.position, 1.0]
        state = messages.make("FrankaRobotStateMessage", O_T_EE=pose, q=[0.0] * 7, robot_mode=int(self.mode))
        self.frame += self.counting
        self.stamp_ms += 10 * self.reading
        state.frame, state.time.toMSec = self.frame, self.stamp_ms
        return bytes(state.SerializeToString())

    def _gripper_state(self) -> bytes:
        state = messages.make("FrankaGripperStateMessage", width=self.width, max_width=0.08, is_grasped=self.grasped)
        state.time.toMSec = time.monotonic_ns() // 1_000_000
        return bytes(state.SerializeToString())


class Source:
    """An object source that does what a test has it do."""

    def __init__(self) -> None:
        self.frame, self.counting, self.stamp_ns = 1, False, 0
        self.act: Callable[[], object] = lambda: None

    def __call__(self) -> Sighting:
        made = self.act()
        if made is not None:
            return made  # type: ignore[return-value]
        self.frame += self.counting
        frame = self.frame if self.frame > 1 else -1
        return Sighting(
            {"cube": np.array([0.5, 0, 0, 0, 0, 0, 1.0])}, self.stamp_ns or time.monotonic_ns(), frame=frame
        )
