"""Many clients, long runs and hostile ones against a policy server in a process of its own."""

from __future__ import annotations

import itertools
import os
import resource
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

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
