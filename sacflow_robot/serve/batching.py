"""Which requests are evaluated together, which are refused as too late, and which may wait."""

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sacflow_robot.errors import InvalidValueError
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve.session import Refusal, Session
from sacflow_robot.spec import FloatArray

_AGREEING = 5
_REFUSALS = 8
_WARM_UP_S = 1.0
_MOST_WAITING = 256
_BURST_NS = 10_000_000
_SHARE = 0.02  # of the server's time
_KEPT = 4096


class Request(NamedTuple):
    """A request for actions.

    Attributes:
        peer: The connection that it came over.
        identifier: Its id, which the answer repeats.
        session: The session that it belongs to.
        policy: The policy to evaluate.
        inputs: The policy's inputs, checked, each (B, ...).
        rows: B.
        seed: Seed of its noise; None where the client sent the noise.
        step: Step of the noise stream; None likewise.
        deadline_ns: When the answer has to leave (server's clock, ns); None for no deadline.
        received_ns: When it arrived (server's clock, ns).
    """

    peer: bytes
    identifier: int
    session: Session
    policy: OnnxPolicy
    inputs: dict[str, FloatArray]
    rows: int
    seed: int | None
    step: int | None
    deadline_ns: int | None
    received_ns: int


def join(requests: Sequence[Request]) -> dict[str, FloatArray]:
    """The inputs of all of them, one after another; those of a lone one as they are."""
    first = requests[0].inputs
    if len(requests) == 1:
        return first
    return {name: np.concatenate([request.inputs[name] for request in requests]) for name in first}


def warm_up(policy: OnnxPolicy, most_rows: int, budget_s: float = _WARM_UP_S) -> None:
    """Evaluate once what requests of every size will ask for: an engine's first evaluation of a size may take a second.

    One row comes first, then the most, the powers of two and the sizes between, until the time is over.

    Raises:
        PolicyFileError: The graph cannot be evaluated.
    """
    deadline = time.monotonic() + budget_s
    powers = [2**n for n in range(most_rows.bit_length())]
    for rows in dict.fromkeys((1, most_rows, *powers, *range(1, most_rows))):
        policy.run(policy.blank_inputs(rows))
        if time.monotonic() > deadline:
            return


def too_late() -> Refusal:
    """Error for a request whose answer would come after its deadline."""
    return Refusal("late", "the answer would have come after the request's deadline; nothing was computed")


class Pace:
    """Shortest time of an evaluation, by the number of rows (to a power of two): the quickest of the last five.

    One slow evaluation refuses nothing; five slow ones in a row do. One quick one ends the refusals. After eight consecutive
    refusals, one request is evaluated anyway.
    """

    def __init__(self) -> None:
        self._recent_ns: dict[int, deque[int]] = {}
        self._refusals: Counter[int] = Counter()  # since the last evaluation

    def learn(self, rows: int, duration_ns: int) -> None:
        """An evaluation of so many rows took so long."""
        size = rows.bit_length()
        self._recent_ns.setdefault(size, deque(maxlen=_AGREEING)).append(duration_ns)
        self._refusals[size] = 0

    def least_ns(self, rows: int) -> int:
        """Time that an evaluation of so many rows takes at least; 0 where that is not known."""
        recent = self._recent_ns.get(rows.bit_length(), ())
        return min(recent) if len(recent) == _AGREEING else 0

    def split(self, requests: Sequence[Request], now_ns: int) -> tuple[Sequence[Request], Sequence[Request]]:
        """Those that would be answered in time if they were evaluated together now, and those that would not."""
        if all(request.deadline_ns is None for request in requests):
            return requests, ()
        rows = sum(request.rows for request in requests)
        ready_ns = now_ns + self.least_ns(rows)
        if all(r.deadline_ns is not None and r.deadline_ns < ready_ns for r in requests):
            self._refusals[rows.bit_length()] += 1
            if self._refusals[rows.bit_length()] > _REFUSALS:
                ready_ns = now_ns
        in_time = [r for r in requests if r.deadline_ns is None or ready_ns <= r.deadline_ns]
        return in_time, [r for r in requests if r.deadline_ns is not None and ready_ns > r.deadline_ns]


def checked(policy: OnnxPolicy, arrays: Mapping[str, Any], noise: Any) -> dict[str, FloatArray]:
    """The policy's inputs, from a request's arrays; a prefix that it does not take is ignored.

    Raises:
        InvalidValueError: One is missing, has a wrong shape, or contains NaN or infinity.
    """
    prefix, mask = arrays.get(wire.PREFIX), arrays.get(wire.PREFIX_MASK)
    decided = () if not policy.takes_prefix or (prefix is None and mask is None) else (prefix, mask)
    if any(part is None for part in decided):
        raise InvalidValueError(f"{wire.PREFIX} and {wire.PREFIX_MASK} come together; one of them is missing")
    return policy.check(arrays, noise, *decided)


class Backlog:
    """Messages put off until no inference waits: those of one connection in the order in which they came, and the
    connections in turn."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[bytes, deque[list[Any]]] = OrderedDict()
        self._bytes: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, peer: bytes) -> bool:
        return peer in self._waiting

    def put(self, frames: list[Any]) -> bool:
        """Put a message off (its peer first); false where its connection has too much waiting already."""
        peer, size = frames[0], sum(map(len, frames))
        queue = self._waiting.setdefault(peer, deque())
        size += self._bytes.get(peer, 0)
        if queue and (len(queue) >= _MOST_WAITING or size > wire.MAX_MESSAGE_BYTES):
            return False
        queue.append(frames)
        self._bytes[peer] = size
        return True

    def take(self) -> list[Any]:
        """The next message; there has to be one."""
        peer, queue = self._waiting.popitem(last=False)
        frames = queue.popleft()
        if queue:
            self._waiting[peer] = queue
            self._bytes[peer] -= sum(map(len, frames))
        else:
            del self._bytes[peer]
        return frames


class TimeBudget:
    """Time that the server spends on a connection, besides inference: 2 % of it, and 10 ms at once."""

    def __init__(self) -> None:
        self._spent_ns: OrderedDict[bytes, tuple[float, int]] = OrderedDict()

    def charge(self, peer: bytes, duration_ns: int, now_ns: int) -> None:
        """So much time was spent on a message of this connection."""
        self._spent_ns[peer] = self._left_over(peer, now_ns) + duration_ns, now_ns
        self._spent_ns.move_to_end(peer)
        if len(self._spent_ns) > _KEPT:
            self._spent_ns.popitem(last=False)

    def exceeded(self, peer: bytes, now_ns: int) -> bool:
        """True if the connection has to wait for its turn."""
        return peer in self._spent_ns and self._left_over(peer, now_ns) > _BURST_NS

    def _left_over(self, peer: bytes, now_ns: int) -> float:
        spent_ns, at_ns = self._spent_ns.get(peer, (0.0, now_ns))
        return max(0.0, spent_ns - _SHARE * (now_ns - at_ns))
