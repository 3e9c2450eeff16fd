"""``lerobot:NAME?config=FILE.yaml``: any LeRobot robot, by its registered name, under joint positions."""

import contextlib
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from sacflow_robot.episode import StepResult
from sacflow_robot.errors import DataError, RobotError, StaleStateError, StoppedError, UsageError, one_line
from sacflow_robot.interfaces import Robot
from sacflow_robot.robot.drivers.clock import MonotonicClock
from sacflow_robot.robot.drivers.options import Options, check_options
from sacflow_robot.spec import ArraySpec, FloatArray, RobotSpec

JOINTS = "joint_pos"
"""Key of the joint positions."""

_STALE_S, _OLD_PERIODS = 0.5, 2
_FIRST_WITHIN_S = 5.0
_END_WITHIN_S = 3.0
_STOPPED = StoppedError("the robot has been stopped; look at it, then connect it again")
_UNREAD = "the robot has not been read yet; connect it again"
_HANGS = f"a call of lerobot has not returned for {_END_WITHIN_S:g} s; unplug the robot, or end this program"


def make_lerobot(name: str, options: Options) -> Robot:
    """``lerobot:NAME?config=FILE.yaml``, in an environment where lerobot is installed."""
    check_options("lerobot", options, ["config"])
    if "config" not in options:
        raise UsageError(
            f"robot lerobot:{name} needs a file with its port and its bounds: lerobot:{name}?config=FILE.yaml"
        )
    config = load_config(options["config"])
    return LeRobotDriver(find_lerobot(name, config.robot), config, name)


@dataclass(frozen=True)
class LeRobotConfig:
    """Settings that LeRobot's own configuration lacks.

    Attributes:
        joints: Per action feature of the robot, lowest and highest position, in LeRobot's unit. An action of -1 and 1
            stands for them; nothing beyond is commanded.
        robot: Fields of LeRobot's configuration class, e.g. ``port`` and ``id``.
        unit: LeRobot's unit with that configuration, e.g. ``deg``, or ``%`` of the calibrated range.
        task: Task, as policies are trained for it.
        control_rate_hz: Actions per second.
        horizon: Control periods after which an episode is cut.
    """

    joints: Mapping[str, tuple[float, float]]
    robot: Mapping[str, Any]
    unit: str = "% of range"
    task: str = "task"
    control_rate_hz: float = 30.0
    horizon: int = 600


def load_config(path: Path | str) -> LeRobotConfig:
    """Read a configuration, a YAML map of the attributes above.

    Raises:
        DataError: It cannot be read, or has no bounds that make sense.
    """
    try:
        data = dict(yaml.safe_load(Path(path).read_text()))
        joints = {str(name): (float(low), float(high)) for name, (low, high) in data.pop("joints").items()}
        config = LeRobotConfig(joints, dict(data.pop("robot", {})), **data)
        if not joints or not all(math.isfinite(a) and math.isfinite(b) and a < b for a, b in joints.values()):
            raise ValueError("each joint needs a lowest and a higher highest position")
        if not 0 < config.control_rate_hz <= 1000 or config.horizon < 1:
            raise ValueError("control_rate_hz must be above 0 and at most 1000, horizon at least 1")
        return config
    except KeyError as error:
        raise DataError(
            f"{path} lacks {error}: lowest and highest position of each joint, without which none is moved"
        ) from None
    except (OSError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise DataError(f"{path} is not a configuration of a LeRobot robot: {one_line(error)}") from None


def find_lerobot(name: str, settings: Mapping[str, Any]) -> Any:
    """The LeRobot robot registered under that name, not connected yet.

    Raises:
        UsageError: LeRobot is not installed, knows no such robot, or refuses the settings.
    """
    try:
        robots = import_module("lerobot.robots")
    except ImportError as error:
        raise UsageError(
            f"lerobot cannot be imported ({one_line(error)}); install it beside this package, in an environment without "
            "the extra 'train', whose torch it does not bear"
        ) from None
    with contextlib.suppress(ImportError, AttributeError):  # from lerobot 0.4.1 on: robots of installed plugins
        import_module("lerobot.utils.import_utils").register_third_party_plugins()
    with contextlib.suppress(ImportError):  # a robot registers itself when its module is imported
        import_module(f"lerobot.robots.{name}")
    known = robots.RobotConfig.get_known_choices()
    if name not in known:
        raise UsageError(f"lerobot knows no robot {name!r}; imported so far: {', '.join(sorted(known)) or 'none'}")
    try:
        make = (
            getattr(robots, "make_robot_from_config", None)
            or import_module("lerobot.robots.utils").make_robot_from_config
        )
        return make(known[name](**settings))
    except (TypeError, ValueError, ImportError) as error:
        raise UsageError(f"lerobot refuses the settings of {name}: {one_line(error)}") from None


class LeRobotDriver:
    """A LeRobot robot as a ``Robot``.

    Observation: ``joint_pos`` (N,) in LeRobot's unit, in the order of the action's features, and each camera under LeRobot's
    name (H, W, 3) uint8. Action (N,): positions, from -1 at the lowest to 1 at the highest.

    LeRobot's calls wait for a bus and bear one thread, so a thread of ours makes them all: it sends what is to be sent,
    reads, and starts again, at the control rate. To hold, the thread keeps sending the joint positions last read. A
    motor goes on to its last goal whatever becomes of who sent it, so when a call fails, a camera's included, the
    thread goes on, with a hold, and the next call says what failed.

    Raises:
        UsageError: Its features are not joint positions, or the bounds are of other joints.
    """

    lockstep = False

    def __init__(self, robot: Any, config: LeRobotConfig, name: str) -> None:
        self._robot = robot
        self._config = config
        self.clock = MonotonicClock()
        self._names = list(robot.action_features)
        self.spec = self._make_spec(name)
        self._low, self._high = np.array([config.joints[j] for j in self._names]).T
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._seen: tuple[dict[str, FloatArray], int] | None = None
        self._error = ""
        self._stopped = False
        self._goal: npt.NDArray[np.float64] | None = None
        self._valid_until_ns: int | None = None  # None: nothing was commanded yet, and nothing is sent
        self._began_ns = 0

    def connect(self) -> None:
        """Connect, without calibrating: that moves joints, and is for LeRobot's own command.

        Raises:
            RobotError: It cannot be reached, or is not calibrated.
            StoppedError: It was stopped meanwhile.
        """
        self._end_thread()
        if self._thread is not None:
            raise RobotError(f"the robot is lost: {_HANGS}")
        self._stopped = False  # a stop that comes from here on is not undone by connecting
        try:
            if not self._robot.is_connected:
                self._robot.connect(calibrate=False)
            calibrated = self._robot.is_calibrated
        except Exception as error:  # each robot has its own
            raise RobotError(f"the robot cannot be reached: {one_line(error)}") from None
        if not calibrated:
            raise RobotError("the robot is not calibrated; calibrate it with lerobot-calibrate")
        self._seen, self._error = None, ""
        self._goal = self._valid_until_ns = None
        self._closing.clear()
        self._thread = threading.Thread(target=self._live, name="lerobot", daemon=True)
        self._thread.start()
        self._await(time.monotonic_ns())
        if self._stopped:
            raise _STOPPED

    def begin(self, seed: int) -> StepResult:
        self._await(time.monotonic_ns())
        self._began_ns = time.monotonic_ns()
        return self.observe()

    def observe(self) -> StepResult:
        """The newest observation.

        Raises:
            StaleStateError: It is too old to act on.
            RobotError: The robot is lost.
        """
        self._check()
        if self._seen is None:
            raise RobotError(_UNREAD)
        observation, captured = self._seen
        now = time.monotonic_ns()
        if now - captured > _STALE_S * 1e9:
            raise StaleStateError(f"the robot was last read {(now - captured) / 1e9:.2f} s ago; is its bus stuck?")
        periods = (now - self._began_ns) * 1e-9 * self._config.control_rate_hz
        old = now - captured >= _OLD_PERIODS * self.spec.period_ns
        return StepResult(
            observation,
            truncated=periods >= self._config.horizon,
            measured=(2 * (observation[JOINTS] - self._low) / (self._high - self._low) - 1).astype(np.float32),
            success=False,
            time_ns=captured,
            stale_reason="the robot has not been read since" if old else "",
        )

    def command(self, action: FloatArray, valid_until_ns: int) -> None:
        """Hand one action (N,) over; dropped if it is out of date already."""
        action = self.spec.check_action(action)
        share = (action.astype(np.float64) + 1) / 2
        with self._lock:
            if self._stopped:
                raise _STOPPED
            self._check()
            if self._seen is None:
                raise RobotError(_UNREAD)  # and so it could not hold
            if time.monotonic_ns() >= valid_until_ns:
                return
            self._goal, self._valid_until_ns = self._low + share * (self._high - self._low), valid_until_ns

    def hold(self) -> None:
        """Have every joint, the gripper's too, stay where it is read next."""
        with self._lock:
            self._hold()

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            self._hold()

    def close(self) -> None:
        """Hold, and disconnect; whether the motors let go then is LeRobot's setting (disable_torque_on_disconnect)."""
        self.hold()
        self._end_thread()
        if self._thread is not None:
            return  # it hangs in a call that bears no other beside it
        self._seen = None
        with contextlib.suppress(Exception):  # a robot that is lost cannot be disconnected either
            if self._robot.is_connected:
                self._robot.disconnect()

    def _make_spec(self, name: str) -> RobotSpec:
        config, features = self._config, self._robot.observation_features
        if not self._names or any(feature is not float for feature in self._robot.action_features.values()):
            raise UsageError(f"lerobot:{name} takes other actions than numbers, one per joint")
        missing = [joint for joint in self._names if joint not in features]
        if missing:
            raise UsageError(
                f"lerobot:{name} does not tell the position of {', '.join(missing)}, and so could not hold"
            )
        if set(config.joints) != set(self._names):
            raise UsageError(f"bounds are given for {', '.join(config.joints)}; the robot has {', '.join(self._names)}")
        arrays = [ArraySpec(JOINTS, (len(self._names),), config.unit)]
        arrays += [
            ArraySpec(key, tuple(map(int, shape)), "pixel", dtype="uint8")
            for key, shape in features.items()
            if isinstance(shape, tuple)
        ]
        return RobotSpec(
            robot=name,
            task=config.task,
            controller="joint position",
            control_rate_hz=config.control_rate_hz,
            observations=tuple(arrays),
            action_names=tuple(self._names),
            action_units=tuple(
                f"{config.joints[j][0]:g} to {config.joints[j][1]:g} {config.unit}" for j in self._names
            ),
            action_low=(-1.0,) * len(self._names),
            action_high=(1.0,) * len(self._names),
        )

    def _hold(self) -> None:
        if self._valid_until_ns is not None:
            self._goal, self._valid_until_ns = None, 0

    def _live(self) -> None:
        """Send, read, at the control rate; the only caller of LeRobot's robot."""
        period_s, due = 1 / self._config.control_rate_hz, time.monotonic()
        while not self._closing.is_set():
            for call in (self._send, self._receive):
                try:
                    call()
                except BaseException as error:  # of a bus or a camera; the loop hears of it at its next call
                    self._error = self._error or one_line(error)
                    self.hold()
            due = max(due + period_s, time.monotonic())
            self._closing.wait(max(0.0, due - time.monotonic()))

    def _receive(self) -> None:
        begun_ns = time.monotonic_ns()  # nothing of what the call returns is older
        seen: Mapping[str, Any] = self._robot.get_observation()
        joints = np.array([float(seen[name]) for name in self._names], np.float32)
        images = {a.key: np.asarray(seen[a.key], a.dtype) for a in self.spec.observations if a.key != JOINTS}
        self._seen = {JOINTS: joints, **images}, begun_ns

    def _send(self) -> None:
        with self._lock:
            valid_until, goal = self._valid_until_ns, self._goal
            if valid_until is None:
                return
            expired = time.monotonic_ns() >= valid_until and valid_until != 0
            if (expired or goal is None) and self._seen is not None:
                # Where it is, once: what is read again later has sunk under its weight.
                goal = self._goal = self._seen[0][JOINTS].astype(np.float64)
                self._valid_until_ns = 0
        if goal is not None:
            self._robot.send_action(dict(zip(self._names, map(float, goal), strict=True)))

    def _await(self, since_ns: int) -> None:
        deadline = time.monotonic() + _FIRST_WITHIN_S
        while self._seen is None or self._seen[1] < since_ns:
            self._check()
            if time.monotonic() > deadline:
                raise StaleStateError(f"the robot was not read within {_FIRST_WITHIN_S:g} s; is its bus stuck?")
            time.sleep(0.002)

    def _check(self) -> None:
        if self._error:
            raise RobotError(f"the robot is lost: {self._error}; connect it again")
        if self._thread is None:
            raise RobotError("the robot is not connected; connect it first")
        if not self._thread.is_alive():
            raise RobotError("the thread that keeps the robot standing has ended; connect the robot again")

    def _end_thread(self) -> None:
        """End the thread, unless it hangs in one of LeRobot's calls; then it is still there."""
        if self._thread is not None:
            # One round more, so that the last hold is sent.
            time.sleep(1.5 / self._config.control_rate_hz)
            self._closing.set()
            self._thread.join(_END_WITHIN_S)
            if not self._thread.is_alive():
                self._thread = None
