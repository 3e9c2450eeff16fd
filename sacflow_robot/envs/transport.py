"""Delay, jitter and loss of messages between a control loop and a simulated robot.

One model for both simulators: the training environment, whose time stands still between steps, and ``rtsim``, which moves on
its own time. Noise of the readings inside the messages is in ``sacflow_robot.envs.sensing``.
"""

import heapq
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np

from sacflow_robot.envs.robot_parameters import RobotParameters

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
