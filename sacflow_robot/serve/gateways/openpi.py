"""openpi's WebSocket protocol, so that ``openpi_client.WebsocketClientPolicy`` connects unchanged.

On connect one binary msgpack map of metadata; then one map with an observation in, one with ``actions`` (H, A) out.
Observation keys are the policy's own, with or without ``observation/`` before them, one sample without batch axis.
An error is a text frame, then close code 1011. Facts about the protocol are from openpi's own client and server.
"""

import asyncio
import http
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from sacflow_robot import __version__
from sacflow_robot.errors import InvalidValueError, SacflowError, UsageError, WireError
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve.batching import checked
from sacflow_robot.spec import all_finite

_INTERNAL_ERROR = 1011
_PREFIX = "observation/"
_DTYPE = re.compile("[<>|=]?[fiubUS][0-9]{1,3}")
_WAITING = 2  # messages of one client that wait; it is one question at a time by protocol
_LOG = logging.getLogger(__name__)


class OpenpiGateway:
    """A WebSocket server on a thread of its own.

    Args:
        policy: Returns the policy to evaluate; called for every request.
        host: Address to listen at.
        port: Port to listen at; 0 picks a free one, see ``port``.

    Raises:
        UsageError: The address cannot be bound.
    """

    def __init__(self, policy: Callable[[], OnnxPolicy], host: str, port: int) -> None:
        self._policy = policy
        # One stream for all: the protocol has no seeds, and to make a generator for each chunk takes longer than its noise.
        self._noise = np.random.default_rng(secrets.randbits(63))
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        try:
            self._server = self._loop.run_until_complete(self._open(host, port))
        except OSError as error:
            self._loop.close()
            raise UsageError(f"cannot bind {host}:{port}: {error.strerror or error}; see --openpi") from None
        self.port = int(next(iter(self._server.sockets)).getsockname()[1])
        self._thread = threading.Thread(target=self._run, name="openpi-gateway", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    async def _open(self, host: str, port: int) -> Server:
        return await serve(
            *(self._talk, host, port),
            compression=None,
            max_size=wire.MAX_FRAME_BYTES,
            max_queue=_WAITING,
            process_request=_answer_health,
            server_header=None,
        )

    async def _until_stopped(self) -> None:
        async with self._server:
            await self._stopped.wait()

    def _run(self) -> None:
        self._loop.run_until_complete(self._until_stopped())
        self._loop.close()

    async def _talk(self, connection: ServerConnection) -> None:
        spec = self._policy().spec
        metadata = {
            "spec": spec.to_json(),
            "fingerprint": spec.fingerprint,
            "policy_version": self._policy().version,
            "server_version": __version__,
            "action_horizon": spec.chunk_length,
        }
        previous_ms = None
        try:
            await connection.send(msgpack.packb(metadata))
            while True:
                message = await connection.recv()
                began = time.monotonic()
                try:
                    answer = self._infer(message)
                except Exception as error:  # whatever one client sends, the others are served on
                    known = isinstance(error, SacflowError)
                    if not known:
                        _LOG.error("request failed", exc_info=error)
                    await connection.send(str(error) if known else "the server could not answer; its log says why")
                    await connection.close(_INTERNAL_ERROR, "see the text before")
                    return
                if previous_ms is not None:
                    answer["server_timing"]["prev_total_ms"] = previous_ms
                await connection.send(msgpack.packb(answer, default=pack_array))
                previous_ms = (time.monotonic() - began) * 1e3
        except ConnectionClosed:
            return

    @np.errstate(over="ignore")  # a float64 too large for float32 becomes infinite, and is refused
    def _infer(self, message: str | bytes) -> dict[str, Any]:
        policy, began = self._policy(), time.monotonic()
        observation = unpack(message)
        if not isinstance(observation, dict):
            raise WireError("an observation is one msgpack map")
        arrays = {}
        for array in policy.spec.robot.observations:
            value = observation.get(array.key, observation.get(_PREFIX + array.key))
            if value is not None:
                arrays[array.key] = as_numbers(value)[None]
        noise = self._noise.standard_normal((1, *policy.spec.noise_shape), dtype=np.float32)
        inputs = checked(policy, arrays, noise)
        before = time.monotonic()
        actions = policy.run(inputs)[0]
        ended = time.monotonic()
        if not all_finite(actions):
            raise InvalidValueError("the policy put out NaN or infinity; its actions were withheld")
        return {
            "actions": actions,
            "server_timing": {"infer_ms": (ended - began) * 1e3},
            "policy_timing": {"infer_ms": (ended - before) * 1e3},
            "policy_version": policy.version,
        }


def unpack(message: str | bytes) -> Any:
    """Unpack a binary frame, arrays as NumPy arrays.

    Raises:
        WireError: It is not msgpack of plain values and numeric arrays.
    """
    if isinstance(message, str):
        raise WireError("messages are binary msgpack, not text")
    return wire.unpack_bounded(message, _unpack_array, "numeric")


def pack_array(value: Any) -> Any:
    """An array or NumPy scalar as openpi's client reads it; for ``msgpack.packb(default=...)``."""
    if isinstance(value, np.ndarray) and value.dtype.kind not in "VOc":
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError


def as_numbers(value: Any) -> npt.NDArray[Any]:
    """A client's value as an array of numbers."""
    with suppress(ValueError, TypeError):
        array = np.asarray(value)
        if array.dtype.kind in "fiub":
            return array
    raise WireError("an observation's value is not an array of numbers")


def _unpack_array(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" in value or b"__npgeneric__" in value:
        dtype = _dtype(value[b"dtype"])
        if b"__npgeneric__" in value:
            return dtype.type(value[b"data"])
        return np.ndarray(buffer=value[b"data"], dtype=dtype, shape=tuple(value[b"shape"]))
    return value


@lru_cache(64)
def _dtype(name: object) -> np.dtype[Any]:
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):  # NumPy would parse what it does not know as Python
        raise ValueError("dtype")
    return np.dtype(name)


def _answer_health(connection: ServerConnection, request: Request) -> Response | None:
    return connection.respond(http.HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None
