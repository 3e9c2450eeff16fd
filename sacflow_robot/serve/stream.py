"""Chunks played on the robot's clock: the next one is asked for before it is needed, and joined to the one being played."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sacflow_robot.errors import LateError, ServerError
from sacflow_robot.serve.client import as_batch
from sacflow_robot.spec import FloatArray, Observation, PolicySpec

_REMEMBERED = 32
_FIRST_GUESS_S = 0.05


class Asks(Protocol):
    """What a stream needs of a client; :class:`~sacflow_robot.serve.client.PolicyClient` is one."""

    @property
    def spec(self) -> PolicySpec: ...

    @property
    def takes_prefix(self) -> bool: ...

    def ask(
        self,
        observation: Observation,
        noise: FloatArray | None = None,
        deadline_s: float | None = None,
        *,
        prefix: FloatArray | None = None,
        prefix_mask: FloatArray | None = None,
    ) -> int: ...

    def collect(self, number: int, wait_s: float | None = None) -> FloatArray: ...


@dataclass(frozen=True)
class StreamStep:
    """What to do in one control period.

    Attributes:
        action: Action (A,); None where no chunk reaches this far: hold still.
        asked: Whether a chunk was asked for with this step's observation.
        joined: Whether a new chunk begins to be played here.
    """

    action: FloatArray | None
    asked: bool
    joined: bool


class ChunkStream:
    """Plays chunks step by step while the next ones are on their way.

    A chunk asked for at step s is for the steps s, s + 1, ...; when it arrives at step n, its first n - s actions are past
    and dropped. A policy that takes a prefix is told the actions that will be played before its answer can be there, and
    completes them. The new chunk takes over from the old one over the next ``blend`` steps, from where it is free to differ,
    as far as the old one reaches.

    Args:
        client: A connected client.
        blend: Steps over which a new chunk takes over; 0 switches at once.
        prefix: Whether to send what will be played meanwhile, where the policy takes it.
        clock_ns: Clock that the delay is measured with.
    """

    def __init__(
        self,
        client: Asks,
        *,
        blend: int = 2,
        prefix: bool = True,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._client, self._blend, self._prefix, self._clock_ns = client, blend, prefix, clock_ns
        self._period_s = 1 / client.spec.arm.control_rate_hz
        self._delays_s: deque[float] = deque(maxlen=_REMEMBERED)
        self.lost = 0
        self.begin()

    def begin(self) -> None:
        """Start an episode: what was planned or is on its way does not count any more."""
        self._step = 0
        self._chunk: FloatArray | None = None
        self._start = 0
        self._old: FloatArray | None = None
        self._old_start = self._blend_from = self._decided = 0
        self._number: int | None = None
        self._asked_step, self._asked_ns = 0, 0

    @property
    def delay_steps(self) -> int:
        """Control periods that an answer takes, by the slowest of the last ones."""
        return math.ceil(max(self._delays_s, default=_FIRST_GUESS_S) / self._period_s)

    def step(self, observation: Observation, noise: FloatArray | None = None) -> StreamStep:
        """The action of this control period, from its observation (unbatched); waits only for the first chunk.

        Raises:
            ServerError: There is no chunk to play, and none to be had. While there is one to play, errors count in
                ``lost`` and the next step asks again.
        """
        joined = self._take()
        asked = self._ask(observation, noise)
        if self._chunk is None:
            joined = self._take(wait=True)
        action = self._action(self._step)
        self._step += 1
        return StreamStep(action, asked, joined)

    def _ask(self, observation: Observation, noise: FloatArray | None) -> bool:
        if self._number is not None or not self._is_time():
            return False
        left = self._end - self._step
        try:
            self._asked_ns = self._clock_ns()
            batch = None if noise is None else noise[None]
            # An answer after the last action being played could start nothing in time.
            deadline_s = None if self._chunk is None else max(1, left) * self._period_s
            prefix, mask, self._decided = self._plan()
            self._number = self._client.ask(as_batch(observation), batch, deadline_s, prefix=prefix, prefix_mask=mask)
            self._asked_step = self._step
        except ServerError:
            self._lose()
            return False
        return True

    def _plan(self) -> tuple[FloatArray | None, FloatArray | None, int]:
        """Actions (1, H, A) that will be played before an answer can be there, where (1, H) is 1, and how many."""
        if not (self._prefix and self._client.takes_prefix):
            return None, None, 0
        shape = self._client.spec.noise_shape
        prefix, mask, count = np.zeros(shape, np.float32), np.zeros(shape[0], np.float32), 0
        while count < min(self.delay_steps, shape[0]):
            action = self._action(self._step + count)
            if action is None:
                break
            prefix[count], mask[count] = action, 1
            count += 1
        return prefix[None], mask[None], count

    def _is_time(self) -> bool:
        return self._chunk is None or self._end - self._step <= self.delay_steps + self._blend

    def _take(self, wait: bool = False) -> bool:
        """Look for the chunk that is on its way; whether it has come."""
        if self._number is None:
            return False
        try:
            chunk = self._client.collect(self._number, None if wait else 0)[0]
        except TimeoutError:
            return False
        except ServerError as error:
            if isinstance(error, LateError):
                self._note_delay()
            self._number = None
            self._lose()
            return False
        self._number = None
        self._note_delay()
        if self._asked_step + len(chunk) <= self._step:  # all of it is past
            self.lost += 1
            return False
        self._old, self._old_start = self._chunk, self._start
        self._chunk, self._start = chunk, self._asked_step
        self._blend_from = max(self._step, self._asked_step + self._decided)
        return True

    def _action(self, step: int) -> FloatArray | None:
        new = _at(self._chunk, step - self._start)
        old = _at(self._old, step - self._old_start)
        if new is None or old is None or step < self._blend_from:
            return new
        share = (step - self._blend_from + 1) / (self._blend + 1)
        if share >= 1:
            return new
        blended: FloatArray = (old + share * (new - old)).astype(np.float32)
        return blended

    @property
    def _end(self) -> int:
        """First step that the chunk does not reach."""
        return self._start + (0 if self._chunk is None else len(self._chunk))

    def _note_delay(self) -> None:
        self._delays_s.append((self._clock_ns() - self._asked_ns) / 1e9)

    def _lose(self) -> None:
        """Count a chunk that will not come; without one to play, say so."""
        self.lost += 1
        if self._chunk is None or self._step >= self._end:
            raise


def _at(chunk: FloatArray | None, index: int) -> FloatArray | None:
    return chunk[index] if chunk is not None and 0 <= index < len(chunk) else None
