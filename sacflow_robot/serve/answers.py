"""Answers of the policy server on their way, and those that nobody took."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import zmq

from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve.batching import Request
from sacflow_robot.serve.metrics import Meters
from sacflow_robot.serve.session import Session, describe
from sacflow_robot.spec import FloatArray

_REMEMBERED = 1024
_NOBLOCK = int(zmq.NOBLOCK)


class Answers:
    """Sends answers at once or not at all: a client that does not take its own holds up nobody.

    Args:
        socket: The server's ROUTER.
        meters: Where to count those dropped.
    """

    def __init__(self, socket: zmq.Socket[bytes], meters: Meters) -> None:
        self._socket, self._meters = socket, meters
        self._unreachable: Counter[bytes] = Counter()  # answers that found their connection gone, since the last count
        self._before: Counter[bytes] = Counter()  # and before it: by now a goodbye has been read
        self._polite: deque[bytes] = deque(maxlen=_REMEMBERED)

    def actions(
        self, request: Request, actions: FloatArray, batch: int, times_ns: tuple[int, int, int], now_ns: int
    ) -> None:
        """Send the actions (B, H, A) of a request that was evaluated among ``batch`` rows.

        Args:
            request: The request.
            actions: Its actions.
            batch: Rows evaluated together.
            times_ns: Time in the queue, of the evaluation, and altogether (ns).
            now_ns: Present time of the server's clock (ns).
        """
        queue, infer, total = times_ns
        header = {
            "id": request.identifier,
            "ok": True,
            "policy_version": request.policy.version,
            "seed": request.seed,
            "step": request.step,
            "batch": batch,
            "timings_us": {"queue": queue / 1e3, "infer": infer / 1e3, "total": total / 1e3},
            "server_ns": now_ns,
        }
        self.send(request.peer, header, {"actions": actions})

    def refuse(self, peer: bytes, identifier: int | None, session: Session | None, error: Exception) -> None:
        """Send why a request is not met, and count it, for its session, too."""
        kind, message, more = describe(error)
        if kind == "late":
            self._meters.late()
        else:
            self._meters.refused(kind)
        if session is not None:
            session.late += kind == "late"
            session.refused += kind != "late"
        failure = {"kind": kind, "message": message, **more}
        header = {"id": identifier, "ok": False, "error": failure, "server_ns": time.monotonic_ns()}
        self.send(peer, header, {})

    def send(self, peer: bytes, header: dict[str, Any], arrays: dict[str, Any]) -> None:
        """Send an answer of the protocol over the connection ``peer``."""
        self.send_frames(peer, wire.encode(wire.Message(header, arrays)))

    def send_frames(self, peer: bytes, frames: Sequence[bytes | memoryview]) -> None:
        """Send these frames over the connection ``peer``."""
        try:
            wire.send(self._socket, [peer, *frames], _NOBLOCK)
        except zmq.Again:
            self._meters.dropped()  # it does not take its answers
        except zmq.ZMQError:
            self._unreachable[peer] += 1  # it is gone; perhaps with a goodbye, which is still to be read

    def said_goodbye(self, peer: bytes) -> None:
        """The client of this connection has left: answers that it did not wait for were of no use to it."""
        self._polite.append(peer)

    def count_dropped(self) -> None:
        """Count the answers of late that found their client gone without a goodbye."""
        for peer, answers in self._before.items():
            for _ in range(0 if peer in self._polite else answers):
                self._meters.dropped()
        self._before, self._unreachable = self._unreachable, Counter()
