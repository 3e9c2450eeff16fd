"""``deoxys:FILE.yml``: a Franka Panda under deoxys's OSC_POSE delta control, as a ``Robot``."""

import threading
import time
from dataclasses import replace

import numpy as np

from sacflow_robot.episode import StepResult
from sacflow_robot.errors import RobotError, RobotFaultError, StoppedError, one_line
from sacflow_robot.interfaces import Robot
from sacflow_robot.robot.drivers.clock import MonotonicClock
from sacflow_robot.robot.drivers.deoxys import wire
from sacflow_robot.robot.drivers.deoxys.config import DeoxysConfig, load_config, with_options
from sacflow_robot.robot.drivers.deoxys.listener import Listener, News
from sacflow_robot.robot.drivers.deoxys.messages import RobotMode
from sacflow_robot.robot.drivers.deoxys.objects import ObjectSource, Sighting, load_source
from sacflow_robot.robot.drivers.deoxys.states import ObservationBuilder, fault_of
from sacflow_robot.robot.drivers.deoxys.wire import Gripper, Standstill
from sacflow_robot.robot.drivers.options import Options
from sacflow_robot.spec import FloatArray
from sacflow_robot.utils.rotations import Array

_IDLE_COMMANDS, _IDLE_EVERY_S = 20, 0.05
"""deoxys's client sends so many no-control messages before it changes the controller."""

_REACH_WITHIN_S = 5.0
_START_WITHIN_S = 1.0  # an arm that does not move by then after its first command has stopped by itself


def make_deoxys(subject: str, options: Options) -> Robot:
    """``deoxys:FILE.yml``. Options: ``task``, ``nuc_ip``, ``pc_ip``, ``joints``, ``arm_stamps``, in place of the file's."""
    return DeoxysRobot(with_options(load_config(subject), options))


class DeoxysRobot:
    """A Panda behind a real-time computer that runs deoxys.

    Observations, float32: ``robot0_eef_pos`` (3,) m and ``robot0_eef_quat`` (4,) x y z w of the gripper in the policy's
    world, ``robot0_gripper_qpos`` (2,) m, plus and minus half the distance between the fingers, and ``object`` as the
    configuration says. An observation is as old as the oldest of arm state and object poses; a gripper state, which comes
    less often and changes slowly, does not count. Neither computer's clock is compared with the other's: a state counts as
    captured when it arrives here, a network's transit later than it was, and one that repeats what came before counts as
    captured when that came. With ``arm_stamps`` it carries the arm's own time instead, and a profile has to say how far that
    is from here (``calibrate latency`` measures it).

    Action (7,): translation and rotation vector from where the arm is, base axes, and the gripper, which closes above 0.

    A thread takes in states, and sends a standstill (see :class:`Standstill`) as soon as a command's validity is past and then
    once a period, without which the arm's side would give up after a second. It runs no code but this package's: a source of
    object poses is called on another thread, and what goes wrong on either is raised by the next :meth:`observe`.

    A gripper finishes by itself what it was told; only :meth:`stop` ends it.

    Args:
        source: Where object poses come from, if not from what the configuration names.
    """

    lockstep = False

    def __init__(self, config: DeoxysConfig, source: ObjectSource | None = None) -> None:
        self.config = config
        self.spec = config.arm
        self.clock = MonotonicClock()
        if source is None and config.objects and not config.objects.startswith(("tcp://", "ipc://")):
            source = load_source(config.objects)
        self._source = source
        self._wire: Listener | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._standstill = Standstill(config)
        self._connected = False
        self._stopped = False
        self._fault = ""  # ends the arm's control
        self._trouble = ""  # raised once
        self._engaged_ns: int | None = None  # since when a controller runs on our behalf
        self._valid_until_ns = 0
        self._sent_ns = 0
        self._began_ns = 0
        self._observation = ObservationBuilder(config)
        self._gripper = Gripper()

    def limit_gripper(self, force_n: float | None, width_m: tuple[float, float] | None) -> None:
        """Grasp with at most that force (N), and go to widths (m) between those alone; None for no limit.

        The action says no more of the gripper than to close or open it, so that no filter of actions could see to it.
        """
        self._gripper.force_n = force_n
        self._gripper.width_m = width_m

    def connect(self) -> None:
        """Reach the real-time computer, and have it ready for OSC_POSE; nothing moves, the gripper included.

        Raises:
            RobotError: Something is not heard, the arm is not ready, or it was stopped meanwhile.
            UsageError: The sockets cannot be opened.
        """
        if self._ended():
            self._let_go()
        self._connected = False
        self._stopped = False  # a stop that comes from here on is not undone by connecting
        if self._wire is None:
            self._open()
        assert self._wire is not None
        with self._lock:
            self._engaged_ns = None  # from here on the thread sends nothing
        self._trouble = ""
        self._await()
        for _ in range(_IDLE_COMMANDS):
            self._wire.send(wire.idle_command())
            time.sleep(_IDLE_EVERY_S)
        fault = fault_of(self._await().arm)  # after a stop, deoxys's program is restarted meanwhile
        if fault:
            raise RobotFaultError(f"the arm is not ready: {fault}")
        with self._lock:
            if self._stopped:
                raise _STOPPED
            self._wire.restarted.clear()
            self._standstill.reset()
            self._connected = True
            self._fault = ""
            self._trouble = ""

    def _open(self) -> None:
        # Poses come from one place: a source that is called takes the place of one that publishes.
        config = self.config if self._source is None else replace(self.config, objects="")
        self._wire = Listener(config, None if self._source is None else self._call_source, self._complain)
        self._closing.clear()
        self._thread = threading.Thread(target=self._live, name="deoxys", daemon=True)
        self._thread.start()

    def begin(self, seed: int) -> StepResult:
        """Start an episode where the arm stands; the twin of an arm is put where the seed says."""
        self._check()
        frame, self._trouble = -1, ""  # what went wrong between episodes is over, or goes wrong again
        if self.config.reset:
            frame = self._reset_twin(seed)
        self._await(frame)
        self._observation.begin()
        self._began_ns = time.monotonic_ns()
        return self.observe()

    def observe(self) -> StepResult:
        """The newest observation.

        Raises:
            StaleStateError: It is too old to act on.
            RobotFaultError: The arm has stopped by itself.
            RobotError: Something failed since the last call, such as the object source; told once.
        """
        self._check()
        trouble, self._trouble = self._trouble, ""
        if trouble:
            raise RobotError(trouble)
        assert self._wire is not None
        news, now = self._wire.news(self._engaged_ns), time.monotonic_ns()
        stale_reason = self._wire.check_ages(news, now)
        arm, oldest = news.arm, min(news.captured_ns.values())
        periods = (now - self._began_ns) * 1e-9 * self.config.policy_rate_hz
        solved = news.sighting is not None and bool(news.sighting.solved)
        return StepResult(
            self._observation(arm, news.gripper, news.sighting),
            reward=float(solved),
            terminated=solved,
            truncated=not solved and periods >= self.config.horizon,
            measured=self._observation.measured(arm),
            success=solved,
            time_ns=oldest + (arm.stamp_ns - arm.read_ns if self.config.arm_stamps else 0),
            stale_reason=stale_reason,
        )

    def command(self, action: FloatArray, valid_until_ns: int) -> None:
        """Send one action (7,); dropped if it is out of date already."""
        action = self.spec.check_action(action)
        with self._lock:
            self._check()
            assert self._wire is not None
            arm = self._wire.news(self._engaged_ns).arm
            now = time.monotonic_ns()
            if now >= valid_until_ns:
                return
            self._valid_until_ns, self._sent_ns = valid_until_ns, now
            self._engaged_ns = now if self._engaged_ns is None else self._engaged_ns
            self._send(action[:6].astype(np.float64) * self.config.action_scale, float(action[6]))
        self._observation.commanded(arm, float(action[6]))

    def hold(self) -> None:
        """Stand still from now on, if the arm was commanded."""
        with self._lock:
            self._valid_until_ns = 0
            if self._engaged_ns is not None and not self._stopped:
                self._stand(time.monotonic_ns())

    def stop(self) -> None:
        """Have the arm's side end its control at once, where the arm is, and what its gripper does."""
        with self._lock:
            self._stopped, self._valid_until_ns = True, 0
            seen = None if self._wire is None else self._wire.gripper
            gripper = self._gripper.stop(seen, time.monotonic_ns())
            if self._wire is not None:
                self._wire.send(wire.idle_command(termination=True), gripper)
            self._engaged_ns = None

    def close(self) -> None:
        """Have the arm's side end its control, if this arm was commanded, and close the sockets."""
        if self._wire is not None and self._engaged_ns is not None:
            self.hold()
            self.stop()
        self._let_go()

    def _let_go(self) -> None:
        self._closing.set()
        self._connected = False
        if self._thread is not None:
            self._thread.join()
        with self._lock:  # a stop from another thread finds either
            found, self._wire = self._wire, None
        if found is not None:
            found.close()
        self._thread = None

    def _send(self, delta: Array, closing: float = 0.0) -> None:
        assert self._wire is not None
        now = time.monotonic_ns()
        gripper = self._gripper.command(closing, now)
        if delta.any():
            self._standstill.end()
            self._wire.send(wire.pose_command(self.config, delta), gripper)
        else:
            self._stand(now, gripper)

    def _stand(self, now: int, gripper: bytes | None = None) -> None:
        assert self._wire is not None
        self._sent_ns, arm = now, None
        if self.config.absolute_hold:
            arm = self._wire.fresh_arm(now, self._engaged_ns)
        self._wire.send(self._standstill.command(arm, now), gripper)

    def _live(self) -> None:
        """Take in states; keep the arm standing still where no valid command is at hand.

        Nothing ends this but :meth:`close`: what keeps an arm standing has to outlive whatever goes wrong.
        """
        assert self._wire is not None
        while not self._closing.is_set():
            for part in (self._wire.receive, self._keep_standing):
                try:
                    part()
                except BaseException as error:
                    self._complain(f"the driver's thread failed: {type(error).__name__}: {one_line(error)}")
                    self._closing.wait(0.005)

    def _complain(self, what: str) -> None:
        """Have the next :meth:`observe` raise this; of several things the first, which may have led to the others."""
        self._trouble = self._trouble or what

    def _keep_standing(self) -> None:
        assert self._wire is not None
        while self._wire.restarted:
            what, said = self._wire.restarted.popitem()
            if what == "object pose":
                self._complain(said)
            elif self._connected and not self._stopped:
                self._fault = self._fault or f"{said}, so deoxys was restarted; connect it again"
        with self._lock:
            if self._engaged_ns is None or self._stopped:
                return
            now = time.monotonic_ns()
            self._fault = self._fault or self._new_fault(now)
            if self._fault:  # until a person ends the fault nothing is sent: the arm must not go on by itself
                self._engaged_ns = None
                return
            left = self._standstill.left(self._wire.arm) if self._wire.arm is not None else ""
            if left:
                self._complain(left)
            ran_out = self._sent_ns < self._valid_until_ns <= now
            if left or ran_out or (now >= self._valid_until_ns and now - self._sent_ns >= self.spec.period_ns):
                self._stand(now)

    def _new_fault(self, now: int) -> str:
        assert self._wire is not None and self._engaged_ns is not None
        arm = self._wire.arm
        if arm is None or arm.received_ns < self._engaged_ns:
            return ""
        fault = fault_of(arm)
        if not fault and arm.mode != RobotMode.MOVE and now - self._engaged_ns > _START_WITHIN_S * 1e9:
            return "its control has ended, as it does after 20 periods without a command; connect it again"
        return fault

    def _check(self) -> None:
        if self._stopped:
            raise _STOPPED
        if self._fault:
            raise RobotFaultError(f"the arm has stopped: {self._fault}")
        if self._wire is None:
            raise RobotError("the arm is not connected; connect it first")
        if not self._connected:
            raise RobotError("the arm is not connected, for the last attempt failed; connect it first")
        ended = self._ended()
        if ended:
            raise RobotError(f"the thread that {ended} has ended; connect the robot again")

    def _ended(self) -> str:
        """The task of a thread that has ended; empty if all run."""
        if self._thread is not None and not self._thread.is_alive():
            return "keeps the arm standing"
        return "asks where objects are" if self._wire is not None and not self._wire.alive else ""

    def _call_source(self) -> Sighting:
        assert self._source is not None
        return self._source()

    def _await(self, frame: int = -1) -> News:
        assert self._wire is not None
        return self._wire.wait(_REACH_WITHIN_S, self._engaged_ns, frame, lambda: self._trouble)

    def _reset_twin(self, seed: int) -> int:
        """Have the twin start an episode; the number of the first frame that belongs to it."""
        with self._lock:
            self._standstill.pause(True)
        self.hold()
        try:
            return wire.reset_twin(self.config.reset, seed, _REACH_WITHIN_S)
        finally:
            with self._lock:
                self._standstill.pause(False)


_STOPPED = StoppedError("the arm has been stopped; look at it, then connect it again")
