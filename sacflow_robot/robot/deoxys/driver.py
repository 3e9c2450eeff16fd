"""``deoxys:FILE.yml``: a Franka Panda under deoxys's OSC_POSE delta control, as a ``Robot``."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import zmq

from sacflow_robot.errors import ArmFaultError, RobotError, SilentArmError, StoppedError, UsageError, one_line
from sacflow_robot.robot.clock import MonotonicClock
from sacflow_robot.robot.deoxys import wire
from sacflow_robot.robot.deoxys.config import DeoxysConfig, load_config, split_part
from sacflow_robot.robot.deoxys.messages import RobotMode
from sacflow_robot.robot.deoxys.objects import ObjectSource, Sighting, load_source
from sacflow_robot.robot.deoxys.poses import Array, quaternion_from_matrix, vector_from_matrix
from sacflow_robot.robot.deoxys.wire import ArmState, DeoxysWire, GripperState
from sacflow_robot.robot.drivers import Options, check_options
from sacflow_robot.spec import ArmSpec, FloatArray, Robot, StepResult

_IDLE_COMMANDS, _IDLE_EVERY_S = 20, 0.05
"""deoxys's client sends so many no-control messages before it changes the controller."""

_REACH_WITHIN_S = 5.0
_START_WITHIN_S = 1.0  # an arm that does not move by then after its first command has stopped by itself
_STANDSTILL = np.zeros(6)
_SWITCHES = "joints", "arm_stamps"


def make_deoxys(subject: str, options: Options) -> Robot:
    """``deoxys:FILE.yml``. Options: ``task``, ``nuc_ip``, ``pc_ip``, ``joints``, ``arm_stamps``, in place of the file's."""
    check_options("deoxys", options, ["task", "nuc_ip", "pc_ip", *_SWITCHES])
    config = load_config(subject)
    for name in _SWITCHES:
        if options.get(name, "0") not in ("0", "1"):
            raise UsageError(f"deoxys: {name} is {options[name]!r}, expected 0 or 1")
    return DeoxysRobot(
        replace(
            config,
            task=options.get("task", config.task),
            nuc_ip=options.get("nuc_ip", config.nuc_ip),
            pc_ip=options.get("pc_ip", config.pc_ip),
            joints=options["joints"] == "1" if "joints" in options else config.joints,
            arm_stamps=options["arm_stamps"] == "1" if "arm_stamps" in options else config.arm_stamps,
        )
    )


class DeoxysRobot:
    """A Panda behind a real-time computer that runs deoxys.

    Observations, float32: ``robot0_eef_pos`` (3,) m and ``robot0_eef_quat`` (4,) x y z w of the gripper in the policy's
    world, ``robot0_gripper_qpos`` (2,) m, plus and minus half the distance between the fingers, and ``object`` as the
    configuration says. An observation is as old as the oldest of arm state and object poses; a gripper state, which comes
    less often and changes slowly, does not count. Neither computer's clock is compared with the other's: a state counts as
    captured when it arrives here, a network's transit later than it was. With ``arm_stamps`` it carries the arm's own time
    instead, and a profile has to say how far that is from here (``calibrate latency`` measures it).

    Action (7,): translation and rotation vector from where the arm is, base axes, and the gripper, which closes above 0.

    A thread takes in states, and sends a standstill (a delta of nothing) as soon as a command's validity is past and then
    once a period, without which the arm's side would give up after a second. deoxys knows no absolute goal for positions,
    so under load a long standstill may creep by the controller's steady-state error.

    Args:
        config: Sockets, rates and frames.
        source: Where object poses come from, if not from what the configuration names.
    """

    lockstep = False

    def __init__(self, config: DeoxysConfig, source: ObjectSource | None = None) -> None:
        self.config, self._arm = config, config.arm
        self.clock = MonotonicClock()
        if source is None and config.objects and not config.objects.startswith(("tcp://", "ipc://")):
            source = load_source(config.objects)
        self._source = source
        self._wire: DeoxysWire | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._stopped, self._fault = False, ""
        self._engaged_ns: int | None = None
        self._valid_until_ns = self._sent_ns = self._began_ns = 0
        self._quaternion: Array | None = None
        self._before: tuple[ArmState, float] | None = None
        self._gripper_limits: tuple[float | None, tuple[float, float] | None] = None, None

    def limit_gripper(self, force_n: float | None, width_m: tuple[float, float] | None) -> None:
        """Grasp with at most that force (N), and go to widths (m) between those alone; None for no limit.

        The action says no more of the gripper than to close or open it, so that no filter of actions could see to it.
        """
        self._gripper_limits = force_n, width_m

    @property
    def spec(self) -> ArmSpec:
        return self._arm

    def connect(self) -> None:
        """Reach the real-time computer, and have it ready for OSC_POSE; nothing moves, the gripper included.

        Raises:
            SilentArmError: It, its gripper or the source of object poses is not heard.
            ArmFaultError: The arm is in an error, a reflex or a user stop.
            UsageError: The sockets cannot be opened.
        """
        if self._wire is None:
            self._wire = DeoxysWire(self.config)
            self._closing.clear()
            self._thread = threading.Thread(target=self._live, name="deoxys", daemon=True)
            self._thread.start()
        with self._lock:
            self._engaged_ns = None  # from here on the thread sends nothing
        self._await(time.monotonic_ns(), _REACH_WITHIN_S)
        for _ in range(_IDLE_COMMANDS):
            self._wire.send(wire.idle_command())
            time.sleep(_IDLE_EVERY_S)
        arm, _, _ = self._parts()
        fault = _fault_of(arm)
        if fault:
            raise ArmFaultError(f"the arm is not ready: {fault}")
        with self._lock:
            self._stopped, self._fault = False, ""

    def begin(self, seed: int) -> StepResult:
        """Start an episode where the arm stands; the twin of an arm is put where the seed says.

        Raises:
            SilentArmError: No state arrives.
            RobotError: The twin does not answer.
        """
        self._check()
        frame = -1
        if self.config.reset:
            frame = self._reset_twin(seed)
        self._await(time.monotonic_ns(), _REACH_WITHIN_S, frame)
        self._quaternion, self._before, self._began_ns = None, None, time.monotonic_ns()
        return self.observe()

    def observe(self) -> StepResult:
        """The newest observation.

        Raises:
            SilentArmError: It is too old to act on.
            ArmFaultError: The arm has stopped by itself.
        """
        self._check()
        arm, gripper, sighting = self._parts()
        ages = {"arm state": arm.received_ns, "gripper state": gripper.received_ns}
        if sighting is not None:
            ages["object pose"] = sighting.time_ns
        now, oldest = time.monotonic_ns(), min(at for what, at in ages.items() if what != "gripper state")
        for what, at in ages.items():
            if now - at > self.config.stale_s * 1e9:
                raise SilentArmError(
                    f"the newest {what} is {(now - at) / 1e9:.2f} s old, allowed is {self.config.stale_s:g} s; is deoxys "
                    f"running on {self.config.nuc_ip}, and the network up?"
                )
        periods = (now - self._began_ns) * 1e-9 * self.config.policy_rate_hz
        solved = sighting is not None and bool(sighting.solved)
        return StepResult(
            self._observation(arm, gripper, sighting),
            reward=float(solved),
            terminated=solved,
            truncated=not solved and periods >= self.config.horizon,
            measured=self._measured(arm),
            success=solved,
            time_ns=oldest + (arm.stamp_ns - arm.received_ns if self.config.arm_stamps else 0),
        )

    def command(self, action: FloatArray, valid_until_ns: int) -> None:
        """Send one action (7,); dropped if it is out of date already.

        Raises:
            InvalidValueError: It has the wrong shape or holds NaN or infinity.
            StoppedError: The arm has been stopped.
            ArmFaultError: The arm has stopped by itself.
        """
        action = self.spec.check_action(action)
        self._check()
        arm, _, _ = self._parts()
        delta = action[:6].astype(np.float64) * self._scale
        now = time.monotonic_ns()
        if now >= valid_until_ns:
            return
        with self._lock:
            if self._stopped:
                raise _STOPPED
            self._valid_until_ns, self._sent_ns = valid_until_ns, now
            self._engaged_ns = now if self._engaged_ns is None else self._engaged_ns
            self._send(delta, float(action[6]))
        self._before = arm, float(action[6])

    def hold(self) -> None:
        with self._lock:
            self._valid_until_ns = 0
            if self._engaged_ns is not None and not self._stopped:
                self._send(_STANDSTILL)

    def stop(self) -> None:
        """Have the arm's side end its control at once, where the arm is."""
        with self._lock:
            self._stopped, self._valid_until_ns = True, 0
            if self._wire is not None:
                self._wire.send(wire.idle_command(termination=True))
            self._engaged_ns = None

    def close(self) -> None:
        """Have the arm's side end its control, if this arm was commanded, and close the sockets."""
        if self._wire is None:
            return
        if self._engaged_ns is not None:
            self.hold()
            self.stop()
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        self._wire.close()
        self._wire = self._thread = None

    @property
    def _scale(self) -> Array:
        return np.repeat([self.config.metres_per_action, self.config.radians_per_action], 3)

    def _send(self, delta: Array, closing: float = 0.0) -> None:
        assert self._wire is not None
        gripper = wire.gripper_command(closing, *self._gripper_limits) if closing else None
        self._wire.send(wire.pose_command(self.config, delta), gripper)

    def _live(self) -> None:
        """Take in states; keep the arm standing still where no valid command is at hand."""
        assert self._wire is not None
        period_ns = round(1e9 / self.config.policy_rate_hz)
        while not self._closing.is_set():
            self._wire.receive(0.005)
            if self._source is not None:
                self._wire.sighting = self._source()
            with self._lock:
                if self._engaged_ns is None or self._stopped:
                    continue
                now = time.monotonic_ns()
                self._fault = self._fault or self._new_fault(now)
                if (
                    self._fault
                ):  # what ends a fault is a person; until then nothing is sent, lest the arm go on by itself
                    self._engaged_ns = None
                    continue
                ran_out = self._sent_ns < self._valid_until_ns <= now
                if ran_out or (now >= self._valid_until_ns and now - self._sent_ns >= period_ns):
                    self._sent_ns = now
                    self._send(_STANDSTILL)

    def _new_fault(self, now: int) -> str:
        assert self._wire is not None and self._engaged_ns is not None
        arm = self._wire.arm
        if arm is None or arm.received_ns < self._engaged_ns:
            return ""
        fault = _fault_of(arm)
        if not fault and arm.mode != RobotMode.MOVE and now - self._engaged_ns > _START_WITHIN_S * 1e9:
            return "its control has ended, as it does after 20 periods without a command; connect it again"
        return fault

    def _check(self) -> None:
        if self._wire is None:
            raise RobotError("the arm is not connected; connect it first")
        if self._stopped:
            raise _STOPPED
        if self._fault:
            raise ArmFaultError(f"the arm has stopped: {self._fault}")

    def _parts(self) -> tuple[ArmState, GripperState, Sighting | None]:
        assert self._wire is not None
        arm, gripper, sighting = self._wire.arm, self._wire.gripper, self._wire.sighting
        if arm is None or gripper is None or (sighting is None and self.config.object):
            raise SilentArmError("the arm has not been heard; connect it first")
        return arm, gripper, sighting

    def _await(self, since_ns: int, within_s: float, frame: int = -1) -> None:
        """Wait until everything has been heard that was captured later, and of no earlier frame."""
        assert self._wire is not None
        deadline = time.monotonic() + within_s
        found = self._wire
        heard: dict[str, Callable[[], bool]] = {
            f"arm state from tcp://{self.config.nuc_ip}:{self.config.state_port}": lambda: (
                found.arm is not None and found.arm.received_ns >= since_ns and found.arm.frame >= frame
            ),
            f"gripper state from tcp://{self.config.nuc_ip}:{self.config.gripper_state_port}": lambda: (
                found.gripper is not None and found.gripper.received_ns >= since_ns
            ),
            f"object pose from {self.config.objects or 'anywhere (SACFLOW.OBJECTS is not given)'}": lambda: (
                not self.config.object
                or (found.sighting is not None and found.sighting.time_ns >= since_ns and found.sighting.frame >= frame)
            ),
        }
        while not all(true() for true in heard.values()):
            if time.monotonic() > deadline:
                missing = [what for what, true in heard.items() if not true()]
                refused = (
                    f" ({self._wire.malformed} messages refused: {self._wire.complaint})"
                    if self._wire.malformed
                    else ""
                )
                raise SilentArmError(f"no {' and no '.join(missing)} within {within_s:g} s{refused}; is it running?")
            time.sleep(0.002)

    def _observation(self, arm: ArmState, gripper: GripperState, sighting: Sighting | None) -> dict[str, FloatArray]:
        world = np.array(self.config.base_pos_in_world)
        eef = arm.position + arm.rotation @ np.array(self.config.eef_pos_in_ee) + world
        quaternion = quaternion_from_matrix(arm.rotation)
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

    def _measured(self, arm: ArmState) -> FloatArray | None:
        """What the arm did since the last command, as an action would command it."""
        if self._before is None:
            return None
        before, closing = self._before
        turned = vector_from_matrix(arm.rotation @ before.rotation.T)
        moved = np.concatenate([arm.position - before.position, turned]) / self._scale
        return np.append(moved, closing).astype(np.float32)

    def _reset_twin(self, seed: int) -> int:
        """Have the twin start an episode; the number of the first frame that belongs to it."""
        self.hold()
        with zmq.Context() as context, context.socket(zmq.REQ) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(self.config.reset)
            socket.send(json.dumps({"reset": seed}).encode())
            if not socket.poll(round(_REACH_WITHIN_S * 1e3)):
                raise RobotError(f"the twin does not answer at {self.config.reset}; SACFLOW.RESET is for a twin alone")
            try:
                reply: Mapping[str, object] = json.loads(socket.recv())
                return int(str(reply["frame"]))
            except (ValueError, KeyError, TypeError) as error:
                raise RobotError(f"the twin was not reset: {one_line(error)}") from None


_STOPPED = StoppedError("the arm has been stopped; look at it, then connect it again")


def _fault_of(arm: ArmState) -> str:
    """What keeps the arm from taking commands; empty if nothing does."""
    why = wire.STOPPED_MODES.get(RobotMode(arm.mode) if arm.mode in list(RobotMode) else RobotMode.OTHER, "")
    if arm.errors:
        return f"{', '.join(arm.errors)}{f' ({why})' if why else ''}"
    return why
