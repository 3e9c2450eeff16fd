"""Sources of actions: chunks one after another, or played on the robot's clock while the next one is on its way.

Late answers are dropped in four places: the server refuses a request past its deadline (``serve/batching.py``), the client
drops replies to older requests (``serve/connection.py``), the queue drops a chunk that is wholly past, and the safety filter
refuses an action that comes too late for its period (``robot/safety/filter.py``).
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from sacflow_robot.errors import DeadlineExceeded, ServerError, SpecMismatchError
from sacflow_robot.interfaces import Policy, Robot
from sacflow_robot.robot.drivers.clock import MonotonicClock
from sacflow_robot.spec import FloatArray, Observation, PolicySpec

_REMEMBERED = 32
_OUTLIERS = 8  # one answer in so many may take longer than is planned for
_FIRST_GUESS_S = 0.05


@dataclass(frozen=True, slots=True)
class ActionStep:
    """The action of one control period.

    Attributes:
        action: Action (A,); None for none: hold still.
        joined: Whether this is the first action played of a new chunk.
        asked: Whether a chunk was asked for with this step's observation.
    """

    action: FloatArray | None
    joined: bool = False
    asked: bool = False


class ActionSource(Protocol):
    def begin(self) -> None: ...

    def step(self, observation: Observation, noise: FloatArray | None = None) -> ActionStep: ...


@runtime_checkable
class Connected(Protocol):
    """A source behind a connection, which is to be kept while no action is wanted."""

    def keep_alive(self) -> None:
        """Keep the connection, or make it anew; must not wait."""
        ...


class SyncChunking:
    """Chunks one after another, each played to its end: for robots whose time stands still while a policy thinks."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.begin()

    def begin(self) -> None:
        self._chunk = np.zeros((0, 0), np.float32)
        self._next = 0

    def step(self, observation: Observation, noise: FloatArray | None = None) -> ActionStep:
        joined = self._next == len(self._chunk)
        if joined:
            assert noise is not None
            self._chunk = self._policy.infer(_batched(observation), noise[None])[0]
            self._next = 0
        self._next += 1
        return ActionStep(self._chunk[self._next - 1], joined)


class Asks(Protocol):
    """The part of a client that a queue needs; :class:`~sacflow_robot.serve.client.PolicyClient` is one."""

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

    def keep_alive(self) -> None: ...


class ActionQueue:
    """Plays chunks step by step while the next ones are on their way.

    Steps are control periods in which an action was played. A chunk asked for at step s is for the steps s, s + 1, ...; when
    it arrives at step n, its first n - s actions are past and dropped. While there is nothing to play the robot stands, and
    no step passes: a chunk asked for by a standing robot is played from its first action, however long it took. A policy that
    takes a prefix is told the actions that will be played before its answer can be there, and completes them. The new chunk
    takes over from the old one over the next ``blend`` steps, from where it is free to differ, as far as the old one reaches.

    Args:
        blend: Steps over which a new chunk takes over; 0 requests at once.
        wait: Whether to wait for every answer, as where the robot's clock stands still meanwhile.
        prefix: Whether to send what will be played meanwhile, where the policy takes it.
    """

    def __init__(
        self,
        client: Asks,
        *,
        blend: int = 2,
        prefix: bool = True,
        wait: bool = False,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._client = client
        self._blend = blend
        self._prefix = prefix
        self._wait = wait
        self._clock_ns = clock_ns
        self._period_s = 1 / client.spec.robot.control_rate_hz
        self._shape = client.spec.noise_shape
        self._delays_s = deque([_FIRST_GUESS_S], maxlen=_REMEMBERED)
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
        self._budget_s: float | None = None  # that it has to come within
        self._asked_step, self._asked_ns = 0, 0
        self._fresh = False  # whether none of the chunk was played yet

    def keep_alive(self) -> None:
        """Keep the connection while no action is wanted: call it in every control period in which the robot is held.

        Waits for nothing, and takes well under a millisecond. A server that was restarted meanwhile has been greeted by
        the time the robot is enabled again, so that the next :meth:`step` gets a chunk. A server that is gone is no
        error here.

        Raises:
            SpecMismatchError: The server was restarted with a policy that does not fit.
        """
        self._client.keep_alive()
        self._check_shape()

    @property
    def delay_steps(self) -> int:
        """Control periods that an answer takes, by the slowest of the last ones but one in eight.

        A cold server's first answer says nothing about the next one; a server that stays slow is found within five answers.
        """
        delays_s = sorted(self._delays_s)
        slowest_s = delays_s[max(0, len(delays_s) - 1 - math.ceil(len(delays_s) / _OUTLIERS))]
        return math.ceil(slowest_s / self._period_s)

    def step(self, observation: Observation, noise: FloatArray | None = None) -> ActionStep:
        """The action of this control period, from its observation (unbatched); waits only for the first chunk.

        Where that wait outlasts the period, the robot stands until the next one, which the chunk then begins in.
        While a chunk is left, errors only count in ``lost`` and the next step asks again.

        Raises:
            ServerError: There is no chunk to play and none can be had.
            SpecMismatchError: The server was restarted with a policy that does not fit.
        """
        began_ns = self._clock_ns()
        self._check_shape()
        self._take()
        asked = self._ask(observation, noise)
        if self._chunk is None:
            self._take(wait=True)
            if self._clock_ns() - began_ns > self._period_s * 1e9:
                return ActionStep(None, asked=asked)
        action = self._action(self._step)
        if action is None:
            return ActionStep(None, asked=asked)
        self._step += 1
        joined, self._fresh = self._fresh, False
        return ActionStep(action, joined, asked)

    def _ask(self, observation: Observation, noise: FloatArray | None) -> bool:
        left = self._end - self._step
        if self._number is not None or left > self.delay_steps + self._blend:
            return False
        try:
            self._asked_ns = self._clock_ns()
            batch = None if noise is None else noise[None]
            # An answer after the last action being played could start nothing in time; a robot that stands can wait.
            self._budget_s = left * self._period_s if left > 0 else None
            prefix, mask, self._decided = self._plan()
            self._number = self._client.ask(
                _batched(observation), batch, self._budget_s, prefix=prefix, prefix_mask=mask
            )
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

    def _take(self, wait: bool = False) -> None:
        """Look for the chunk that is on its way, and take it up if it has come."""
        if self._number is None:
            return
        try:
            chunk = self._client.collect(self._number, None if wait or self._wait else 0)[0]
        except TimeoutError:
            return
        except ServerError as error:
            if isinstance(error, DeadlineExceeded):
                self._note_delay(self._budget_s or 0.0)  # it was refused at once, and would have taken longer than this
            self._number = None
            self._lose()
            return
        self._number = None
        self._note_delay()
        if self._asked_step + len(chunk) <= self._step:  # all of it is past
            self.lost += 1
            return
        self._old, self._old_start = self._chunk, self._start
        self._chunk, self._start = chunk, self._asked_step
        self._blend_from = max(self._step, self._asked_step + self._decided)
        self._fresh = True

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

    def _note_delay(self, least_s: float = 0.0) -> None:
        self._delays_s.append(max(least_s, (self._clock_ns() - self._asked_ns) / 1e9))

    def _check_shape(self) -> None:
        if self._client.spec.noise_shape != self._shape:
            raise SpecMismatchError(
                f"the server was restarted with a policy whose chunks have shape {self._client.spec.noise_shape}; this run "
                f"began with {self._shape}: serve the former policy again, or start a new run"
            )

    def _lose(self) -> None:
        """Count a chunk that will not come; without one to play, say so."""
        self.lost += 1
        if self._chunk is None or self._step >= self._end:
            raise


def queue_for(client: Asks, robot: Robot) -> ActionQueue:
    """A queue on the robot's clock. On a virtual clock an answer takes no time: the queue waits for it."""
    virtual = not isinstance(robot.clock, MonotonicClock)
    return ActionQueue(client, wait=virtual, clock_ns=robot.clock.now_ns)


def _batched(observation: Observation) -> dict[str, FloatArray]:
    return {key: np.asarray(array)[None] for key, array in observation.items()}


def _at(chunk: FloatArray | None, index: int) -> FloatArray | None:
    return chunk[index] if chunk is not None and 0 <= index < len(chunk) else None
