"""Client of the policy server; a ``Policy`` like a local one."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import zmq
from zmq.utils.monitor import recv_monitor_message

from sacflow_robot.errors import (
    DataError,
    LateError,
    RefusedError,
    ServerError,
    ServerGoneError,
    ServerRestartedError,
    SpecMismatchError,
    UsageError,
    WireError,
)
from sacflow_robot.serve import wire
from sacflow_robot.serve.security import load_public, load_secret
from sacflow_robot.spec import ArmSpec, FloatArray, Observation, PolicySpec

_GONE = zmq.Event.DISCONNECTED
_BARRED = zmq.Event.HANDSHAKE_FAILED_AUTH | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
_CLOCK_MEMORY = 32
_BYE_MS = 50


@dataclass(frozen=True)
class Keys:
    """What a client needs where the server asks for keys.

    Attributes:
        own: The client's secret key file.
        server: The server's public key file.
    """

    own: Path
    server: Path


class PolicyClient:
    """Connects to a policy server and learns what it serves.

    A connection that was lost is made again, with a new session, by the next call.

    Args:
        address: The server's address, e.g. ``tcp://127.0.0.1:5555``.
        timeout_s: Longest wait for any one answer.
        expect: The arm that the policy has to fit, or any part of a ``PolicySpec`` as plain data; the server refuses a
            client that expects something else.
        deadline_s: What is later than this is of no use: the server answers ``late`` instead. None for no deadline.
        swap: When a new policy file on the server takes effect here: ``"now"``, or at the next ``"episode"``.
        name: What the server calls this client in its tables.
        keys: Keys, where the server asks for them.

    Raises:
        ServerError: Nobody answers there in time, or what answers is no policy server.
        SpecMismatchError: The policy served is not what was expected; names the fields.
    """

    def __init__(
        self,
        address: str,
        timeout_s: float = 2.0,
        *,
        expect: ArmSpec | Mapping[str, Any] | None = None,
        deadline_s: float | None = None,
        swap: str = "now",
        name: str = "python",
        keys: Keys | None = None,
    ) -> None:
        self.address, self._timeout_s, self._deadline_s = address, timeout_s, deadline_s
        plain = {"arm": json.loads(expect.to_json())} if isinstance(expect, ArmSpec) else expect
        self._introduction = {"expect": plain, "swap": swap, "client": name}
        self._ids = itertools.count(1)
        self._session: str | None = None
        self._clock: list[tuple[int, int]] = []
        self._sent_ns: dict[int, int] = {}
        self.last_header: Mapping[str, Any] = {}
        self.policy_version = ""
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        try:
            self._open(keys)
            self._hello()
        except BaseException:
            self.close()
            raise

    @property
    def spec(self) -> PolicySpec:
        return self._spec

    @property
    def connected(self) -> bool:
        """Whether the server is there, as far as heartbeats tell: false within two of them after it has gone."""
        self._watch_connection()
        return self._session is not None

    def infer(self, observation: Observation, noise: FloatArray | None = None) -> FloatArray:
        """Action chunks (B, H, A) for observations (B, ...) and noise (B, H, A).

        Without noise the server draws it from this session's stream; ``last_header`` tells its seed and step.

        Raises:
            LateError: The answer would have come after the deadline.
            RefusedError: The server refused the request; the message says why.
            ServerGoneError: The connection is lost, or there was no answer in time. The next call connects anew.
            ServerRestartedError: The server is a new process. The next call starts a session with it.
        """
        return self.collect(self.ask(observation, noise))

    def ask(self, observation: Observation, noise: FloatArray | None = None, deadline_s: float | None = None) -> int:
        """Send a request and return its number, without waiting for the answer; see :meth:`infer` and :meth:`collect`."""
        if self._session is None:
            self._hello()
        arrays = observation if noise is None else {**observation, "noise": noise}
        header: dict[str, Any] = {"op": "infer", "session": self._session}
        limit = self._deadline_s if deadline_s is None else deadline_s
        if limit is not None:
            header["deadline_ns"] = time.monotonic_ns() + round(limit * 1e9) + self._server_ahead_ns()
        return self._send(header, arrays)

    def collect(self, number: int, wait_s: float | None = None) -> FloatArray:
        """The actions (B, H, A) that request ``number`` asked for; raises what :meth:`infer` does.

        Args:
            number: What :meth:`ask` returned. Answers to earlier requests are dropped.
            wait_s: Longest wait; 0 to look only, which raises TimeoutError where the answer is not there yet.
        """
        reply = self._await(number, wait_s)
        actions = reply.arrays.get("actions")
        if actions is None or actions.ndim != 3 or actions.shape[1:] != self._spec.noise_shape:
            raise ServerError(f"{self.address} answered without actions of shape (B, *{self._spec.noise_shape})")
        self.policy_version = str(reply.header.get("policy_version"))
        return actions

    def begin_episode(self, seed: int | None = None) -> str:
        """Tell the server that an episode begins; returns the version of the policy that it will be run with.

        The noise stream starts anew from ``seed``, and a swap put off to the next episode takes place.

        Raises:
            ServerError: As :meth:`infer`.
        """
        if self._session is None:
            self._hello()
        reply = self._request({"op": "episode", "session": self._session, "seed": seed})
        self.policy_version = str(reply.header.get("policy_version"))
        if reply.header.get("fingerprint") != self._spec.fingerprint:
            self._hello()
        return self.policy_version

    def status(self) -> Mapping[str, Any]:
        """What the server counts; see ``docs/protocol.md``."""
        return self._request({"op": "status"}).header

    def close(self) -> None:
        """Say goodbye, as far as somebody listens."""
        if self._session is not None:
            with contextlib.suppress(ServerError, zmq.ZMQError):
                self._send({"op": "bye", "session": self._session}, {})
        self._session = None
        if not self._context.closed:
            self._socket.disable_monitor()
            self._context.destroy(linger=_BYE_MS)

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # ---- connection and session

    def _open(self, keys: Keys | None) -> None:
        socket = self._socket
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES),
            (zmq.IMMEDIATE, 1),  # nothing is kept for a server that is not there
            (zmq.RECONNECT_IVL, 50),
            (zmq.RECONNECT_IVL_MAX, 1000),
        ):
            socket.setsockopt(option, value)
        self._set_heartbeat(0.5)
        if keys is not None:
            socket.curve_publickey, socket.curve_secretkey = load_secret(keys.own)
            socket.curve_serverkey = load_public(keys.server)
        self._monitor = socket.get_monitor_socket(_GONE | _BARRED)
        try:
            socket.connect(self.address)
        except zmq.ZMQError as error:
            raise UsageError(f"cannot connect to {self.address}: {error}; expected e.g. tcp://127.0.0.1:5555") from None

    def _set_heartbeat(self, seconds: float) -> None:
        milliseconds = max(1, round(seconds * 1e3))
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, milliseconds)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, milliseconds)
        self._socket.setsockopt(zmq.HEARTBEAT_TTL, 2 * milliseconds)
        self._slice_ms = max(1, min(milliseconds, round(self._timeout_s * 1e3)))
        self._socket.setsockopt(zmq.RCVTIMEO, self._slice_ms)

    def _hello(self) -> None:
        """Start a session."""
        self._session = None
        self._clock.clear()
        self._sent_ns.clear()
        deadline = time.monotonic() + self._timeout_s
        while not self._socket.poll(min(50, self._slice_ms), zmq.POLLOUT):
            if self._watch_connection() & _BARRED:
                raise RefusedError(f"{self.address} does not let this client in; does it know this client's key?")
            if time.monotonic() > deadline:
                raise self._no_answer()
        self._watch_connection()
        reply = self._request({"op": "hello", **self._introduction})
        try:
            self._spec = PolicySpec.from_json(reply.header["spec"])
            self.policy_version = str(reply.header["policy_version"])
            self._session = str(reply.header["session"])
        except (KeyError, TypeError, DataError) as error:
            raise ServerError(f"{self.address} did not introduce itself as a policy server: {error}") from None

    def _watch_connection(self) -> int:
        """Events of the connection since the last look; a session ends with its connection."""
        seen = 0
        while self._monitor.poll(0):
            seen |= recv_monitor_message(self._monitor)["event"]
        if seen:
            self._session = None
        return seen

    def _no_answer(self) -> ServerGoneError:
        return ServerGoneError(
            f"no answer from {self.address} within {self._timeout_s:g} s; is a server running there? "
            "Start one with 'sacflow-robot serve --policy FILE'"
        )

    # ---- requests and answers

    def _request(self, header: Mapping[str, Any]) -> wire.Message:
        return self._await(self._send(header, {}), None)

    def _send(self, header: Mapping[str, Any], arrays: Mapping[str, Any]) -> int:
        number = next(self._ids)
        frames = wire.encode(wire.Message({**header, "id": number}, arrays))
        self._sent_ns[number] = time.monotonic_ns()
        try:
            wire.send(self._socket, frames, zmq.NOBLOCK)
        except zmq.Again:
            self._session = None
            self._watch_connection()
            raise ServerGoneError(f"{self.address} is gone; nothing was sent") from None
        return number

    def _await(self, number: int, wait_s: float | None) -> wire.Message:
        give_up = time.monotonic() + (self._timeout_s if wait_s is None else wait_s)
        while True:
            try:
                frames = wire.receive(self._socket, zmq.NOBLOCK if wait_s == 0 else 0)
            except zmq.Again:
                if self._watch_connection() & _GONE:
                    raise ServerGoneError(
                        f"the connection to {self.address} is lost; what was asked is lost too"
                    ) from None
                if time.monotonic() < give_up:
                    continue
                if wait_s is not None:
                    raise TimeoutError from None
                self._session = None
                raise self._no_answer() from None
            try:
                reply = wire.decode(frames)
            except WireError as error:
                raise ServerError(f"{self.address} does not speak the protocol: {error}") from None
            identifier = reply.header.get("id")
            if identifier is None or identifier == number:
                self._note_clock(number, reply.header)
                self.last_header = reply.header
                if reply.header.get("ok") is not True:
                    raise self._failure(reply.header.get("error"))
                return reply

    def _failure(self, error: object) -> ServerError | SpecMismatchError:
        kind, message = (error.get("kind"), error.get("message")) if isinstance(error, dict) else (None, None)
        reason = message or "it gave no reason"
        if kind == "late":
            return LateError(f"{self.address}: {reason}")
        if kind == "mismatch":
            return SpecMismatchError(f"{self.address}: {reason}")
        if kind == "session":
            self._session = None
            return ServerRestartedError(
                f"{self.address} was restarted; nothing asked before counts any more, ask again"
            )
        return RefusedError(f"{self.address} refused the request: {reason}")

    def _note_clock(self, number: int, header: Mapping[str, Any]) -> None:
        """Learn how far the server's clock is ahead of ours, less the way back: what leaves the server by
        ``ours + ahead`` is here by ``ours``. The quickest of the last answers tells best."""
        now = time.monotonic_ns()
        sent, theirs = self._sent_ns.get(number, now), header.get("server_ns")
        self._sent_ns.clear()  # older answers do not count any more
        if type(theirs) is int:
            self._clock.append((now - sent, theirs - now))
            del self._clock[:-_CLOCK_MEMORY]

    def _server_ahead_ns(self) -> int:
        return min(self._clock)[1]


def as_batch(observation: Observation) -> dict[str, FloatArray]:
    """One observation as a batch of one."""
    return {key: np.asarray(array)[None] for key, array in observation.items()}
