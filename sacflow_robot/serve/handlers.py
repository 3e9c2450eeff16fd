"""Requests that need no inference: opening and closing sessions, starting episodes, looking at the server."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

from sacflow_robot import __version__
from sacflow_robot.errors import WireError
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.serve.metrics import Meters
from sacflow_robot.serve.session import Refusal, Session, Sessions, checked_seed

_LOG = logging.getLogger(__name__)
_MOST_LISTED = 64
_STATUS_NS = 100_000_000  # how long a look at the server is good for
_LOG_NS = 100_000_000


class Server(Protocol):
    """State of a server that answers report; :class:`~sacflow_robot.serve.server.PolicyServer` is one."""

    policy: OnnxPolicy
    sessions: Sessions
    meters: Meters
    server_id: str

    @property
    def stopping(self) -> bool: ...


class Operations:
    """Answers them; each takes a request's header and returns the fields of its answer.

    Args:
        server: The server asked.
        heartbeat_s: Its time between heartbeats.
        max_rows: Rows of one request at most.
    """

    def __init__(self, server: Server, heartbeat_s: float, max_rows: int) -> None:
        self._server, self._heartbeat_s, self._max_rows = server, heartbeat_s, max_rows
        self._status_ns, self._last_status = 0, dict[str, Any]()
        self._described = "", ""
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
        return {
            "session": session.token,
            "seed": session.seed,
            "server_id": self._server.server_id,
            "server_version": __version__,
            "heartbeat_s": self._heartbeat_s,
            "max_rows": self._max_rows,
            "takes_prefix": policy.takes_prefix,
            "spec": self._describe(policy),
            "fingerprint": policy.fingerprint,
            "policy_version": policy.version,
        }

    def _log_connected(self, session: Session, now_ns: int) -> None:
        """Ten lines a second at most: whoever reads the log must not hold up the loop."""
        if now_ns - self._logged_ns < _LOG_NS:
            self._unlogged += 1
            return
        more = {"others": self._unlogged} if self._unlogged else {}
        self._logged_ns, self._unlogged = now_ns, 0
        _LOG.info("client connected", extra={"client": session.client, "session": session.token[:4], **more})

    def _describe(self, policy: OnnxPolicy) -> str:
        """The specification as JSON, which takes longer to make than to send."""
        if self._described[0] != policy.fingerprint:
            self._described = policy.fingerprint, policy.spec.to_json()
        return self._described[1]

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
