"""Client of the policy server; a ``Policy`` like a local one."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sacflow_robot.errors import (
    ConnectionLost,
    DataError,
    InvalidValueError,
    ServerError,
    ServerRestartedError,
    SpecMismatchError,
    UsageError,
)
from sacflow_robot.export.metadata import NOISE
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve.connection import Channel, Keys
from sacflow_robot.spec import FloatArray, Observation, PolicySpec, RobotSpec

__all__ = ["Keys", "PolicyClient"]

_LONGEST_S = 1e6
_HEARTBEATS_S = 0.001, 3600.0


class PolicyClient:
    """Connects to a policy server and learns what it serves.

    A connection that was lost is made again by the next call. A server that still knows the session goes on with it; a new
    one opens a session with the same expectations, and the stream of noise goes on where it was, also within an episode.
    For one thread at a time, and for the process that made it: a forked one makes its own.

    Args:
        address: The server's address, e.g. ``tcp://127.0.0.1:5555``.
        timeout_s: Longest wait for any one answer.
        expect: The robot that the policy has to fit, or any part of a ``PolicySpec`` as plain data; the server refuses a
            client that expects something else.
        deadline_s: What is later than this is of no use: the server answers ``late`` instead. None for no deadline.
        swap: When a new policy file on the server takes effect here: ``"now"``, or at the next ``"episode"``.
        name: What the server calls this client in its tables.
        keys: Keys, where the server asks for them.

    Attributes:
        interrupted: Asked every 20 ms while actions are waited for; the wait ends with a ServerError once it is true.

    Raises:
        ServerError: Nobody answers there in time, or what answers is not a policy server.
        SpecMismatchError: The policy served is not what was expected; names the fields.
        UsageError: The address is malformed, or a time is invalid.
    """

    def __init__(
        self,
        address: str,
        timeout_s: float = 2.0,
        *,
        expect: RobotSpec | Mapping[str, Any] | None = None,
        deadline_s: float | None = None,
        swap: str = "now",
        name: str = "python",
        keys: Keys | None = None,
    ) -> None:
        if not 0 < timeout_s <= _LONGEST_S:
            raise UsageError(f"timeout_s is {timeout_s}; it must be above 0 and at most {_LONGEST_S:g}")
        _check_deadline(deadline_s)
        self.address = address
        self.interrupted: Callable[[], bool] | None = None
        self.spec: PolicySpec
        self.policy_version = ""
        self.takes_prefix = False
        self._timeout_s = timeout_s
        self._deadline_s = deadline_s
        plain = {"arm": json.loads(expect.to_json())} if isinstance(expect, RobotSpec) else expect
        self._introduction = {"op": "hello", "expect": plain, "swap": swap, "client": name}
        self._session: str | None = None
        self._linked = False
        self._greeting = 0  # the hello whose answer is awaited
        self._seed: int | None = None
        self._step = 0
        self._channel = Channel(address, timeout_s, keys)
        try:
            self._link(timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def connected(self) -> bool:
        """True if the server is alive, as far as heartbeats tell: false within two of them after it has gone."""
        if self._channel.is_open:
            self._look()
        return self._channel.is_open and self._linked

    @property
    def last_header(self) -> Mapping[str, Any]:
        """Header of the last answer; see ``docs/protocol.md``."""
        return self._channel.last_header

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
            DeadlineExceeded: The answer would have come after the deadline.
            InvalidValueError, WireError: The request cannot be sent: half a prefix, a dtype or size that does not travel.
            RefusedError: The server refused the request; the message says why.
            ConnectionLost: The connection is lost, or there was no answer in time. The next call connects anew.
            ServerRestartedError: The server is a new process. The next call starts a session with it.
            SpecMismatchError: It was restarted with another policy, which is not what was expected.
        """
        self._link(self._timeout_s)
        return self.collect(self.ask(observation, noise, prefix=prefix, prefix_mask=prefix_mask))

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
            ConnectionLost: There is no connection at this moment; nothing was sent. Ask again.
            SpecMismatchError: As :meth:`infer`.
        """
        _check_deadline(deadline_s)
        self._link(0)
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
        limit_s = self._deadline_s if deadline_s is None else deadline_s
        if limit_s is not None:
            ahead_ns = self._channel.ahead_ns
            if ahead_ns is None:
                raise ServerError(f"{self.address} does not tell its clock, which a deadline has to be set by")
            header["deadline_ns"] = time.monotonic_ns() + round(limit_s * 1e9) + ahead_ns
        number = self._channel.request(header, arrays)
        self._step += noise is None
        return number

    def collect(self, number: int, wait_s: float | None = None) -> FloatArray:
        """The actions (B, H, A) that request ``number`` asked for; raises what :meth:`infer` does.

        Args:
            number: What :meth:`ask` returned. Answers to earlier requests are dropped.
            wait_s: Longest wait; 0 to look only, which raises TimeoutError where the answer is not there yet.

        Raises:
            ServerError: As :meth:`infer`; or ``interrupted`` ended the wait.
        """
        reply = self._await(number, wait_s, self.interrupted)
        array, shape = reply.arrays.get("actions"), self.spec.noise_shape
        if array is None or array.dtype != np.float32 or array.ndim != 3 or not len(array) or array.shape[1:] != shape:
            raise ServerError(f"{self.address} answered without float32 actions of shape (B, {shape[0]}, {shape[1]})")
        self.policy_version = str(reply.header.get("policy_version"))
        return array

    def keep_alive(self) -> None:
        """Take a step toward a session on a connection that stands, waiting for nothing: well under a millisecond.

        For a caller that asks for nothing at the moment, several times a second: a server that is restarted meanwhile is
        greeted anew, so that the next :meth:`ask` finds it. A server that is gone, or lets nobody in yet, is not an error here.

        Raises:
            SpecMismatchError: It was restarted with another policy, which is not what was expected.
        """
        with contextlib.suppress(ServerError):
            self._link(0)

    def begin_episode(self, seed: int | None = None) -> str:
        """Tell the server that an episode begins; returns the version of the policy that it will be run with.

        The noise stream starts anew from ``seed``, and a swap put off to the next episode takes place.
        """
        reply = self._request("episode", seed=seed)
        self.policy_version = str(reply.header.get("policy_version"))
        self._seed, self._step = reply.header.get("seed"), 0
        if reply.header.get("fingerprint") != self.spec.fingerprint:
            self._linked = False
            self._link(self._timeout_s)
        return self.policy_version

    def status(self) -> Mapping[str, Any]:
        """Counters of the server; see ``docs/protocol.md``."""
        return self._request("status").header

    def close(self) -> None:
        """Say goodbye, as far as somebody listens."""
        if self._linked and self._channel.is_open:
            with contextlib.suppress(ServerError):
                self._channel.request({"op": "bye", "session": self._session})
        self._channel.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _link(self, wait_s: float) -> None:
        """Have a session on a connection that stands, waiting so long at most."""
        self._channel.check_open()
        self._look()
        deadline = time.monotonic() + wait_s
        while not self._linked:
            self._greet(max(0.0, deadline - time.monotonic()))

    def _greet(self, wait_s: float) -> None:
        """Say hello, or go on waiting for the answer to it."""
        deadline = time.monotonic() + wait_s
        if not self._greeting:
            if not self._channel.ready(wait_s):
                raise self._channel.gone(wait_s)
            self._channel.forget_clock()
            self._greeting = self._channel.request({**self._introduction, "session": self._session, "seed": self._seed})
        try:
            reply = self._channel.reply(self._greeting, max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            if wait_s or self._channel.waited_s(self._greeting) > self._timeout_s:
                self._greeting = 0
            raise self._channel.gone(wait_s) from None
        except (ServerError, SpecMismatchError):
            self._greeting = 0
            raise
        self._greeting = 0
        self._read_welcome(reply.header)

    def _read_welcome(self, header: Mapping[str, Any]) -> None:
        """Take the answer to ``hello``; a connection with another heartbeat than the server's is made anew."""
        try:
            heartbeat_s = float(header["heartbeat_s"])
            if not _HEARTBEATS_S[0] <= heartbeat_s <= _HEARTBEATS_S[1]:
                raise ValueError(f"a heartbeat of {heartbeat_s} s cannot be kept")
            spec = PolicySpec.from_json(header["spec"])
            version = str(header["policy_version"])
            session = str(header["session"])
            seed = int(header["seed"])
        except (KeyError, TypeError, ValueError, OverflowError, DataError) as error:
            raise ServerError(f"{self.address} did not introduce itself as a policy server: {error}") from None
        self.spec = spec
        self.policy_version = version
        self.takes_prefix = header.get("takes_prefix") is True
        self._session = session
        self._seed = seed if self._seed is None else self._seed
        self._linked = heartbeat_s == self._channel.heartbeat_s
        if not self._linked:
            self._channel.connect(heartbeat_s)

    def _look(self) -> None:
        """See whether the connection was lost since the last look; if so, it has to be greeted again."""
        if self._channel.broken():
            self._linked = False
            self._greeting = 0

    def _request(self, operation: str, **fields: Any) -> wire.Message:
        self._link(self._timeout_s)
        return self._await(self._channel.request({"op": operation, "session": self._session, **fields}))

    def _await(
        self, number: int, wait_s: float | None = None, interrupted: Callable[[], bool] | None = None
    ) -> wire.Message:
        try:
            return self._channel.reply(number, wait_s, interrupted)
        except (ConnectionLost, ServerRestartedError):
            self._linked = False
            raise


def _check_deadline(deadline_s: float | None) -> None:
    if deadline_s is not None and not math.isfinite(deadline_s):
        raise UsageError(f"deadline_s is {deadline_s}; give a number of seconds, or None for no deadline")
