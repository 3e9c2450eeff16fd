"""A simulated robot on its own time: what happens when, whichever clock it happens by.

Everything is an event at a time: the robot's own cycle (a tick), a command that reaches it, an observation that reaches the
control loop. :meth:`World.advance` plays the events up to a time, in order. On the virtual clock the driver calls it when the
loop sleeps; on the real clock a process of its own calls it as time goes by. Delays and losses are drawn per message, from
the episode's seed and the message's number, so that both draw the same.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.sensing import Sensors
from sacflow_robot.envs.tasks import METERS_PER_ACTION, RADIANS_PER_ACTION, get_task
from sacflow_robot.episode import StepResult
from sacflow_robot.robot.drivers.rtsim_options import RtsimOptions, add_noise
from sacflow_robot.robot.drivers.sim import measured_action, rotation_between, turned_by
from sacflow_robot.spec import Engine, FloatArray
from sacflow_robot.utils.seeding import Stream, random_stream

Array = npt.NDArray[np.float64]
_TICK, _COMMAND, _OBSERVATION = 1, 0, 2  # of events at one time, a command is taken up before the tick
_SCALE = np.array([METERS_PER_ACTION] * 3 + [RADIANS_PER_ACTION] * 3)


class World:
    """The robot, its network, and what is on its way.

    A command counts from the tick nearest to its arrival on. Within its validity the robot is drawn to the goal that the
    command set when it was taken up, as robosuite's controller does for one control period; after it, to where it was then.

    Args:
        task: Name of the task.
        link: What happens to messages.
        engine: What steps it.

    Attributes:
        arrived: The newest observation that has reached the control loop; None before the first.
        applied: Numbers of the commands taken up, in order, each with the tick (from the episode's start) at which.
    """

    def __init__(self, task: str, link: RtsimOptions, engine: Engine) -> None:
        self.link = link
        self.env = RobosuiteEnv(task, engine=engine, step_rate_hz=1e3 / link.tick_ms)
        self.env.set_robot_model(link.model)
        self.spec = link.robot(self.env.robot)
        self._sensors = Sensors(self.spec, link.model)
        self._horizon_ns = round(link.horizon_s * 1e9) or get_task(task).horizon * self.spec.period_ns
        self._ticks_per_period = max(1, round(self.spec.period_ns / link.tick_ns))
        self._network_down = False
        self.arrived: StepResult | None = None
        self._begun, self._order = False, itertools.count()

    def begin(self, seed: int, now_ns: int) -> None:
        """Put the robot where the seed says; nothing is on its way any more."""
        start = self.env.begin(seed)
        self._start_ns, self._seed, self._begun = now_ns, seed + round(self.link.seed), True
        self._events: list[tuple[int, int, int, object]] = []
        self._numbers = [0, 0]  # observations captured, commands sent
        self._latest = -1  # number of the newest command that has arrived
        self.arrived, self.applied = None, list[tuple[int, int]]()
        self._pending: tuple[int, FloatArray, int] | None = None
        self._valid_until_ns, self._action = now_ns, np.zeros(7)
        self._tick = self._next_grip = 0
        self._seen, self._solved = replace(start, state=None, observation=self._observed(start)), False
        self._sensors.begin()
        self._goal = self._here()
        self._history: list[dict[str, FloatArray]] = [self._seen.observation]
        self._capture(now_ns)
        self._push(now_ns + self.link.tick_ns, _TICK, None)

    def flush(self, *, gripper: bool = False) -> None:
        """Forget every message on its way, and hold; ``gripper`` stops the fingers too, where they are."""
        if self._begun:
            self._events = [event for event in self._events if event[1] == _TICK]
            heapq.heapify(self._events)
            self.hold()
            if gripper:
                self._action = np.append(self._action[:6], 0.0)

    def network(self, down: bool) -> None:
        """Fail, or come back: what is sent meanwhile, either way, is lost."""
        self._network_down = down

    def send(self, action: FloatArray, valid_until_ns: int, now_ns: int) -> None:
        """A command leaves the control loop."""
        number = self._count(1)
        rng = self._rng(1, number)
        if rng.random() >= self.link.cmd_drop and not self._is_down(now_ns):
            delay = self._delay_ns(self.link.cmd_delay_ms, rng)
            # To the nearest tick: on the real clock a loop's command leaves a moment after the tick that it is for.
            self._push(now_ns + delay + self.link.tick_ns // 2, _COMMAND, (number, action, valid_until_ns))

    def hold(self) -> None:
        """Come to rest where the robot is."""
        self._pending, self._valid_until_ns = None, 0

    @property
    def next_ns(self) -> int:
        """When the next event is due."""
        return self._events[0][0]

    def advance(self, until_ns: int) -> None:
        """Play all events up to and at a time."""
        while self._events[0][0] <= until_ns:
            time_ns, kind, _, content = heapq.heappop(self._events)
            if kind == _TICK:
                self._move(time_ns)
                self._push(time_ns + self.link.tick_ns, _TICK, None)
            elif kind == _COMMAND:
                assert isinstance(content, tuple)
                if content[0] > self._latest:  # one that was overtaken on the way is older than what the robot does
                    self._latest, self._pending = content[0], content
            elif not self._is_down(time_ns) and isinstance(content, StepResult):
                newest = self.arrived
                if newest is None or (newest.time_ns or 0) < (content.time_ns or 0):
                    self.arrived = content

    # ---- the robot

    def _move(self, end_ns: int) -> None:
        """The tick that ends now."""
        begin_ns = end_ns - self.link.tick_ns
        if self._pending is not None:
            number, action, valid_until_ns = self._pending
            self._pending = None
            if begin_ns < valid_until_ns + self.link.tick_ns // 2:
                self._action, self._valid_until_ns = action.astype(np.float64), valid_until_ns
                self._goal = self._moved(self._here(), self._action[:6] * _SCALE)
                self.applied.append((number, self._tick))
        if self._valid_until_ns and begin_ns >= self._valid_until_ns + self.link.tick_ns // 2:
            self._valid_until_ns, self._goal = 0, self._here()
        elif not self._valid_until_ns and self._action[:6].any():
            self._goal = self._here()
            self._action = np.append(np.zeros(6), self._action[6])
        grip = 0.0
        if self._action[6] and self._tick >= self._next_grip:
            grip, self._next_grip = float(self._action[6]), self._tick + self._ticks_per_period
        rest = self._remaining(self._here(), self._goal) / _SCALE
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
        if not self.link.joints:
            return result.observation
        return {**result.observation, "robot0_joint_pos": self.env.joint_positions.astype(np.float32)}

    def _here(self) -> tuple[Array, Array]:
        seen = self._seen.observation
        return seen["robot0_eef_pos"].astype(np.float64), seen["robot0_eef_quat"].astype(np.float64)

    @staticmethod
    def _moved(pose: tuple[Array, Array], motion: Array) -> tuple[Array, Array]:
        return pose[0] + motion[:3], turned_by(pose[1], motion[3:])

    @staticmethod
    def _remaining(pose: tuple[Array, Array], goal: tuple[Array, Array]) -> Array:
        return np.concatenate([goal[0] - pose[0], rotation_between(pose[1], goal[1])])

    # ---- the network

    def _capture(self, now_ns: int) -> None:
        number = self._count(0)
        rng = self._rng(0, number)
        lost, delay = rng.random() < self.link.obs_drop, self._delay_ns(self.link.obs_delay_ms, rng)
        if (number > 0 and lost) or self._is_down(now_ns):  # an episode begins with an observation
            return
        observation = self._seen.observation
        if self.link.noise_m or self.link.noise_rad:
            observation = add_noise(self.spec, observation, self.link, rng)
        if self._sensors.active:
            observation = self._sensors.read(observation, random_stream(self._seed, Stream.SENSORS, number))
        self._push(now_ns + delay, _OBSERVATION, replace(self._seen, observation=observation, time_ns=now_ns))

    def _is_down(self, now_ns: int) -> bool:
        seconds = (now_ns - self._start_ns) / 1e9
        return self._network_down or 0 <= self.link.down_s <= seconds < self.link.up_s

    def _delay_ns(self, least_ms: float, rng: np.random.Generator) -> int:
        return round((least_ms + self.link.jitter_ms * rng.random()) * 1e6)

    def _rng(self, direction: int, number: int) -> np.random.Generator:
        if not (
            self.link.jitter_ms or self.link.obs_drop or self.link.cmd_drop or self.link.noise_m or self.link.noise_rad
        ):
            return _NOTHING_DRAWN
        return random_stream(self._seed, Stream.MESSAGES, direction, number)

    def _count(self, direction: int) -> int:
        number = self._numbers[direction]
        self._numbers[direction] = number + 1
        return number

    def _push(self, time_ns: int, kind: int, content: object) -> None:
        heapq.heappush(self._events, (time_ns, kind, next(self._order), content))


_NOTHING_DRAWN = np.random.default_rng(0)  # where no draw decides anything
