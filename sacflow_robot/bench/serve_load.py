"""Many clients, long runs and hostile ones against a policy server in a process of its own."""

from __future__ import annotations

import itertools
import os
import random
import resource
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import zmq

from sacflow_robot.bench import serve as trips
from sacflow_robot.errors import ServerError
from sacflow_robot.serve import wire
from sacflow_robot.serve.client import PolicyClient
from sacflow_robot.serve.policy import Engine, OnnxPolicy
from sacflow_robot.serve.reload import Reloader
from sacflow_robot.serve.server import PolicyServer

_TCP = "tcp://127.0.0.1:*"


class Crowd:
    """Clients in one process: a session and a socket each, and one loop over them all.

    Args:
        address: The server's.
        count: How many.
        arrays: What each of them asks with.
    """

    def __init__(self, address: str, count: int, arrays: dict[str, Any]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller, self._ids = zmq.Poller(), itertools.count(1)
        self._arrays = arrays
        self.sockets = [self._context.socket(zmq.DEALER) for _ in range(count)]
        self._sessions = {}
        for socket in self.sockets:
            socket.connect(address)
            self._poller.register(socket, zmq.POLLIN)
            wire.send(socket, wire.encode(wire.Message({"op": "hello", "id": 0, "client": "crowd"})))
            welcome = wire.decode(wire.receive(socket)).header
            self._sessions[socket] = welcome["session"]
            self._ahead_ns = welcome["server_ns"] - time.monotonic_ns()

    def ask(self, socket: zmq.Socket[bytes], deadline_ns: int | None = None) -> int:
        """Send a request; the deadline is on this process's clock."""
        header: dict[str, Any] = {"op": "infer", "id": next(self._ids), "session": self._sessions[socket]}
        if deadline_ns is not None:
            header["deadline_ns"] = deadline_ns + self._ahead_ns
        wire.send(socket, wire.encode(wire.Message(header, self._arrays)))
        return int(header["id"])

    def answers(self, wait_s: float) -> Iterator[tuple[zmq.Socket[bytes], wire.Message]]:
        """What arrives within ``wait_s``, or is there."""
        for socket, _ in self._poller.poll(max(0, round(wait_s * 1e3))):
            yield socket, wire.decode(wire.receive(socket))

    def close(self) -> None:
        self._context.destroy(linger=0)


def many_clients(
    path: Path, engine: Engine, *, clients: int = 64, hz: float = 20, deadline_s: float = 0.02, seconds: float = 10
) -> dict[str, Any]:
    """Clients that ask at a fixed rate, out of step with each other, each answer within a deadline."""
    arrays, noise = trips.example(OnnxPolicy(path, engine))
    period_ns = round(1e9 / hz)
    times, counts = [], Counter[str]()
    with (
        trips.process(trips.serve_native, path, engine, _TCP) as address,
        closing(Crowd(address, clients, {**arrays, "noise": noise})) as crowd,
    ):
        began = time.monotonic_ns() + 200_000_000
        due = {socket: began + i * period_ns // clients for i, socket in enumerate(crowd.sockets)}
        sent: dict[int, int] = {}
        end = began + round(seconds * 1e9)
        while (now := time.monotonic_ns()) < end or (sent and now < end + 1_000_000_000):
            for socket, at in due.items():
                if at <= now < end:
                    due[socket] = at + period_ns
                    sent[crowd.ask(socket, now + round(deadline_s * 1e9))] = now
            for _, reply in crowd.answers((min(min(due.values()), end + 10**9) - time.monotonic_ns()) / 1e9):
                asked = sent.pop(reply.header["id"])
                took = time.monotonic_ns() - asked
                if reply.header["ok"]:
                    times.append(took / 1e3)
                    counts["answered_after_deadline"] += took > deadline_s * 1e9
                    counts["together"] += reply.header["batch"] > 1
                else:
                    counts[reply.header["error"]["kind"]] += 1
    row = {"clients": clients, "hz": hz, "deadline_ms": deadline_s * 1e3, "requests": len(times) + counts["late"]}
    row |= {"late": counts["late"], "answered_after_deadline": counts["answered_after_deadline"], "lost": len(sent)}
    return {
        **row,
        "batched_share": round(counts["together"] / max(1, len(times)), 3),
        **trips.percentiles(np.array(times)),
    }


def throughput(path: Path, engine: Engine, seconds: float = 1.5, clients: int = 64) -> list[dict[str, Any]]:
    """Requests a second when every client asks again at once, against the rows evaluated together at most."""
    arrays, noise = trips.example(OnnxPolicy(path, engine))
    rows = []
    for batch in (1, 4, 16, 64):
        with (
            trips.process(serve_batches, path, engine, batch) as address,
            closing(Crowd(address, clients, {**arrays, "noise": noise})) as crowd,
        ):
            for socket in crowd.sockets:
                crowd.ask(socket)
            count, sizes, began = 0, 0, time.perf_counter()
            while time.perf_counter() < began + seconds:
                for socket, reply in crowd.answers(0.1):
                    count, sizes = count + 1, sizes + reply.header["batch"]
                    crowd.ask(socket)
            rate = count / (time.perf_counter() - began)
        rows.append({"max_batch": batch, "requests_per_s": round(rate), "mean_batch": round(sizes / max(1, count), 1)})
    return rows


def endure(
    path: Path, twin: Path | None, engine: Engine, folder: Path, requests: int, deadline_s: float = 0.1
) -> dict[str, Any]:
    """Many requests one after another, with the policy file replaced every second if there is another one to replace it
    with; what is late, lost or wrong, and how the server's memory grows."""
    policies = [OnnxPolicy(p, engine) for p in (path, twin) if p is not None]
    arrays, noise = trips.example(policies[0])
    expected = {policy.version: policy.infer(arrays, noise) for policy in policies}
    contents = [p.read_bytes() for p in (path, twin) if p is not None]
    served, stop, counts = folder / "served.onnx", threading.Event(), Counter[str]()
    served.write_bytes(contents[0])

    def replace() -> None:
        for content in itertools.cycle(contents[1:] + contents[:1]):
            if stop.wait(1.0):
                return
            (folder / "next").write_bytes(content)
            (folder / "next").replace(served)

    with (
        trips.process(serve_reloading, served, engine) as (address, pid),
        PolicyClient(address, deadline_s=deadline_s) as client,
    ):
        replacer = threading.Thread(target=replace)
        if twin is not None:
            replacer.start()
        times = np.empty(requests, np.float32)
        memory = []
        try:
            for i in range(requests):
                if i % max(1, requests // 20) == 0:
                    memory.append(_resident_mb(pid))
                began = time.perf_counter_ns()
                try:
                    actions = client.infer(arrays, noise)
                except ServerError as error:
                    counts[type(error).__name__] += 1
                    actions = None
                times[i] = (time.perf_counter_ns() - began) / 1e3
                if actions is not None and not np.allclose(actions, expected[client.policy_version], atol=1e-5):
                    counts["wrong"] += 1
        finally:
            stop.set()
            if twin is not None:
                replacer.join()
        memory.append(_resident_mb(pid))
        reloads = client.status()["reloads_taken"]
    row: dict[str, Any] = {
        "requests": requests,
        "reloads": reloads,
        "wrong": counts["wrong"],
        "late": counts["LateError"],
    }
    row |= {"lost": sum(counts.values()) - counts["wrong"] - counts["LateError"], "memory_mb": memory}
    return {**row, **trips.percentiles(times)}


def fuzz(path: Path, engine: Engine, messages: int, seed: int = 0) -> dict[str, Any]:
    """Broken, truncated, oversized, reordered and replayed messages beside a good client with a deadline."""
    arrays, noise = trips.example(OnnxPolicy(path, engine))
    rng, counts, marker = random.Random(seed), Counter[str](), b"MARKER-7f3a"
    with trips.process(trips.serve_native, path, engine, _TCP) as address, PolicyClient(address) as good:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.connect(address)
        wire.send(socket, wire.encode(wire.Message({"op": "hello", "id": 0})))
        session = wire.decode(wire.receive(socket)).header["session"]
        header = {"op": "infer", "id": 1, "session": session, "client": marker.decode()}
        whole = [bytes(f) for f in wire.encode(wire.Message(header, {**arrays, "noise": noise}))]
        times = []
        for i in range(messages):
            socket.send_multipart(spoil(whole, rng, marker))
            while socket.poll(0):
                reply = socket.recv_multipart()
                counts["answered"] += 1
                counts["echoed"] += any(marker in frame for frame in reply)
                counts["met"] += bool(msgpack.unpackb(reply[0])["ok"])
            if i % 50 == 0:
                began = time.perf_counter_ns()
                try:
                    good.collect(good.ask(arrays, noise, deadline_s=0.05))
                except ServerError:
                    counts["good_refused"] += 1
                times.append((time.perf_counter_ns() - began) / 1e3)
        context.destroy(linger=0)
        good.infer(arrays, noise)
    names = "answered", "echoed", "met", "good_refused"
    return {"messages": messages, **{n: counts[n] for n in names}, "good": trips.percentiles(np.array(times))}


def spoil(whole: list[bytes], rng: random.Random, marker: bytes) -> list[bytes]:
    """A message made from a good one by one of a dozen accidents or attacks."""
    frames, kind = list(whole), rng.randrange(9)
    at = rng.randrange(len(frames))
    if kind == 0:  # random bytes
        return [rng.randbytes(rng.randrange(60)) for _ in range(rng.randrange(1, 5))]
    if kind == 1:  # a truncated frame
        frames[at] = frames[at][: rng.randrange(len(frames[at]))]
    elif kind == 2:  # an oversized frame
        frames[at] += marker * rng.randrange(1, 2000)
    elif kind == 3:  # a flipped bit in the header
        spot = rng.randrange(len(frames[0]))
        frames[0] = frames[0][:spot] + bytes([frames[0][spot] ^ 1 << rng.randrange(8)]) + frames[0][spot + 1 :]
    elif kind == 4:  # frames in another order
        rng.shuffle(frames)
    elif kind == 5:  # frames missing, or twice
        frames = frames[:at] if rng.random() < 0.5 else frames + frames[at:]
    elif kind == 6:  # a header of its own
        value: object = rng.choice([marker.decode(), -1, 2**63, [[]], {}, None, 1e300, marker])
        field = rng.choice(["op", "id", "session", "arrays", "seed", "deadline_ns", "v", "expect"])
        frames[0] = msgpack.packb({**msgpack.unpackb(frames[0]), field: value})
    elif kind == 7:  # values that are no numbers
        frames[-1] = b"\xff" * len(frames[-1])
    return frames or [b""]  # kind 8 is the message itself, replayed


def serve_batches(path: Path, engine: Engine, batch: int, ready: Connection) -> None:
    with PolicyServer(OnnxPolicy(path, engine), _TCP, max_batch=batch) as server:
        ready.send(server.address)
        server.run()


def serve_reloading(path: Path, engine: Engine, ready: Connection) -> None:
    with PolicyServer(OnnxPolicy(path, engine), _TCP) as server, closing(Reloader(server, path).start()):
        ready.send((server.address, os.getpid()))
        server.run()


def _resident_mb(pid: int) -> float:
    """Resident memory of a process (MB); 0 where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return round(pages * resource.getpagesize() / 1e6, 1)
