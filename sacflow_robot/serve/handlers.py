"""Answers of the policy server on their way, and what it answers to requests that need no inference: opening and closing
sessions, starting episodes, looking at the server."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import zmq

from sacflow_robot import __version__
from sacflow_robot.errors import InvalidValueError, WireError
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve.batching import Request
from sacflow_robot.serve.metrics import Meters
from sacflow_robot.serve.session import Refusal, Session, Sessions, checked_seed
from sacflow_robot.spec import FloatArray

_LOG = logging.getLogger(__name__)
_REMEMBERED = 1024
_MOST_LISTED = 64
_STATUS_NS = 100_000_000  # how long a look at the server is good for
_LOG_NS = 100_000_000


class Answers:
    """Sends answers at once or not at all: a client that does not take its own holds up nobody."""

    def __init__(self, socket: zmq.Socket[bytes], meters: Meters) -> None:
        self._socket, self._meters = socket, meters
        self._unreachable: Counter[bytes] = Counter()  # answers that found their connection gone, since the last count
        self._before: Counter[bytes] = Counter()  # and before it: by now a goodbye has been read
        self.polite: deque[bytes] = deque(maxlen=_REMEMBERED)  # those whose clients said goodbye, and want no answers

    def actions(
        self, request: Request, actions: FloatArray, batch: int, times_ns: tuple[int, int, int], now_ns: int
    ) -> None:
        """Send the actions (B, H, A) of a request that was evaluated among ``batch`` rows.

        Args:
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
        more: dict[str, Any] = {}
        if isinstance(error, Refusal):
            kind, message, more = error.kind, str(error), error.fields
        elif isinstance(error, WireError):
            kind, message = "malformed", str(error)
        elif isinstance(error, InvalidValueError):
            kind, message = "invalid", str(error)
        else:
            _LOG.error("request failed", exc_info=error)
            kind, message = "internal", "the server could not answer this request; its log says why"
        self._meters.refused(kind)
        if session is not None:
            session.late += kind == "late"
            session.refused += kind != "late"
        failure = {"kind": kind, "message": message, **more}
        self.send(peer, {"id": identifier, "ok": False, "error": failure, "server_ns": time.monotonic_ns()})

    def send(self, peer: bytes, header: dict[str, Any], arrays: dict[str, Any] | None = None) -> None:
        self.send_frames(peer, wire.encode(wire.Message(header, arrays or {})))

    def send_frames(self, peer: bytes, frames: Sequence[bytes | memoryview]) -> None:
        try:
            wire.send(self._socket, [peer, *frames], wire.NOBLOCK)
        except zmq.Again:
            self._meters.dropped()  # it does not take its answers
        except zmq.ZMQError:
            self._unreachable[peer] += 1  # it is gone; perhaps with a goodbye, which is still to be read

    def count_dropped(self) -> None:
        """Count recent answers whose client was gone without a goodbye."""
        for peer, answers in self._before.items():
            if peer not in self.polite:
                self._meters.dropped(answers)
        self._before, self._unreachable = self._unreachable, Counter()


class Server(Protocol):
    """State of a server that answers report; :class:`~sacflow_robot.serve.server.PolicyServer` is one."""

    policy: OnnxPolicy
    sessions: Sessions
    meters: Meters
    server_id: str

    @property
    def stopping(self) -> bool: ...


class Operations:
    """Answers requests that need no inference; each takes a request's header and returns the fields of its answer."""

    def __init__(self, server: Server, heartbeat_s: float, max_rows: int) -> None:
        self._server, self._heartbeat_s, self._max_rows = server, heartbeat_s, max_rows
        self._status_ns, self._last_status = 0, dict[str, Any]()
        self._described = (
            "",
            "",
        )  # a policy's fingerprint, and its specification, which takes longer to make than to send
        self._logged_ns, self._unlogged = 0, 0
        self._handlers: dict[str, Callable[[dict[str, Any], bytes], dict[str, Any]]] = {
            "hello": self._hello,
            "episode": self._episode,
            "ping": self._ping,
            "status": self._status,
            "bye": self._bye,
        }

    def answer(self, operation: object, header: dict[str, Any], peer: bytes) -> dict[str, Any]:
        """The fields of the answer to a request that came over the connection ``peer``.

        Raises:
            WireError: There is no such operation.
            Refusal: The request cannot be met.
        """
        handler = self._handlers.get(operation) if isinstance(operation, str) else None
        if handler is None:
            raise WireError(f"unknown op; valid: infer, {', '.join(self._handlers)}")
        return handler(header, peer)

    def _hello(self, header: dict[str, Any], peer: bytes) -> dict[str, Any]:
        if self._server.stopping:
            raise Refusal("draining", "this server is stopping")
        policy, now_ns = self._server.policy, time.monotonic_ns()
        session = self._server.sessions.open(header, policy, now_ns, peer)
        policy = session.policy or policy
        self._log_connected(session, now_ns)
        if self._described[0] != policy.fingerprint:
            self._described = policy.fingerprint, policy.spec.to_json()
        return {
            "session": session.token,
            "seed": session.seed,
            "server_id": self._server.server_id,
            "server_version": __version__,
            "heartbeat_s": self._heartbeat_s,
            "max_rows": self._max_rows,
            "takes_prefix": policy.takes_prefix,
            "spec": self._described[1],
            "fingerprint": policy.fingerprint,
            "policy_version": policy.version,
        }

    def _log_connected(self, session: Session, now_ns: int) -> None:
        """Ten lines a second at most: a slow reader of the log must not hold up the loop."""
        if now_ns - self._logged_ns < _LOG_NS:
            self._unlogged += 1
            return
        more = {"others": self._unlogged} if self._unlogged else {}
        self._logged_ns, self._unlogged = now_ns, 0
        _LOG.info("client connected", extra={"client": session.client, "session": session.token[:4], **more})

    def _episode(self, header: dict[str, Any], peer: bytes) -> dict[str, Any]:
        """A new episode begins: the noise starts anew, and a session that held on to its policy gets the newest."""
        session = self._server.sessions.find(header, time.monotonic_ns())
        session.seed, session.step = checked_seed(header.get("seed")), 0
        if session.policy is not None:
            session.policy = self._server.policy
        policy = session.policy or self._server.policy
        return {"seed": session.seed, "policy_version": policy.version, "fingerprint": policy.fingerprint}

    def _ping(self, header: dict[str, Any], peer: bytes) -> dict[str, Any]:
        if "session" in header:
            self._server.sessions.find(header, time.monotonic_ns())
        return {"server_id": self._server.server_id, "policy_version": self._server.policy.version}

    def _status(self, header: dict[str, Any], peer: bytes) -> dict[str, Any]:
        now_ns = time.monotonic_ns()
        replaced = self._server.meters.last_reload is not self._last_status.get("last_reload")
        if replaced or now_ns - self._status_ns > _STATUS_NS:
            self._status_ns, self._last_status = now_ns, self._look(now_ns)
        return self._last_status

    def _look(self, now_ns: int) -> dict[str, Any]:
        active = self._server.sessions.active(now_ns)
        clients = [
            {"client": s.client, "requests": s.requests, "late": s.late, "refused": s.refused}
            for s in active[:_MOST_LISTED]
        ]
        spec, policy = self._server.policy.spec, self._server.policy
        about = {"policy_version": policy.version, "velocity": spec.velocity, "task": spec.robot.task}
        return {**about, "engine": str(policy.engine), "clients": clients, **self._server.meters.snapshot()}

    def _bye(self, header: dict[str, Any], peer: bytes) -> dict[str, Any]:
        self._server.sessions.close(self._server.sessions.find(header, time.monotonic_ns()))
        return {}
