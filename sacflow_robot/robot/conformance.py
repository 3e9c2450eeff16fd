"""For tests of drivers and of what uses them: a made-up robot, and the conformance kit that every driver can run."""

from collections.abc import Callable
from functools import partial

import numpy as np

from sacflow_robot.episode import StepResult
from sacflow_robot.errors import InvalidValueError, RobotError, StoppedError, one_line
from sacflow_robot.interfaces import Clock, Robot
from sacflow_robot.robot.drivers.clock import MonotonicClock
from sacflow_robot.spec import FloatArray, RobotSpec

_LOSS_SEEN_S = 5.0


class FakeRobot:
    """A robot in lockstep that does nothing but keep what it is sent; override ``react`` to make it do something.

    Args:
        clock: Its clock; the machine's if None.

    Attributes:
        calls: Names of the methods called, in order.
    """

    lockstep = True

    def __init__(self, spec: RobotSpec, clock: Clock | None = None) -> None:
        self.spec, self.clock = spec, MonotonicClock() if clock is None else clock
        self.commands: list[FloatArray] = []
        self.calls: list[str] = []
        self.stopped = self.closed = False
        self.result = self.start(0)

    def start(self, seed: int) -> StepResult:
        """The start of an episode: zeros."""
        return StepResult({a.key: np.zeros(a.shape, a.dtype) for a in self.spec.observations})

    def react(self, action: FloatArray) -> StepResult:
        """The result of an action; ``commands`` holds it already."""
        return self.start(0)

    def connect(self) -> None:
        self.calls.append("connect")
        self.stopped = False

    def begin(self, seed: int) -> StepResult:
        self.calls.append("begin")
        self.result = self.start(seed)
        return self.result

    def observe(self) -> StepResult:
        return self.result

    def command(self, action: FloatArray, valid_until_ns: int) -> None:
        if self.stopped:
            raise StoppedError("the robot has been stopped; connect it again")
        self.calls.append("command")
        self.commands.append(action)
        self.result = self.react(action)

    def hold(self) -> None:
        self.calls.append("hold")

    def stop(self) -> None:
        self.calls.append("stop")
        self.stopped = True

    def close(self) -> None:
        self.calls.append("close")
        self.closed = True


def check_robot(
    make: Callable[[], Robot], *, seed: int = 0, steps: int = 5, lose: Callable[[Robot], None] | None = None
) -> None:
    """The conformance kit: a driver that keeps the :class:`~sacflow_robot.interfaces.Robot` contract comes through without an
    AssertionError that says what it did otherwise.

    It commands no motion (an action of zeros, clipped into the robot's bounds; on a position-controlled robot, nothing but holds),
    yet run it on a robot that may move.

    Args:
        make: Makes a robot that is not connected yet; called several times, never two robots at once.
        lose: Takes the robot away from a robot in the middle of an episode: unplugs it, kills its process, ends its thread. With
            it, the kit also checks that ``observe`` and ``command`` say so, and that ``hold`` and ``stop`` still work.
    """
    checks: list[Callable[[Robot, int, int], None]] = [_check_episode, _check_expiry, _check_stop, _check_refusals]
    if lose is not None:
        checks.append(partial(_check_loss, lose))
    for check in checks:
        robot = make()
        try:
            check(robot, seed, steps)
        finally:
            robot.close()
        robot.close()  # closing twice does no harm


def _still(robot: Robot) -> FloatArray:
    return robot.spec.check_action(np.zeros(robot.spec.action_dim, np.float32))


def _relative(robot: Robot) -> bool:
    return "position" not in robot.spec.controller.lower()


def _check_result(robot: Robot, result: StepResult, where: str) -> None:
    for array in robot.spec.observations:
        seen = result.observation.get(array.key)
        assert seen is not None, f"{where}: the observation lacks {array.key!r}, which its spec promises"
        assert seen.shape == array.shape, f"{where}: {array.key!r} has shape {seen.shape}, its spec says {array.shape}"
        assert str(seen.dtype) == array.dtype, f"{where}: {array.key!r} is {seen.dtype}, its spec says {array.dtype}"
    robot.spec.check_observation(result.observation)
    if not robot.lockstep:
        assert result.time_ns is not None, f"{where}: a robot that moves on its own has to say when it was seen"
        assert result.time_ns <= robot.clock.now_ns(), f"{where}: seen in the future: its clock is not the one it names"
    if result.measured is not None:
        assert result.measured.shape == (robot.spec.action_dim,), f"{where}: measured is not in the action's shape"


def _check_episode(robot: Robot, seed: int, steps: int) -> None:
    clock, period_ns = robot.clock, robot.spec.period_ns
    robot.connect()
    for episode in range(2):
        called_ns = clock.now_ns()
        start = robot.begin(seed)
        _check_result(robot, start, "begin")
        assert not start.ended, "an episode begins ended"
        if not robot.lockstep:
            assert start.time_ns is not None and start.time_ns >= called_ns, "begin returned what was seen before it"
        last_ns, deadline_ns = start.time_ns, clock.now_ns()
        for step in range(steps):
            before_ns = clock.now_ns()
            if _relative(robot):
                robot.command(_still(robot), before_ns + 2 * period_ns)
            if not robot.lockstep:
                assert clock.now_ns() - before_ns < period_ns, "command waited for the robot; it has to return at once"
                deadline_ns += period_ns
                clock.sleep_until(deadline_ns)
            seen = robot.observe()
            _check_result(robot, seen, f"episode {episode}, step {step}")
            if last_ns is not None and seen.time_ns is not None:
                assert seen.time_ns >= last_ns, "an older observation came after a newer one"
                last_ns = seen.time_ns
        again = robot.observe()
        if robot.lockstep:
            assert again.time_ns == seen.time_ns, "observing moved a lockstep robot's time"
        robot.hold()
        robot.hold()
        _check_result(robot, robot.observe(), "after hold")


def _check_expiry(robot: Robot, seed: int, steps: int) -> None:
    """A command that has expired before it is sent is dropped without an error: the robot has to cope with it."""
    robot.connect()
    robot.begin(seed)
    if not robot.lockstep and _relative(robot):
        robot.command(_still(robot), robot.clock.now_ns() - robot.spec.period_ns)
        robot.clock.sleep_until(robot.clock.now_ns() + 3 * robot.spec.period_ns)  # silence: it holds by itself
    _check_result(robot, robot.observe(), "after silence")


def _check_stop(robot: Robot, seed: int, steps: int) -> None:
    robot.connect()
    robot.begin(seed)
    robot.stop()
    robot.stop()
    try:
        robot.command(_still(robot), robot.clock.now_ns() + 2 * robot.spec.period_ns)
    except StoppedError:
        pass
    else:
        raise AssertionError("a stopped robot took a command; it has to raise StoppedError until it is connected again")
    robot.connect()
    _check_result(robot, robot.begin(seed), "after stop and connect")
    if _relative(robot):
        robot.command(_still(robot), robot.clock.now_ns() + 2 * robot.spec.period_ns)


def _check_quiet(robot: Robot, where: str) -> None:
    """Check that hold and stop raise nothing: they must work whenever they are needed."""
    for call in (robot.hold, robot.stop, robot.hold, robot.stop):
        try:
            call()
        except Exception as error:
            raise AssertionError(
                f"{where}: {call.__name__} raised {type(error).__name__}: {one_line(error)}"
            ) from error


def _refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except RobotError:
        return True
    return False


def _check_closed(robot: Robot) -> None:
    robot.close()
    if not robot.lockstep:
        assert _refused(robot.observe), "a closed robot was observed; raise RobotError until it is connected again"
        until_ns = robot.clock.now_ns() + 2 * robot.spec.period_ns
        assert _refused(lambda: robot.command(_still(robot), until_ns)), "a closed robot took a command"
    _check_quiet(robot, "after it was closed")


def _check_loss(lose: Callable[[Robot], None], robot: Robot, seed: int, steps: int) -> None:
    robot.connect()
    robot.begin(seed)
    if _relative(robot):
        robot.command(_still(robot), robot.clock.now_ns() + 2 * robot.spec.period_ns)
    lose(robot)
    give_up_ns = robot.clock.now_ns() + round(_LOSS_SEEN_S * 1e9)
    while not _refused(robot.observe):
        assert robot.clock.now_ns() < give_up_ns, (
            f"{_LOSS_SEEN_S:g} s after the robot was lost, observe still goes on as if nothing had happened; raise RobotError"
        )
        robot.clock.sleep_until(robot.clock.now_ns() + robot.spec.period_ns)
    _check_quiet(robot, "after the robot was lost")
    until_ns = robot.clock.now_ns() + 2 * robot.spec.period_ns
    assert _refused(lambda: robot.command(_still(robot), until_ns)), "a robot that was lost and stopped took a command"


def _check_refusals(robot: Robot, seed: int, steps: int) -> None:
    _check_quiet(robot, "before it was connected")
    robot.connect()
    robot.begin(seed)
    size, until_ns = robot.spec.action_dim, robot.clock.now_ns() + 2 * robot.spec.period_ns
    for action in (np.full(size, np.nan, np.float32), np.zeros(size + 1, np.float32)):
        try:
            robot.command(action, until_ns)
        except InvalidValueError:
            continue
        raise AssertionError(
            f"an action of shape {action.shape} holding {action[0]} was taken; raise InvalidValueError"
        )
    _check_closed(robot)
