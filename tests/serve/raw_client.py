"""What a client in another language sends, and where."""

from __future__ import annotations

import itertools

import numpy as np
import zmq

from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve.server import PolicyServer

ANY_PORT = "tcp://127.0.0.1:*"


def observation(batch: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "object": 10}
    return {key: rng.standard_normal((batch, size)).astype(np.float32) for key, size in sizes.items()}


class RawClient:
    """What a client in another language does: frames over a socket, a session, rising ids."""

    def __init__(self, server: PolicyServer, **introduction: object) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.connect(server.address)
        self._ids = itertools.count(1)
        self.welcome = self.ask("hello", **introduction)

    def ask(self, op: str, arrays: dict[str, np.ndarray] | None = None, **fields: object) -> wire.Message:
        header = {"op": op, "id": next(self._ids), **fields}
        if op not in ("hello", "ping", "status"):
            header.setdefault("session", self.welcome.header["session"])
        return self.exchange(wire.encode(wire.Message(header, arrays or {})))

    def exchange(self, frames: list[bytes]) -> wire.Message:
        self.socket.send_multipart(frames)
        assert self.socket.poll(5000), "no answer"
        return wire.decode(self.socket.recv_multipart())

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)
