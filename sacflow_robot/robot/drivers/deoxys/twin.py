"""The real-time computer's side of deoxys's wire, over a simulated Panda: a stand-in for the arm, at the arm's rates.

What it does as deoxys's ``franka_control_node`` and ``gripper_control_node`` do, after their source:

- states are published at ``STATE_PUBLISHER_RATE``, gripper states at ``GRIPPER.PUB_RATE``;
- the newest arm command is looked at once every ``1 / POLICY_RATE``, older ones are lost (both sides conflate);
- a delta goal is relative to the pose of that instant, any other is a pose of the end effector in base; LINEAR_POSE goes
  there within its share of the period;
- once a controller has started, 20 looks without a command stop the arm; so does ``termination``. Then, as after a restart
  by ``auto_arm.sh``, a controller starts again when no-control commands have been followed by one;
- the gripper finishes what it is doing before it looks at the newest command, and repeats no grasp that holds.

What is simulated: robosuite's Panda and its operational space controller, with the gains of the message. What only the twin
has: a socket on which an episode is reset and faults are made, and one that publishes object poses as a tracker would.
"""

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import zmq

from sacflow_robot.envs.panda_plant import PandaPlant
from sacflow_robot.errors import SacflowError, UsageError, WireError, one_line
from sacflow_robot.robot.drivers.deoxys import messages, objects
from sacflow_robot.robot.drivers.deoxys.config import DeoxysConfig
from sacflow_robot.robot.drivers.deoxys.gripper_twin import MAX_WIDTH_M, GripperTwin
from sacflow_robot.robot.drivers.deoxys.messages import Controller, Interpolator, RobotMode
from sacflow_robot.utils.rotations import Array, matrix_to_vector, vector_to_matrix

EMPTY_LOOKS = 20
"""Looks without a command after which the arm stops."""

_TICK_S = 0.01
_REST_GAINS = np.full(3, 150.0)
_LEAST_FRACTION = 0.1


class FrankaTwin:
    """A simulated arm behind deoxys's wire.

    Args:
        config: Sockets and rates; ``objects`` and ``reset`` are the twin's own.

    Attributes:
        refused: Commands that could not be read.
        overruns: Ticks of 10 ms that began more than 10 ms late.

    Raises:
        UsageError: An address is taken.
    """

    def __init__(self, config: DeoxysConfig) -> None:
        self.config, self.plant = config, PandaPlant(config.task)
        self.gripper = GripperTwin(self.plant)
        self.refused = self.overruns = self.commands = 0
        self._mode, self._errors = RobotMode.IDLE, dict[str, bool]()
        self._controller, self._seen_idle, self._empty = Controller.NO_CONTROL, True, 0
        self._frame = self._ticks = 0
        self._path = GoalPath(self.plant, config)
        self._stop = False
        self._sockets = ExitStack()
        try:
            self._open()
        except zmq.ZMQError as error:
            self.close()
            raise UsageError(f"the twin cannot listen there: {one_line(error)}; is another one running?") from None

    def _open(self) -> None:
        config, context = self.config, zmq.Context()
        self._sockets.callback(context.destroy, 0)
        self._states = context.socket(zmq.PUB)
        self._states.bind(f"tcp://{config.nuc_ip}:{config.state_port}")
        self._gripper_states = context.socket(zmq.PUB)
        self._gripper_states.bind(f"tcp://{config.nuc_ip}:{config.gripper_state_port}")
        self._commands = context.socket(zmq.SUB)
        self._gripper_commands = context.socket(zmq.SUB)
        for socket, port in (
            (self._commands, config.command_port),
            (self._gripper_commands, config.gripper_command_port),
        ):
            socket.setsockopt(zmq.CONFLATE, 1)
            socket.setsockopt(zmq.RECONNECT_IVL, 50)
            socket.subscribe(b"")
            socket.connect(f"tcp://{config.pc_ip}:{port}")
        self._objects = self._side = None
        if config.objects.startswith(("tcp://", "ipc://")):
            self._objects = context.socket(zmq.PUB)
            self._objects.bind(config.objects)
        if config.reset:
            self._side = context.socket(zmq.REP)
            self._side.bind(config.reset)

    def run(self) -> None:
        began, ticks = time.monotonic(), 0
        while not self._stop:
            self.tick()
            ticks += 1
            late = time.monotonic() - (began + ticks * _TICK_S)
            if late > _TICK_S:  # a machine that stood still; what was missed is not made up for at a run
                self.overruns += 1
                began += late
            elif late < 0:
                time.sleep(-late)

    def stop(self) -> None:
        """Ask :meth:`run` to return; may be called from a signal handler."""
        self._stop = True

    def close(self) -> None:
        self._sockets.close()
        self.plant.close()

    def tick(self) -> None:
        config = self.config
        if self._due(config.policy_rate_hz):
            self._look()
        with suppress(zmq.Again):
            try:
                self.gripper.take(self._gripper_commands.recv(zmq.NOBLOCK))
            except WireError as error:
                self.refused += 1
                print(f"gripper command refused: {one_line(error)}", flush=True)
        for _ in range(round(_TICK_S / self.plant.step_s)):
            self._path.step()
            self.gripper.step(self.plant.step_s)
            self.plant.step()
        self.plant.refresh()
        self._frame += 1
        if self._due(config.state_rate_hz):
            self._states.send(self.state().SerializeToString())
            if self._objects is not None:
                poses, solved = self.plant.object_poses(), self.plant.solved()
                self._objects.send(objects.publish_form(poses, solved=solved, frame=self._frame))
        if self._due(config.gripper_rate_hz):
            self._gripper_states.send(self.gripper_state().SerializeToString())
        self._answer()
        self._ticks += 1

    def state(self) -> Any:
        position, rotation = self.plant.ee_pose()
        pose = _column_major(position, rotation)
        q, dq, torque = self.plant.joints()
        state = messages.make(
            "FrankaRobotStateMessage",
            O_T_EE=pose,
            O_T_EE_d=_column_major(*self._path.goal),
            q=q,
            q_d=q,
            dq=dq,
            dq_d=dq,
            tau_J=torque,
            tau_J_d=torque,
            tau_ext_hat_filtered=[0.0] * 7,
            O_F_ext_hat_K=[0.0] * 6,
            control_command_success_rate=1.0 if self._mode is RobotMode.MOVE else 0.0,
            robot_mode=int(self._mode),
            frame=self._frame,
        )
        for name in self._errors:
            setattr(state.current_errors, name, True)
        self._stamp(state)
        return state

    def gripper_state(self) -> Any:
        state = messages.make(
            "FrankaGripperStateMessage",
            width=self.plant.finger_width(),
            max_width=MAX_WIDTH_M,
            is_grasped=self.gripper.grasped,
            temperature=30,
        )
        self._stamp(state)
        return state

    def _stamp(self, state: Any) -> None:
        state.time.toSec, state.time.toMSec = self._frame * _TICK_S, round(self._frame * _TICK_S * 1e3)

    def _due(self, rate_hz: float) -> bool:
        """True in the ticks in which something that happens at this rate happens."""
        step = rate_hz * _TICK_S
        return int((self._ticks + 1) * step + 1e-9) > int(self._ticks * step + 1e-9)

    def _look(self) -> None:
        """Look for an arm command, as the control node does once a period."""
        try:
            data = self._commands.recv(zmq.NOBLOCK)
        except zmq.Again:
            if self._controller is not Controller.NO_CONTROL:
                self._empty += 1
                if self._empty >= EMPTY_LOOKS:
                    self._release()
            return
        try:
            self._act(messages.parse("FrankaControlMessage", data))
        except (WireError, ValueError) as error:
            self.refused += 1
            print(f"arm command refused: {one_line(error)}", flush=True)

    def _act(self, command: Any) -> None:
        """Act on a command; raises WireError or ValueError."""
        self._empty = 0
        self.commands += 1
        if command.termination:
            self._release()
            return
        if command.controller_type == Controller.NO_CONTROL:
            if self._controller is not Controller.NO_CONTROL:
                self._release()
            self._seen_idle = True
            return
        if self._mode in (RobotMode.REFLEX, RobotMode.USER_STOPPED):
            return
        if command.controller_type != Controller.OSC_POSE:
            raise WireError(f"controller {command.controller_type}; the twin has OSC_POSE (1)")
        if not self._seen_idle:
            raise WireError("a controller without no-control commands before it; deoxys sends 20 of them")
        inner = messages.packed(command)
        if inner is None or inner.DESCRIPTOR.name != "FrankaOSCPoseControllerMessage":
            raise WireError("an OSC_POSE command without an OSC_POSE goal inside")
        gains = [np.array(list(k)) for k in (inner.translational_stiffness, inner.rotational_stiffness)]
        goal = np.array([getattr(inner.goal, name) for name in ("x", "y", "z", "ax", "ay", "az")])
        numbers = np.concatenate([*gains, goal])
        if [len(k) for k in gains] != [3, 3] or not np.isfinite(numbers).all() or min(map(min, gains)) < 0:
            raise ValueError("gains must have lengths 3 and 3 and not be negative, and all numbers must be finite")
        self.plant.set_stiffness(*gains)
        self._path.aim(goal, command, is_delta=inner.goal.is_delta)
        self._controller, self._mode = Controller.OSC_POSE, RobotMode.MOVE

    def _release(self) -> None:
        """Stop the arm where it is; its own brakes and motors hold it."""
        self._controller, self._seen_idle, self._empty = Controller.NO_CONTROL, False, 0
        if self._mode is RobotMode.MOVE:
            self._mode = RobotMode.IDLE
        self.plant.set_stiffness(_REST_GAINS, _REST_GAINS)
        self._path.end()
        self.plant.set_goal(*self._path.goal)

    def _answer(self) -> None:
        """Answer what is asked on the twin's own socket."""
        if self._side is None:
            return
        with suppress(zmq.Again):
            data = self._side.recv(zmq.NOBLOCK)
            try:
                reply = self._do(json.loads(data))
            except (SacflowError, ValueError, TypeError, AttributeError, RecursionError) as error:
                reply = {"error": one_line(error)}
            self._side.send(json.dumps(reply).encode())

    def _do(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        if "reset" in asked:
            self.plant.begin(int(asked["reset"]))
            # What the controller was pulling to belongs to the episode before.
            engaged = self._controller is not Controller.NO_CONTROL
            self._path.end()
            self._mode, self._errors, self._empty = RobotMode.MOVE if engaged else RobotMode.IDLE, {}, 0
            for socket in (self._commands, self._gripper_commands):
                with suppress(zmq.Again):
                    socket.recv(zmq.NOBLOCK)
            self.gripper.reset()
        elif "fault" in asked:
            name = str(asked["fault"])
            if name not in messages.ERRORS:
                raise UsageError(f"libfranka knows no error {name!r}")
            self._release()
            self._mode, self._errors = RobotMode.REFLEX, {name: True}
        elif asked.get("user_stop"):
            self._release()
            self._mode = RobotMode.USER_STOPPED
        elif asked.get("recover"):
            self._mode, self._errors = RobotMode.IDLE, {}
        else:
            raise UsageError("expected reset, fault, user_stop or recover")
        return {"frame": self._frame + 1, "overruns": self.overruns, "commands": self.commands}


def _column_major(position: Array, rotation: Array) -> list[float]:
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, position
    return list(pose.T.reshape(-1))


class GoalPath:
    """The way to a goal, as deoxys interpolates it.

    Attributes:
        goal: Position (3,) and rotation (3, 3) of the end effector in base.
    """

    def __init__(self, plant: PandaPlant, config: DeoxysConfig) -> None:
        self._plant = plant
        self._period_s = 1 / config.policy_rate_hz
        self.end()

    def end(self) -> None:
        """Go nowhere from where the end effector is."""
        self._start: tuple[Array, Array] | None = None
        self.goal: tuple[Array, Array] = self._plant.ee_pose()

    def aim(self, goal: Array, command: Any, *, is_delta: bool) -> None:
        """Go to a goal from where the end effector is now, or to a pose in base, which deoxys takes since August 2023."""
        position, rotation = self._plant.ee_pose()
        turned = vector_to_matrix(goal[3:])
        self._start = position, rotation
        self.goal = (position + goal[:3], turned @ rotation) if is_delta else (goal[:3], turned)
        smooth = command.traj_interpolator_type == Interpolator.LINEAR_POSE
        fraction = max(_LEAST_FRACTION, command.traj_interpolator_time_fraction)
        self._reach_s = fraction * self._period_s if smooth else 0.0
        self._since_s = 0.0

    def step(self) -> None:
        """Pull to where the end effector is to be now, at the beginning of a step of the physics."""
        if self._start is None:
            return
        share = min(1.0, self._since_s / self._reach_s) if self._reach_s else 1.0
        (p0, r0), (p1, r1) = self._start, self.goal
        turn = vector_to_matrix(share * matrix_to_vector(r1 @ r0.T))
        self._plant.set_goal(p0 + share * (p1 - p0), turn @ r0)
        self._since_s += self._plant.step_s
        if share >= 1.0:
            self._start = None
