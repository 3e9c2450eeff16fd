"""Client of the policy server; a ``Policy`` like a local one."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np
import zmq

from sacflow_robot.errors import DataError, ServerError, WireError
from sacflow_robot.serve import wire
from sacflow_robot.spec import FloatArray, Observation, PolicySpec


class PolicyClient:
    """Connects to a policy server and learns what it serves.

    Args:
        address: The server's address, e.g. ``tcp://127.0.0.1:5555``.
        timeout_s: Longest wait for any one answer.

    Raises:
        ServerError: Nobody answers there in time, or what answers is no policy server.
    """

    def __init__(self, address: str, timeout_s: float = 2.0) -> None:
        self.address, self._timeout_s = address, timeout_s
        self._ids = itertools.count(1)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
        self.last_header: Mapping[str, Any] = {}
        try:
            self._socket.connect(address)
            hello = self._request({"op": "hello"}, {})
            self._spec = PolicySpec.from_json(hello.header["spec"])
            self.policy_version = str(hello.header["policy_version"])
        except zmq.ZMQError as error:
            self.close()
            raise ServerError(f"cannot connect to {address}: {error}; expected e.g. tcp://127.0.0.1:5555") from None
        except (KeyError, DataError) as error:
            self.close()
            raise ServerError(f"{address} did not introduce itself as a policy server: {error}") from None
        except BaseException:
            self.close()
            raise

    @property
    def spec(self) -> PolicySpec:
        return self._spec

    def infer(self, observation: Observation, noise: FloatArray) -> FloatArray:
        """Action chunks (B, H, A) for observations (B, ...) and noise (B, H, A).

        Raises:
            ServerError: No answer in time, or the server refused the request.
        """
        reply = self._request({"op": "infer"}, {**observation, "noise": noise})
        actions = reply.arrays.get("actions")
        if actions is None or actions.shape != np.shape(noise):
            raise ServerError(f"{self.address} answered without actions of shape {np.shape(noise)}")
        if reply.header.get("policy_version") != self.policy_version:
            raise ServerError(f"{self.address} serves another policy by now; connect again to check whether it fits")
        return actions

    def close(self) -> None:
        self._context.destroy(linger=0)

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _request(self, header: Mapping[str, Any], arrays: Mapping[str, FloatArray]) -> wire.Message:
        identifier = next(self._ids)
        self._socket.send_multipart(wire.encode(wire.Message({**header, "id": identifier}, arrays)))
        deadline = time.monotonic() + self._timeout_s
        while (left := deadline - time.monotonic()) > 0:
            if not self._socket.poll(max(1, int(left * 1e3))):
                break
            try:
                reply = wire.decode(self._socket.recv_multipart())
            except WireError as error:
                raise ServerError(f"{self.address} does not speak the protocol: {error}") from None
            if reply.header.get("id") not in (identifier, None):
                continue  # the answer to a request that timed out before
            if not reply.header.get("ok"):
                failure = reply.header.get("error")
                reason = failure.get("message") if isinstance(failure, dict) else None
                raise ServerError(f"{self.address} refused the request: {reason or 'it gave no reason'}")
            self.last_header = reply.header
            return reply
        raise ServerError(
            f"no answer from {self.address} within {self._timeout_s:g} s; is a server running there? "
            "Start one with 'sacflow-robot serve --policy FILE'"
        )
