"""Delay, jitter and loss of messages between a control loop and a simulated robot, and errors of the readings in them.

One model for both simulators: the training environment, whose time stands still between steps, and ``rtsim``, which moves on
its own time.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np

from sacflow_robot.envs.robot_parameters import RobotParameters
from sacflow_robot.envs.tasks import TASKS
from sacflow_robot.spec import Array, FloatArray, RobotSpec
from sacflow_robot.utils.rotations import rotated

T = TypeVar("T")


@dataclass(frozen=True)
class Link:
    """One direction of a network."""

    delay_ms: float = 0.0  # shortest time that a message takes (ms)
    jitter_ms: float = 0.0  # a message takes up to this much longer, drawn evenly (ms)
    drop_ratio: float = 0.0  # share of the messages that never arrive


def link_of(model: RobotParameters, message: Literal["observation", "command"]) -> Link:
    """The way of observations or of commands under a robot model."""
    names = f"transport.{message}_delay_ms", "transport.jitter_ms", f"transport.{message}_drop_ratio"
    return Link(*(model.number(name) for name in names))


class Channel(Generic[T]):
    """Messages on their way in one direction. One that was overtaken by a newer is dropped on arrival.

    Args:
        rng: Decides delays and losses: two numbers for each message, in the order of sending.
    """

    def __init__(self, link: Link, rng: np.random.Generator) -> None:
        self._link = link
        self._rng = rng
        self._queue: list[tuple[int, int, T]] = []  # arrival (ns), number, content
        self._sent = 0
        self._newest = -1

    @property
    def next_ns(self) -> int | None:
        """Arrival time of the next message (ns); None if none is on its way."""
        return self._queue[0][0] if self._queue else None

    def draw_delay(self) -> int | None:
        """Draw the next message's delay (ns); None if it gets lost."""
        delay_ms = self._link.delay_ms + self._link.jitter_ms * self._rng.random()
        return None if self._rng.random() < self._link.drop_ratio else round(1e6 * delay_ms)

    def send(self, content: T, now_ns: int, delay_ns: int | None) -> None:
        """Put a message on its way; without a delay it is lost."""
        if delay_ns is not None:
            heapq.heappush(self._queue, (now_ns + delay_ns, self._sent, content))
        self._sent += 1

    def receive(self, until_ns: int) -> list[tuple[int, T]]:
        """Take what has arrived by a time, with the time of arrival (ns), oldest first."""
        arrived = []
        while self._queue and self._queue[0][0] <= until_ns:
            arrival_ns, number, content = heapq.heappop(self._queue)
            if number > self._newest:
                self._newest = number
                arrived.append((arrival_ns, content))
        return arrived

    def clear(self) -> None:
        """Lose everything that is on its way."""
        self._queue.clear()


JOINT_POSITION = "robot0_joint_pos"
_EEF, _OBJECT = "robot0_eef_pos", "object"


class Sensors:
    """The sensors of one robot, under the ``sensors`` section of a model.

    What is observed relative to the gripper is the difference of what is observed of both, as robosuite computes it.
    """

    def __init__(self, robot: RobotSpec, model: RobotParameters) -> None:
        self._arrays = [(array, model.sensor(array.key)) for array in robot.observations]
        task = TASKS.get(robot.task)
        self._absolute, self._relative = ((), ()) if task is None else (task.object_positions, task.object_from_grip)
        self._offset = model.array("joints.zero_offset_rad")
        self._last: dict[str, FloatArray] = {}
        self._active = self._offset is not None or any(known for _, known in self._arrays)

    def begin(self) -> None:
        """Forget the readings before: an episode begins."""
        self._last = {}

    def read(self, truth: Mapping[str, FloatArray], rng: np.random.Generator) -> dict[str, FloatArray]:
        """Draw a reading of each key; ``truth`` itself where nothing is known of any sensor."""
        if not self._active:
            return dict(truth)
        readings = {}
        moved = np.zeros(3)
        places = {_EEF: (0,), _OBJECT: self._absolute}  # where in an array a position begins that a bias moves
        for array, known in self._arrays:
            value = truth[array.key].astype(np.float64).reshape(-1)
            drawn, kept = rng.standard_normal(array.size), rng.random()
            turned = np.zeros(array.size, bool)
            for start in array.quaternions:
                turned[start : start + 4] = True
                turn = known.get("bias_rad", np.zeros(3)) + known.get("noise_rad", 0.0) * drawn[start : start + 3]
                value[start : start + 4] = rotated(value[start : start + 4], turn)
            if array.unit.startswith("m"):
                error = _shift(known, drawn, array.size, places.get(array.key, ()))
                if array.key == _EEF:
                    moved = error[:3]
                if array.key == _OBJECT:
                    for start, of in zip(self._relative, self._absolute, strict=False):
                        error[start : start + 3] = error[of : of + 3] - moved
                value = np.where(turned, value, _rounded(value + error, known.get("resolution_m")))
            elif array.unit == "rad":
                bias = 0.0 if self._offset is None or array.key != JOINT_POSITION else self._offset
                value = _rounded(value + bias + known.get("noise_rad", 0.0) * drawn, known.get("resolution_rad"))
            reading = value.astype(array.dtype).reshape(array.shape)
            if kept < float(known.get("drop_ratio", np.zeros(1))[0]) and array.key in self._last:
                reading = self._last[array.key]
            readings[array.key] = self._last[array.key] = reading
        return readings


def _shift(known: Mapping[str, Array], drawn: Array, size: int, places: tuple[int, ...]) -> Array:
    error = np.zeros(size) + known.get("noise_m", 0.0) * drawn
    if "bias_m" in known:
        for start in places:
            error[start : start + 3] += known["bias_m"]
    return error


def _rounded(value: Array, step: Array | None) -> Array:
    return value if step is None or step[0] <= 0 else np.round(value / step[0]) * step[0]
