"""A simulated robot on its own time, with the network between it and the control loop, for a real and a virtual clock alike.

:meth:`Plant.advance` plays what happens up to a time: commands arrive, the robot moves (a tick), observations arrive. On the
virtual clock the driver calls it when the loop sleeps; on the real clock a process of its own calls it as time goes by.
Delays, losses and noise are drawn in the order of messages from the episode's seed, so that both clocks draw the same.

Run as a program, it is the process of an ``rtsim`` robot: it plays its plant's events as the machine's clock reaches them.
"""

import contextlib
import os
import sys
import time
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import zmq

from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.tasks import METERS_PER_ACTION, RADIANS_PER_ACTION, get_task
from sacflow_robot.envs.transport import JOINT_POSITION, Channel, Sensors
from sacflow_robot.episode import StepResult
from sacflow_robot.errors import SacflowError, one_line
from sacflow_robot.robot.drivers.options import split_name
from sacflow_robot.robot.drivers.rtsim_options import RtsimOptions, read_options
from sacflow_robot.robot.drivers.sim import measured_action
from sacflow_robot.spec import Engine, FloatArray
from sacflow_robot.utils.rotations import rotated, rotation_between
from sacflow_robot.utils.seeding import Stream, random_stream

Array = npt.NDArray[np.float64]
_CATCH_UP_MS = 2
_LOOK_MS = 200  # how often to see whether the driver is still there, while nothing is to be done
_SCALE = np.array([METERS_PER_ACTION] * 3 + [RADIANS_PER_ACTION] * 3)


class Plant:
    """The robot, its network, and the messages on their way.

    A command counts from the tick nearest to its arrival on. Within its validity the robot is drawn to the goal that the
    command set when it was taken up, as robosuite's controller does for one control period; after it, to where it was then.

    Attributes:
        arrived: The newest observation that has reached the control loop; None before the first.
        applied: Numbers of the commands taken up, in order, each with the tick (from the episode's start) at which.
    """

    def __init__(self, task: str, options: RtsimOptions, engine: Engine) -> None:
        self.options = options
        self.env = RobosuiteEnv(task, engine=engine, step_rate_hz=1e3 / options.tick_ms)
        self.env.set_robot_model(options.model)
        self.spec = options.robot(self.env.robot)
        self._horizon_ns = round(options.horizon_s * 1e9) or get_task(task).horizon * self.spec.period_ns
        self._ticks_per_period = max(1, round(self.spec.period_ns / options.tick_ns))
        self._network_down = False
        self.arrived: StepResult | None = None
        self._begun = False

    def begin(self, seed: int, now_ns: int) -> None:
        """Put the robot where the seed says; nothing is on its way any more."""
        start = self.env.begin(seed)
        own = seed + round(self.options.seed)
        self._rng = random_stream(own, Stream.MESSAGES, 0)
        self._observations: Channel[StepResult] = Channel(self.options.observation_link, self._rng)
        self._commands: Channel[tuple[int, FloatArray, int]] = Channel(
            self.options.command_link, random_stream(own, Stream.MESSAGES, 1)
        )
        self._sensors = Sensors(self.spec, self.options.sensors(self.spec))
        self._begun = True
        self._start_ns = now_ns
        self._sent = 0
        self.arrived = None
        self.applied = list[tuple[int, int]]()
        self._pending: tuple[int, FloatArray, int] | None = None
        self._valid_until_ns = now_ns
        self._action = np.zeros(7)
        self._tick = 0
        self._next_grip = 0
        self._solved = False
        self._seen = replace(start, state=None, observation=self._observed(start))
        self._goal = self._pose()
        self._history: list[dict[str, FloatArray]] = [self._seen.observation]
        self._capture(now_ns)
        self._tick_ns = now_ns + self.options.tick_ns

    def flush(self, *, gripper: bool = False) -> None:
        """Lose every message on its way, and hold; ``gripper`` stops the fingers too, where they are."""
        if self._begun:
            self._commands.clear()
            self._observations.clear()
            self.hold()
            if gripper:
                self._action = np.append(self._action[:6], 0.0)

    def network(self, down: bool) -> None:
        """Fail, or come back: what is sent meanwhile, either way, is lost."""
        self._network_down = down

    def send(self, action: FloatArray, valid_until_ns: int, now_ns: int) -> None:
        delay_ns = self._commands.draw_delay()
        content = self._sent, action, valid_until_ns
        self._commands.send(content, now_ns, None if self._is_down(now_ns) else delay_ns)
        self._sent += 1

    def hold(self) -> None:
        self._pending = None
        self._valid_until_ns = 0

    @property
    def next_ns(self) -> int:
        """Time of the next tick, or of the next observation's arrival."""
        return min(self._tick_ns, self._observations.next_ns or self._tick_ns)

    def advance(self, until_ns: int) -> None:
        while self._tick_ns <= until_ns:
            self._take_up(self._tick_ns)
            self._move(self._tick_ns)
            self._tick_ns += self.options.tick_ns
        self._take_up(until_ns)
        for arrival_ns, seen in self._observations.receive(until_ns):
            if not self._is_down(arrival_ns):
                self.arrived = seen

    def _take_up(self, now_ns: int) -> None:
        # By the nearest tick: on the real clock a loop's command leaves a moment after the tick that it is for.
        arrived = self._commands.receive(now_ns - self.options.tick_ns // 2)
        if arrived:
            self._pending = arrived[-1][1]

    def _move(self, end_ns: int) -> None:
        begin_ns = end_ns - self.options.tick_ns
        if self._pending is not None:
            number, action, valid_until_ns = self._pending
            self._pending = None
            if begin_ns < valid_until_ns + self.options.tick_ns // 2:
                self._action = action.astype(np.float64)
                self._valid_until_ns = valid_until_ns
                position, quat = self._pose()
                motion = self._action[:6] * _SCALE
                self._goal = position + motion[:3], rotated(quat, motion[3:])
                self.applied.append((number, self._tick))
        if self._valid_until_ns and begin_ns >= self._valid_until_ns + self.options.tick_ns // 2:
            self._valid_until_ns = 0
            self._goal = self._pose()
        elif not self._valid_until_ns and self._action[:6].any():
            self._goal = self._pose()
            self._action = np.append(np.zeros(6), self._action[6])
        grip = 0.0
        if self._action[6] and self._tick >= self._next_grip:
            grip = float(self._action[6])
            self._next_grip = self._tick + self._ticks_per_period
        position, quat = self._pose()
        rest = np.concatenate([self._goal[0] - position, rotation_between(quat, self._goal[1])]) / _SCALE
        result = self.env.command(np.append(np.clip(rest, -1, 1), grip).astype(np.float32))
        observed = self._observed(result)
        self._tick += 1
        self._solved |= result.terminated
        self._history.append(observed)
        del self._history[: -self._ticks_per_period - 1]
        measured = measured_action(self._history[0], observed, float(self._action[6]))
        truncated = not self._solved and end_ns - self._start_ns >= self._horizon_ns
        self._seen = StepResult(observed, float(self._solved), self._solved, truncated, measured=measured)
        self._capture(end_ns)

    def _observed(self, result: StepResult) -> dict[str, FloatArray]:
        if not self.options.joints:
            return result.observation
        return {**result.observation, JOINT_POSITION: self.env.joint_positions.astype(np.float32)}

    def _pose(self) -> tuple[Array, Array]:
        seen = self._seen.observation
        return seen["robot0_eef_pos"].astype(np.float64), seen["robot0_eef_quat"].astype(np.float64)

    def _capture(self, now_ns: int) -> None:
        delay_ns = self._observations.draw_delay()
        if delay_ns is None and now_ns == self._start_ns:  # an episode begins with an observation
            delay_ns = round(1e6 * self.options.obs_delay_ms)
        reading = self._sensors.read(self._seen.observation, self._rng)
        seen = replace(self._seen, observation=reading, time_ns=now_ns)
        self._observations.send(seen, now_ns, None if self._is_down(now_ns) else delay_ns)

    def _is_down(self, now_ns: int) -> bool:
        seconds = (now_ns - self._start_ns) / 1e9
        return self._network_down or 0 <= self.options.down_s <= seconds < self.options.up_s


def main(task: str, engine: str, port: str, options: str, parent: str) -> None:
    given = split_name(f"rtsim:{task}?{options}&engine={engine}")[2]
    _, chosen, made = read_options(given)
    plant = Plant(task, made, chosen)
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(f"tcp://127.0.0.1:{port}")
    socket.send(b"ready")
    try:
        _Server(plant, socket).run(int(parent))
    finally:
        context.destroy(linger=0)


class _Server:
    """Plays the plant's events and obeys the driver; reports failures of either to the driver and stands still."""

    def __init__(self, plant: Plant, socket: zmq.Socket[Any]) -> None:
        self._plant, self._socket = plant, socket
        self._episode, self._stopped, self._ended = 0, True, False
        self._told: StepResult | None = None

    def run(self, parent: int) -> None:
        """Until told to end, or the driver's process is gone."""
        while os.getppid() == parent and not self._ended:
            try:
                self._round()
            except Exception as error:
                self._fail(error)

    def _round(self) -> None:
        # What has come first: where cores are busy, a command may have waited here past the tick that it was in time for,
        # and so may the thread that takes it from the network.
        plant, socket = self._plant, self._socket
        behind = bool(self._episode) and time.monotonic_ns() - plant.next_ns > plant.options.tick_ns // 2
        while socket.poll(_CATCH_UP_MS if behind else 0) and not self._ended:
            self._take(msgpack.unpackb(socket.recv()))
        wait_ms: float = _LOOK_MS
        if self._episode:
            plant.advance(time.monotonic_ns())
            if plant.arrived is not None and plant.arrived is not self._told:
                self._told = plant.arrived
                self._tell(self._told)
            wait_ms = max(0.0, (plant.next_ns - time.monotonic_ns()) / 1e6)
        if not socket.poll(int(min(wait_ms, _LOOK_MS))) and wait_ms < 1:  # polls wake in whole milliseconds
            time.sleep(wait_ms / 1e3)

    def _take(self, message: dict[str, Any]) -> None:
        plant = self._plant
        match message["do"]:
            case "connect":
                plant.flush()
                self._stopped = False
            case "begin":
                self._episode, self._told = 0, None
                plant.begin(message["seed"], time.monotonic_ns())
                self._episode = message["episode"]
            case "command" if self._episode and not self._stopped:
                action = np.frombuffer(message["action"], np.float32)
                plant.send(action, message["until"], message["at"])
            case "hold":
                plant.flush()
            case "stop":
                self._stopped = True
                plant.flush(gripper=True)
            case "network":
                plant.network(message["down"])
            case "end":
                self._ended = True

    def _tell(self, seen: StepResult) -> None:
        message = {
            "episode": self._episode,
            "seen": {key: array.tobytes() for key, array in seen.observation.items()},
            "measured": b"" if seen.measured is None else seen.measured.tobytes(),
            "reward": seen.reward,
            "terminated": seen.terminated,
            "truncated": seen.truncated,
            "time_ns": seen.time_ns,
            "applied": self._plant.applied[-3:],
        }
        self._socket.send(msgpack.packb(message), zmq.NOBLOCK)

    def _fail(self, error: Exception) -> None:
        """Time stands still from here on, for nothing can be said of the robot, until an episode begins."""
        self._episode = 0
        failure = f"{type(error).__name__}: {one_line(error)}"
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send(msgpack.packb({"failure": failure}), zmq.NOBLOCK)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (OSError, SacflowError) as error:
        sys.exit(f"{type(error).__name__}: {one_line(error)}")
    os._exit(0)  # nothing is left to be flushed, and taking the simulator apart takes seconds where cores are busy
