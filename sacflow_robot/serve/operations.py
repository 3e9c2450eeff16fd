"""Requests that need no inference: opening and closing sessions, starting episodes, looking at the server."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sacflow_robot import __version__
from sacflow_robot.errors import WireError
from sacflow_robot.serve.batch import takes_prefix
from sacflow_robot.serve.session import Refusal, checked_seed

if TYPE_CHECKING:
    from sacflow_robot.serve.server import PolicyServer

_LOG = logging.getLogger(__name__)
_MOST_LISTED = 64


class Operations:
    """Answers them; each takes a request's header and returns the fields of its answer.

    Args:
        server: The server asked.
        heartbeat_s: Its time between heartbeats.
        max_rows: Rows of one request at most.
    """

    def __init__(self, server: PolicyServer, heartbeat_s: float, max_rows: int) -> None:
        self._server, self._heartbeat_s, self._max_rows = server, heartbeat_s, max_rows
        self._handlers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "hello": self._hello,
            "episode": self._episode,
            "ping": self._ping,
            "status": self._status,
            "bye": self._bye,
        }

    def answer(self, operation: object, header: dict[str, Any]) -> dict[str, Any]:
        """The fields of the answer.

        Raises:
            WireError: There is no such operation.
            Refusal: The request cannot be met.
        """
        handler = self._handlers.get(operation) if isinstance(operation, str) else None
        if handler is None:
            raise WireError(f"unknown op; valid: infer, {', '.join(self._handlers)}")
        return handler(header)

    def _hello(self, header: dict[str, Any]) -> dict[str, Any]:
        if self._server.stopping:
            raise Refusal("draining", "this server is stopping")
        policy = self._server.policy
        session = self._server.sessions.open(header, policy, time.monotonic_ns())
        policy = session.policy or policy
        _LOG.info("client connected", extra={"client": session.client, "session": session.token[:4]})
        return {
            "session": session.token,
            "seed": session.seed,
            "server_id": self._server.server_id,
            "server_version": __version__,
            "heartbeat_s": self._heartbeat_s,
            "max_rows": self._max_rows,
            "takes_prefix": takes_prefix(policy),
            "spec": policy.spec.to_json(),
            "fingerprint": policy.fingerprint,
            "policy_version": policy.version,
        }

    def _episode(self, header: dict[str, Any]) -> dict[str, Any]:
        """A new episode begins: the noise starts anew, and a session that held on to its policy gets the newest."""
        session = self._server.sessions.find(header, time.monotonic_ns())
        session.seed, session.step = checked_seed(header.get("seed")), 0
        if session.policy is not None:
            session.policy = self._server.policy
        policy = session.policy or self._server.policy
        return {"seed": session.seed, "policy_version": policy.version, "fingerprint": policy.fingerprint}

    def _ping(self, header: dict[str, Any]) -> dict[str, Any]:
        if "session" in header:
            self._server.sessions.find(header, time.monotonic_ns())
        return {"server_id": self._server.server_id, "policy_version": self._server.policy.version}

    def _status(self, header: dict[str, Any]) -> dict[str, Any]:
        active = self._server.sessions.active(time.monotonic_ns())
        clients = [
            {"client": s.client, "requests": s.requests, "late": s.late, "refused": s.refused}
            for s in active[:_MOST_LISTED]
        ]
        spec, policy = self._server.policy.spec, self._server.policy
        about = {"policy_version": policy.version, "velocity": spec.velocity, "task": spec.arm.task}
        return {**about, "engine": str(policy.engine), "clients": clients, **self._server.meters.snapshot()}

    def _bye(self, header: dict[str, Any]) -> dict[str, Any]:
        self._server.sessions.close(self._server.sessions.find(header, time.monotonic_ns()))
        return {}
