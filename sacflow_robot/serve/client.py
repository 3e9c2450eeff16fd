"""Client of the policy server; a ``Policy`` like a local one."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from sacflow_robot.errors import (
    DataError,
    InvalidValueError,
    LateError,
    RefusedError,
    ServerError,
    ServerGoneError,
    ServerRestartedError,
    SpecMismatchError,
    UsageError,
    WireError,
)
from sacflow_robot.policyfile import NOISE
from sacflow_robot.serve import wire
from sacflow_robot.serve.connection import Connection, Keys
from sacflow_robot.serve.server_clock import ServerClock
from sacflow_robot.spec import ArmSpec, FloatArray, Observation, PolicySpec

__all__ = ["Keys", "PolicyClient", "as_batch"]

_BYE_MS = 50
_LOOK_S = 0.02  # between two looks for a reason to end a wait
_BEHIND_S = 0.01  # how long answers to earlier requests are still passed over when time is up
_FIRST_HEARTBEAT_S = 1.0
_HEARTBEATS_S = 0.001, 3600.0  # that a server may ask for
_LONGEST_S = 1e6


class PolicyClient:
    """Connects to a policy server and learns what it serves.

    A connection that was lost is made again by the next call. A server that still knows the session goes on with it; a new
    one opens a session with the same expectations, and the stream of noise goes on where it was, also within an episode.
    For one thread at a time, and for the process that made it: a forked one makes its own.

    Args:
        address: The server's address, e.g. ``tcp://127.0.0.1:5555``.
        timeout_s: Longest wait for any one answer.
        expect: The arm that the policy has to fit, or any part of a ``PolicySpec`` as plain data; the server refuses a
            client that expects something else.
        deadline_s: What is later than this is of no use: the server answers ``late`` instead. None for no deadline.
        swap: When a new policy file on the server takes effect here: ``"now"``, or at the next ``"episode"``.
        name: What the server calls this client in its tables.
        keys: Keys, where the server asks for them.

    Attributes:
        interrupted: Asked every 20 ms while actions are waited for; the wait ends with a ServerError once it is true.

    Raises:
        ServerError: Nobody answers there in time, or what answers is no policy server.
        SpecMismatchError: The policy served is not what was expected; names the fields.
        UsageError: The address is malformed, or a time is none.
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
        if not 0 < timeout_s <= _LONGEST_S:
            raise UsageError(f"timeout_s is {timeout_s}; it must be above 0 and at most {_LONGEST_S:g}")
        _check_deadline(deadline_s)
        self.address, self._timeout_s, self._deadline_s = address, timeout_s, deadline_s
        plain = {"arm": json.loads(expect.to_json())} if isinstance(expect, ArmSpec) else expect
        self._introduction = {"op": "hello", "expect": plain, "swap": swap, "client": name}
        self._keys = keys
        self.interrupted: Callable[[], bool] | None = None
        self._ids = itertools.count(1)
        self._session: str | None = None
        self._linked, self._greeting, self._closed = False, 0, False
        self._process = os.getpid()
        self._seed: int | None = None
        self._step = 0
        self._clock = ServerClock()
        self.last_header: Mapping[str, Any] = {}
        self.policy_version, self.takes_prefix = "", False
        self._connection = Connection(address, _FIRST_HEARTBEAT_S, keys)
        try:
            self._link(timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def spec(self) -> PolicySpec:
        return self._spec

    @property
    def connected(self) -> bool:
        """Whether the server is there, as far as heartbeats tell: false within two of them after it has gone."""
        if self._is_open:
            self._look()
        return self._is_open and self._linked

    def infer(
        self,
        observation: Observation,
        noise: FloatArray | None = None,
        prefix: FloatArray | None = None,
        prefix_mask: FloatArray | None = None,
    ) -> FloatArray:
        """Action chunks (B, H, A) for observations (B, ...) and noise (B, H, A).

        Without noise the server draws it from this client's stream; ``last_header`` tells its seed and step. ``prefix``
        (B, H, A) are actions already decided, where ``prefix_mask`` (B, H) is 1; see ``takes_prefix``.

        Raises:
            LateError: The answer would have come after the deadline.
            InvalidValueError, WireError: The request cannot be sent: half a prefix, a dtype or size that does not travel.
            RefusedError: The server refused the request; the message says why.
            ServerGoneError: The connection is lost, or there was no answer in time. The next call connects anew.
            ServerRestartedError: The server is a new process. The next call starts a session with it.
            SpecMismatchError: It was restarted with another policy, which is not what was expected.
        """
        self._link(self._timeout_s)
        return self.collect(self._ask(observation, noise, self._deadline_s, prefix, prefix_mask))

    def ask(
        self,
        observation: Observation,
        noise: FloatArray | None = None,
        deadline_s: float | None = None,
        *,
        prefix: FloatArray | None = None,
        prefix_mask: FloatArray | None = None,
    ) -> int:
        """Send a request and return its number, waiting for nothing; see :meth:`infer` and :meth:`collect`.

        Raises:
            ServerGoneError: There is no connection at this moment; nothing was sent. Ask again.
            SpecMismatchError: As :meth:`infer`.
        """
        _check_deadline(deadline_s)
        self._link(0)
        limit_s = self._deadline_s if deadline_s is None else deadline_s
        return self._ask(observation, noise, limit_s, prefix, prefix_mask)

    def collect(self, number: int, wait_s: float | None = None) -> FloatArray:
        """The actions (B, H, A) that request ``number`` asked for; raises what :meth:`infer` does.

        Args:
            number: What :meth:`ask` returned. Answers to earlier requests are dropped.
            wait_s: Longest wait; 0 to look only, which raises TimeoutError where the answer is not there yet.

        Raises:
            ServerError: As :meth:`infer`; or ``interrupted`` ended the wait.
        """
        reply = self._await(number, wait_s, self.interrupted)
        actions = reply.arrays.get("actions")
        chunk = self._spec.noise_shape
        shape = () if actions is None or actions.dtype != np.float32 else actions.shape
        if actions is None or len(shape) != 3 or not shape[0] or shape[1:] != chunk:
            raise ServerError(f"{self.address} answered without float32 actions of shape (B, {chunk[0]}, {chunk[1]})")
        self.policy_version = str(reply.header.get("policy_version"))
        return actions

    def keep_alive(self) -> None:
        """Take a step towards a session on a connection that stands, waiting for nothing: well under a millisecond.

        For a caller that asks for nothing at the moment, several times a second: a server that is restarted meanwhile is
        greeted anew, so that the next :meth:`ask` finds it. A server that is gone, or lets nobody in yet, is no error here.

        Raises:
            SpecMismatchError: It was restarted with another policy, which is not what was expected.
        """
        with contextlib.suppress(ServerError):
            self._link(0)

    def begin_episode(self, seed: int | None = None) -> str:
        """Tell the server that an episode begins; returns the version of the policy that it will be run with.

        The noise stream starts anew from ``seed``, and a swap put off to the next episode takes place.

        Raises:
            ServerError: As :meth:`infer`.
        """
        self._link(self._timeout_s)
        reply = self._request({"op": "episode", "session": self._session, "seed": seed})
        self.policy_version = str(reply.header.get("policy_version"))
        self._seed, self._step = reply.header.get("seed"), 0
        if reply.header.get("fingerprint") != self._spec.fingerprint:
            self._linked = False
            self._link(self._timeout_s)
        return self.policy_version

    def status(self) -> Mapping[str, Any]:
        """What the server counts; see ``docs/protocol.md``."""
        self._link(self._timeout_s)
        return self._request({"op": "status"}).header

    def close(self) -> None:
        """Say goodbye, as far as somebody listens."""
        if self._is_open:
            if self._linked:
                with contextlib.suppress(ServerError):
                    self._send({"op": "bye", "session": self._session}, {})
            self._connection.close(_BYE_MS)
        self._closed = True

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # ---- session

    def _link(self, wait_s: float) -> None:
        """Have a session on a connection that stands, waiting so long at most.

        Raises:
            ServerError, SpecMismatchError: There is none.
            UsageError: This client is closed.
        """
        self._check_open()
        self._look()
        deadline = time.monotonic() + wait_s
        while not self._linked:
            self._greet(max(0.0, deadline - time.monotonic()))

    def _greet(self, wait_s: float) -> None:
        """Say hello, or go on waiting for the answer to it."""
        deadline = time.monotonic() + wait_s
        if not self._greeting:
            if not self._connection.ready(wait_s):
                raise self._no_answer() if wait_s else self._lost()
            self._connection.broken()  # what was before this connection
            self._clock.forget()
            self._greeting = self._send({**self._introduction, "session": self._session, "seed": self._seed}, {})
        try:
            reply = self._await(self._greeting, max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            if wait_s or self._clock.since_s(self._greeting) > self._timeout_s:
                self._greeting = 0
            raise (self._no_answer() if wait_s else self._lost()) from None
        except (ServerError, SpecMismatchError):
            self._greeting = 0
            raise
        self._greeting = 0
        try:
            self._spec = PolicySpec.from_json(reply.header["spec"])
            self.policy_version, session = str(reply.header["policy_version"]), str(reply.header["session"])
            seed, heartbeat_s = int(reply.header["seed"]), float(reply.header["heartbeat_s"])
            if not _HEARTBEATS_S[0] <= heartbeat_s <= _HEARTBEATS_S[1]:
                raise ValueError(f"a heartbeat of {heartbeat_s} s cannot be kept")
        except (KeyError, TypeError, ValueError, OverflowError, DataError) as error:
            raise ServerError(f"{self.address} did not introduce itself as a policy server: {error}") from None
        self.takes_prefix = reply.header.get("takes_prefix") is True
        self._session, self._seed = session, seed if self._seed is None else self._seed
        self._linked = heartbeat_s == self._connection.heartbeat_s
        if not self._linked:  # ZeroMQ takes the period for a connection when it begins
            self._connect(heartbeat_s)

    def _connect(self, heartbeat_s: float) -> None:
        """Replace the connection by a new one."""
        self._connection.close()
        self._connection = Connection(self.address, heartbeat_s, self._keys)
        self._linked = False
        self._greeting = 0

    def _look(self) -> bool:
        """See whether the connection was lost since the last look; if so, it has to be greeted again."""
        if not self._connection.broken():
            return False
        self._linked, self._greeting = False, 0
        return True

    @property
    def _is_open(self) -> bool:
        """Whether it was not closed, and this is the process that made it: a forked one shares its parent's sockets."""
        return not self._closed and os.getpid() == self._process

    def _check_open(self) -> None:
        if not self._is_open:
            raise UsageError(f"this client of {self.address} is closed or of another process; make a new one")

    def _lost(self) -> ServerGoneError:
        return ServerGoneError(f"the connection to {self.address} is lost, and is being made again")

    def _no_answer(self) -> ServerGoneError:
        return ServerGoneError(
            f"no answer from {self.address} within {self._timeout_s:g} s; is a server running there? "
            "Start one with 'sacflow-robot serve --policy FILE'"
        )

    # ---- requests and answers

    def _request(self, header: dict[str, Any]) -> wire.Message:
        return self._await(self._send(header, {}), None)

    def _ask(
        self,
        observation: Observation,
        noise: FloatArray | None,
        deadline_s: float | None,
        prefix: FloatArray | None,
        prefix_mask: FloatArray | None,
    ) -> int:
        arrays = dict(observation)
        header: dict[str, Any] = {"op": "infer", "session": self._session}
        if noise is None:
            header["seed"], header["step"] = self._seed, self._step
        else:
            arrays[NOISE] = noise
        if (prefix is None) != (prefix_mask is None):
            raise InvalidValueError("prefix and prefix_mask go together; only one is given")
        if prefix is not None and prefix_mask is not None:
            arrays[wire.PREFIX], arrays[wire.PREFIX_MASK] = prefix, prefix_mask
        if deadline_s is not None:
            ahead_ns = self._clock.ahead_ns
            if ahead_ns is None:
                raise ServerError(f"{self.address} does not tell its clock, which a deadline has to be set by")
            header["deadline_ns"] = time.monotonic_ns() + round(deadline_s * 1e9) + ahead_ns
        number = self._send(header, arrays)
        self._step += noise is None
        return number

    def _send(self, header: dict[str, Any], arrays: Mapping[str, Any]) -> int:
        number = next(self._ids)
        header["id"] = number
        frames = wire.encode(wire.Message(header, arrays))
        if (largest := max(map(len, frames))) > wire.MAX_FRAME_BYTES:  # the server would hang up
            raise WireError(
                f"an array has {largest} bytes; one carries at most {wire.MAX_FRAME_BYTES}: send fewer rows"
            )
        self._clock.sent(number)
        try:
            self._connection.send(frames)
        except ServerGoneError:
            self._linked = False
            raise
        return number

    def _await(self, number: int, wait_s: float | None, interrupted: Callable[[], bool] | None = None) -> wire.Message:
        self._check_open()
        give_up = time.monotonic() + (self._timeout_s if wait_s is None else wait_s)
        while True:
            left_s = give_up - time.monotonic()
            frames = self._connection.receive(left_s if interrupted is None else min(left_s, _LOOK_S))
            if frames is None and interrupted is not None and interrupted():
                raise ServerError("the wait for an answer was ended by a person's request")
            if frames is not None:
                reply = self._decoded(frames)
                identifier = reply.header.get("id")
                if identifier is None or identifier == number:
                    break
            elif self._look():
                raise ServerGoneError(f"the connection to {self.address} is lost; what was asked is lost too")
            if time.monotonic() < give_up + (0.0 if frames is None else _BEHIND_S):
                continue
            if wait_s is not None:
                raise TimeoutError
            self._linked = False
            raise self._no_answer()
        self._clock.answered(number, reply.header.get("server_ns"))
        self.last_header = reply.header
        if reply.header.get("ok") is not True:
            raise self._failure(reply.header.get("error"))
        return reply

    def _decoded(self, frames: list[Any]) -> wire.Message:
        if frames[0] == wire.STOP_REFUSED:
            raise ServerError(
                f"{self.address} is where a robot listens for stops (run --estop); give the policy server's"
            )
        try:
            message = wire.decode(frames)
        except WireError as error:
            raise ServerError(f"{self.address} does not speak the protocol: {error}") from None
        if "op" in message.header:  # where nobody serves on a port yet, a system may connect a socket to itself
            self._connect(self._connection.heartbeat_s)
            raise ServerGoneError(f"a request to {self.address} came back; no server is running there")
        return message

    def _failure(self, error: object) -> ServerError | SpecMismatchError:
        kind, message = (error.get("kind"), error.get("message")) if isinstance(error, dict) else (None, None)
        reason = message or "it gave no reason"
        if kind == "late":
            return LateError(f"{self.address}: {reason}")
        if kind == "mismatch":
            return SpecMismatchError(f"{self.address}: {reason}")
        if kind == "session":
            self._linked = False
            return ServerRestartedError(
                f"{self.address} was restarted; nothing asked before counts any more, ask again"
            )
        return RefusedError(f"{self.address} refused the request: {reason}")


def _check_deadline(deadline_s: float | None) -> None:
    if deadline_s is not None and not math.isfinite(deadline_s):
        raise UsageError(f"deadline_s is {deadline_s}; give a number of seconds, or None for no deadline")


def as_batch(observation: Observation) -> dict[str, FloatArray]:
    """One observation as a batch of one."""
    return {key: np.asarray(array)[None] for key, array in observation.items()}
