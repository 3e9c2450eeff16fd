"""Protocols: what a policy, a robot, a recorder and a vector environment have to do."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from sacflow_robot.episode import Step, StepResult
from sacflow_robot.spec import Engine, FloatArray, Observation, PolicySpec, RobotSpec


class Policy(Protocol):
    """Anything that turns observations into action chunks: local, remote, recorded, scripted."""

    @property
    def spec(self) -> PolicySpec: ...

    def infer(self, observation: Observation, noise: FloatArray) -> FloatArray:
        """Action chunks (B, H, A) for observations (B, ...) and noise (B, H, A)."""
        ...


class Clock(Protocol):
    """Whose time the control loop lives in: the machine's, or a simulation's own."""

    def now_ns(self) -> int:
        """The present time (ns)."""
        ...

    def sleep_until(self, time_ns: int) -> None:
        """Return at that time (ns), or at once where it is past."""
        ...


class Robot(Protocol):
    """A robot, simulated or physical. One thread owns it.

    There are two kinds of time. On a *lockstep* robot it stands still between commands: ``command`` executes one action for
    one control period, and ``observe`` then tells what came of it. Any other robot moves on its own time, whether or not a
    command arrives: ``command`` hands the action over and returns, and ``observe`` returns the newest observation that has
    arrived, which may be the one before. The control loop is the same for both.

    Calls come in the order ``connect``, then for each episode ``begin`` and pairs of ``observe`` and ``command``, and at
    last ``close``. ``hold`` and ``stop`` may come at any time, before ``connect`` and after ``close`` and a failure too, more
    than once, and raise nothing.

    What a driver runs beside the loop (a thread, a process) and keeps a robot standing has to go on when something that it
    calls fails. What failed there, or has ended, is raised as a ``RobotError`` by the next ``observe`` or ``command``.
    """

    @property
    def spec(self) -> RobotSpec: ...

    @property
    def lockstep(self) -> bool:
        """True if time stands still between commands."""
        ...

    @property
    def clock(self) -> Clock:
        """The clock of observations' ``time_ns`` and of commands' validity."""
        ...

    def connect(self) -> None:
        """Reach the robot, anew if it was lost or stopped. What was queued anywhere is dropped; nothing moves. A stop that comes
        meanwhile stays in force.

        Raises:
            RobotError: It cannot be reached, or is not ready; says what to do.
        """
        ...

    def begin(self, seed: int) -> StepResult:
        """Start an episode and return its first observation, one captured after this call.

        A simulated robot is put where the seed says. A physical robot ignores the seed and stays where it is.

        Raises:
            RobotError: No observation arrives.
        """
        ...

    def observe(self) -> StepResult:
        """The newest observation, without waiting for another. A robot that is not lockstep says when it was captured;
        a repeated one (same source counter) keeps its first capture time.

        Raises:
            RobotError: The robot is lost, or something that its observations need has failed.
        """
        ...

    def command(self, action: FloatArray, valid_until_ns: int) -> None:
        """Act on one action (A,), in the robot's action units, until the next one comes.

        An action must not be acted on after ``valid_until_ns`` of the robot's clock: if it arrives later it is dropped, and
        once that time is past a robot without a newer one holds, by itself. A lockstep robot, whose time stands still
        meanwhile, takes no notice.

        Raises:
            RobotError: The robot is lost, or has been stopped.
        """
        ...

    def hold(self) -> None:
        """Drop what is queued and come to rest, under control, moving toward nothing. The next command ends it."""
        ...

    def stop(self) -> None:
        """Emergency stop: as ``hold``, at once, and no command is taken before the next ``connect``."""
        ...

    def close(self) -> None:
        """Hold, and let go of the robot. Closing twice does no harm."""
        ...


@runtime_checkable
class SimulatedRobot(Protocol):
    """A robot that says what steps its simulation."""

    @property
    def engine(self) -> Engine: ...


@runtime_checkable
class GripperLimited(Protocol):
    """A robot that commands its gripper in more than the action says, so that no filter of actions could limit it."""

    def limit_gripper(self, force_n: float | None, width_m: tuple[float, float] | None) -> None:
        """Grasp with at most that force (N), and go to widths (m) between those alone; None for no limit."""
        ...


class Recorder(Protocol):
    """Anything that keeps episodes step by step; a step counts as kept once ``append`` has returned."""

    def begin(self, start: StepResult, time_ns: int, info: Mapping[str, Any]) -> None:
        """Start an episode: what the robot reported, when that was captured, and what is known of the episode so far."""
        ...

    def append(self, step: Step) -> None:
        """Keep one step; must not wait for a disk."""
        ...

    def end(self, info: Mapping[str, Any]) -> None:
        """End the episode; ``info`` is added to what ``begin`` was given."""
        ...


@runtime_checkable
class ResilientRecorder(Recorder, Protocol):
    """A recorder that keeps a step that it cannot write, and can go on later."""

    def mend(self) -> None:
        """Try again to write what is kept.

        Raises:
            LogWriteError: It still cannot; what is kept stays kept.
        """
        ...


class VectorEnv(Protocol):
    """N simulated robots, each executing whole chunks; ``sacflow_robot.envs.vector.make_vector_env`` makes them."""

    @property
    def spec(self) -> RobotSpec: ...

    @property
    def engine(self) -> Engine: ...

    def __len__(self) -> int: ...

    def begin(self, starts: Mapping[int, int]) -> dict[int, StepResult]:
        """Start episodes: robot index to seed."""
        ...

    def send(self, chunks: Mapping[int, FloatArray]) -> None:
        """Have robots execute chunks (H, A) in the background, each stopping early where its episode ends."""
        ...

    def receive(self) -> dict[int, list[StepResult]]:
        """Wait for what was sent; per robot one result for each action executed."""
        ...

    def close(self) -> None:
        """Give back what the robots hold."""
        ...
