"""A client of the policy server with nothing but pyzmq and msgpack; docs/protocol.md is what it is written from.

sacflow-robot serve --policy policies/lift.onnx
python examples/minimal_client.py tcp://127.0.0.1:5555
"""

import itertools
import json
import math
import struct
import sys
import time

import msgpack
import zmq

TIMEOUT_MS = 2000


class Client:
    def __init__(self, address: str, **expect: object) -> None:
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        heartbeat = ((zmq.HEARTBEAT_IVL, 500), (zmq.HEARTBEAT_TIMEOUT, 1500), (zmq.HEARTBEAT_TTL, 2000))
        for option, value in ((zmq.LINGER, 0), (zmq.IMMEDIATE, 1), *heartbeat):
            self.socket.setsockopt(option, value)
        self.socket.connect(address)
        self.ids = itertools.count(1)
        welcome, _ = self.ask({"op": "hello", "client": "minimal", "expect": expect})
        self.session, self.spec = welcome["session"], json.loads(welcome["spec"])
        # An instant of our clock, and what the server's clock said shortly before.
        self.clock = time.monotonic_ns(), welcome["server_ns"]

    def ask(self, header: dict, arrays: dict | None = None) -> tuple[dict, list]:
        """Send a request and wait for its answer; arrays are pairs of shape and values."""
        number, arrays = next(self.ids), arrays or {}
        layout = [[name, "<f4", shape] for name, (shape, _) in arrays.items()]
        frames = [msgpack.packb({"v": 2, "id": number, **header, "arrays": layout})]
        frames += [struct.pack(f"<{len(values)}f", *values) for _, values in arrays.values()]
        if not self.socket.poll(TIMEOUT_MS, zmq.POLLOUT):
            raise ConnectionError("nobody is there")
        self.socket.send_multipart(frames)
        while self.socket.poll(TIMEOUT_MS):
            head, *frames = self.socket.recv_multipart()
            reply = msgpack.unpackb(head)
            if reply["id"] == number:
                if not reply["ok"]:
                    raise RuntimeError(f"{reply['error']['kind']}: {reply['error']['message']}")
                return reply, frames
        raise ConnectionError("no answer")

    def infer(self, observation: dict, budget_s: float) -> list[list[float]]:
        """Actions, one row per control step, from one observation; each value is a flat list of numbers."""
        ours, theirs = self.clock
        deadline = theirs + (time.monotonic_ns() - ours) + int(budget_s * 1e9)
        shapes = {a["key"]: a["shape"] for a in self.spec["arm"]["observations"]}
        arrays = {key: ([1, *shapes[key]], values) for key, values in observation.items()}
        reply, frames = self.ask({"op": "infer", "session": self.session, "deadline_ns": deadline}, arrays)
        _, _, (_, length, width) = reply["arrays"][0]
        flat = struct.unpack(f"<{length * width}f", frames[0])
        return [list(flat[i : i + width]) for i in range(0, length * width, width)]


if __name__ == "__main__":
    client = Client(sys.argv[1], robot={"control_rate_hz": 20})
    robot = client.spec["arm"]
    print(f"{robot['robot']} {robot['task']}, {robot['control_rate_hz']} Hz")
    observation = {a["key"]: [0.0] * math.prod(a["shape"]) for a in robot["observations"]}
    actions = client.infer(observation, budget_s=1.0)
    print(f"{len(actions)} x {len(actions[0])} actions, the first: {[round(x, 3) for x in actions[0]]}")
    try:
        client.infer(observation, budget_s=0.0)
    except RuntimeError as error:
        print(error)
    client.ask({"op": "bye", "session": client.session})
