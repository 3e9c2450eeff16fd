"""Policy server: answers inference requests on a ZeroMQ ROUTER socket."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import zmq

from sacflow_robot import __version__
from sacflow_robot.errors import SacflowError, UsageError, WireError, one_line
from sacflow_robot.randomness import chunk_noise
from sacflow_robot.serve import wire
from sacflow_robot.serve.policy import OnnxPolicy

_POLL_MS = 100
_MAX_BATCH = 4096
_LAST_PORT = 65535
_LOG = logging.getLogger(__name__)


class PolicyServer:
    """Serves one policy.

    Args:
        policy: The policy, self-tested by its loading.
        bind: Address, e.g. ``tcp://127.0.0.1:5555``; port 0 or ``*`` takes a free one, see ``address``.

    Raises:
        UsageError: The address is malformed or in use.
    """

    def __init__(self, policy: OnnxPolicy, bind: str) -> None:
        _check_bind(bind)
        self._policy = policy
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
        try:
            self._socket.bind(bind)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            reason = "it is in use" if error.errno == zmq.EADDRINUSE else str(error)
            raise UsageError(f"cannot bind {bind}: {reason}; give another address with --bind") from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.requests = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Answer requests until :meth:`stop` is called; the one at hand is still answered."""
        while not self._stop.is_set():
            if not self._socket.poll(_POLL_MS):
                continue
            client, *frames = self._socket.recv_multipart()
            received = time.perf_counter_ns()
            reply = self._answer(frames, received)
            # A client that vanished cannot be reached; ROUTER drops its reply.
            self._socket.send_multipart([client, *wire.encode(reply)])

    def start(self) -> PolicyServer:
        """Answer requests on a thread."""
        self._thread = threading.Thread(target=self.run, name="policy-server", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ask :meth:`run` to return; may be called from a signal handler."""
        self._stop.set()

    def close(self) -> None:
        """Stop answering and release the address."""
        self.stop()
        if self._thread is not None:
            self._thread.join()
        self._context.destroy(linger=0)
        transport, _, place = self.address.partition("://")
        if transport == "ipc" and not place.startswith("@"):
            Path(place).unlink(missing_ok=True)

    def __enter__(self) -> PolicyServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _answer(self, frames: list[bytes], received_ns: int) -> wire.Message:
        identifier: Any = None
        try:
            request = wire.decode(frames)
            identifier = request.header.get("id")
            handler = self._handlers().get(str(request.header.get("op")))
            if handler is None:
                raise WireError(f"unknown op {request.header.get('op')!r}; valid: {', '.join(self._handlers())}")
            reply = handler(request)
        except Exception as error:  # whatever one client sends, the others are served on
            failure = {"kind": type(error).__name__, "message": one_line(error)}
            if not isinstance(error, SacflowError):
                _LOG.exception("request failed")
            return wire.Message({"id": identifier, "ok": False, "error": failure})
        self.requests += 1
        timings = {**reply.header.get("timings_us", {}), "total": (time.perf_counter_ns() - received_ns) / 1e3}
        return wire.Message({**reply.header, "id": identifier, "ok": True, "timings_us": timings}, reply.arrays)

    def _handlers(self) -> dict[str, Callable[[wire.Message], wire.Message]]:
        return {"hello": self._hello, "infer": self._infer}

    def _hello(self, request: wire.Message) -> wire.Message:
        spec = self._policy.spec
        return wire.Message(
            {
                "spec": spec.to_json(),
                "fingerprint": spec.fingerprint,
                "policy_version": self._policy.version,
                "server_version": __version__,
            }
        )

    def _infer(self, request: wire.Message) -> wire.Message:
        spec = self._policy.spec
        first = request.arrays.get(spec.arm.observations[0].key)
        batch = len(first) if first is not None and first.ndim else 0
        if batch > _MAX_BATCH:
            raise WireError(f"batch of {batch}, at most {_MAX_BATCH} are answered at once")
        observation = spec.arm.check_observation(request.arrays, (batch,))
        noise, seed = request.arrays.get("noise"), None
        if noise is None:
            seed = request.header.get("seed")
            if seed is None:
                seed = secrets.randbits(63)
            if type(seed) is not int or seed < 0:
                raise WireError(f"seed is {seed!r}, expected a non-negative integer")
            noise = chunk_noise((batch, *spec.noise_shape), seed)
        before = time.perf_counter_ns()
        actions = self._policy.infer(observation, noise)
        header = {
            "policy_version": self._policy.version,
            "seed": seed,
            "timings_us": {"infer": (time.perf_counter_ns() - before) / 1e3},
        }
        return wire.Message(header, {"actions": actions})


def _check_bind(bind: str) -> None:
    """Refuse what ZeroMQ would accept to somebody's harm: a port that wraps round, an ipc path that is taken.

    Raises:
        UsageError: The address is one of these.
    """
    transport, _, place = bind.partition("://")
    if transport == "tcp":
        port = place.rpartition(":")[2]
        if port != "*" and not (port.isascii() and port.isdigit() and int(port[:9]) <= _LAST_PORT):
            raise UsageError(f"cannot bind {bind!r}: {port!r} is no port; give e.g. tcp://127.0.0.1:5555 with --bind")
    if transport == "ipc" and not place.startswith("@") and Path(place).exists():
        raise UsageError(f"cannot bind {bind!r}: {place} exists; stop what serves there, or remove it")
