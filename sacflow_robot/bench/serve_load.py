"""Many clients, long runs and hostile ones against a policy server in a process of its own."""

import itertools
import os
import resource
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
from sacflow_robot.errors import DeadlineExceeded, ServerError
from sacflow_robot.export.onnx_policy import Engine, OnnxPolicy
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve.client import PolicyClient
from sacflow_robot.serve.reload import Reloader
from sacflow_robot.serve.server import PolicyServer

_MEMORY_SAMPLES = 20
_LOST_AFTER_S = 5.0
_TCP = "tcp://127.0.0.1:*"
_CLIENTS, _HZ, _DEADLINE_S = 64, 20, 0.02
_THROUGHPUT_S = 1.5
_RELOADING_CLIENTS, _RELOAD_EVERY_S = 4, 1.0


class Crowd:
    """Clients in one process, asking with the same arrays: a session and a socket each, and one loop over them all."""

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
        """Answers that have arrived, or arrive within ``wait_s``."""
        for socket, _ in self._poller.poll(max(0, round(wait_s * 1e3))):
            yield socket, wire.decode(wire.receive(socket))

    def close(self) -> None:
        self._context.destroy(linger=0)


def many_clients(path: Path, engine: Engine, seconds: float) -> dict[str, Any]:
    """64 clients that ask at a fixed rate, out of step with each other, each answer within a deadline."""
    arrays, noise = trips.example(OnnxPolicy(path, engine))
    period_ns = round(1e9 / _HZ)
    times, counts = [], Counter[str]()
    with (
        trips.process(trips.serve_native, path, engine, _TCP) as address,
        closing(Crowd(address, _CLIENTS, {**arrays, "noise": noise})) as crowd,
    ):
        began = time.monotonic_ns() + 200_000_000
        due = {socket: began + i * period_ns // _CLIENTS for i, socket in enumerate(crowd.sockets)}
        sent: dict[int, int] = {}
        end = began + round(seconds * 1e9)
        while (now := time.monotonic_ns()) < end or (sent and now < end + 1_000_000_000):
            for socket, at in due.items():
                if at <= now < end:
                    due[socket] = at + period_ns
                    sent[crowd.ask(socket, now + round(_DEADLINE_S * 1e9))] = now
            for _, reply in crowd.answers((min(min(due.values()), end + 10**9) - time.monotonic_ns()) / 1e9):
                asked = sent.pop(reply.header["id"])
                took = time.monotonic_ns() - asked
                if reply.header["ok"]:
                    times.append(took / 1e3)
                    counts["answered_after_deadline"] += took > _DEADLINE_S * 1e9
                    counts["together"] += reply.header["batch"] > 1
                else:
                    counts[reply.header["error"]["kind"]] += 1
    row = {"clients": _CLIENTS, "hz": _HZ, "deadline_ms": _DEADLINE_S * 1e3, "requests": len(times) + counts["late"]}
    row |= {"late": counts["late"], "answered_after_deadline": counts["answered_after_deadline"], "lost": len(sent)}
    return {
        **row,
        "batched_share": round(counts["together"] / max(1, len(times)), 3),
        **trips.percentiles(np.array(times)),
    }


def throughput(path: Path, engine: Engine) -> list[dict[str, Any]]:
    """Requests a second when every client asks again at once, against the rows evaluated together at most."""
    arrays, noise = trips.example(OnnxPolicy(path, engine))
    rows = []
    for batch in (1, 4, 16, 64):
        with (
            trips.process(serve_batches, path, engine, batch) as address,
            closing(Crowd(address, _CLIENTS, {**arrays, "noise": noise})) as crowd,
        ):
            for socket in crowd.sockets:
                crowd.ask(socket)
            count, sizes, began = 0, 0, time.perf_counter()
            while time.perf_counter() < began + _THROUGHPUT_S:
                for socket, reply in crowd.answers(0.1):
                    count, sizes = count + 1, sizes + reply.header["batch"]
                    crowd.ask(socket)
            rate = count / (time.perf_counter() - began)
        rows.append({"max_batch": batch, "requests_per_s": round(rate), "mean_batch": round(sizes / max(1, count), 1)})
    return rows


def at_rest(path: Path, engine: Engine, requests: int) -> dict[str, Any]:
    """Many requests of one client, one after another: how many are late or wrong, and how the server's memory grows."""
    policy = OnnxPolicy(path, engine)
    arrays, noise = trips.example(policy)
    expected, counts = policy.infer(arrays, noise), Counter[str]()
    times, memory = np.empty(requests, np.float32), []
    with (
        trips.process(serve_reloading, path, engine) as (address, pid),
        PolicyClient(address, deadline_s=_DEADLINE_S) as client,
    ):
        for i in range(requests):
            if i % max(1, requests // _MEMORY_SAMPLES) == 0:
                memory.append(_resident_mb(pid))
            began = time.perf_counter_ns()
            try:
                counts["wrong"] += not np.array_equal(client.infer(arrays, noise), expected)
            except DeadlineExceeded:
                counts["late"] += 1
            except ServerError:
                counts["lost"] += 1
            times[i] = (time.perf_counter_ns() - began) / 1e3
        memory.append(_resident_mb(pid))
    row = {"while": "at rest", "clients": 1, "requests": requests, "reloads": 0}
    row |= {"deadline_ms": _DEADLINE_S * 1e3, **{name: counts[name] for name in ("late", "lost", "wrong")}}
    row["answered_after_deadline"] = int((times > _DEADLINE_S * 1e6).sum()) - counts["late"]
    return {**row, **trips.percentiles(times), "memory_mb": memory}


def reloading(path: Path, twin: Path, engine: Engine, folder: Path, requests: int) -> dict[str, Any]:
    """Four clients that each ask again at once, while the policy file is replaced every second by another and back; each
    answer is held against the policy that it says it is from."""
    policies = [OnnxPolicy(p, engine) for p in (path, twin)]
    arrays, noise = trips.example(policies[0])
    expected = {policy.version: policy.infer(arrays, noise) for policy in policies}
    contents = [p.read_bytes() for p in (path, twin)]
    served, counts, memory = folder / "served.onnx", Counter[str](), []
    served.write_bytes(contents[0])
    times = np.empty(requests, np.float32)
    with (
        trips.process(serve_reloading, served, engine) as (address, pid),
        closing(Crowd(address, _RELOADING_CLIENTS, {**arrays, "noise": noise})) as crowd,
    ):
        asked = {crowd.ask(socket): time.perf_counter() for socket in crowd.sockets}
        following, done, last = time.monotonic() + _RELOAD_EVERY_S, 0, time.monotonic()
        while done < requests and time.monotonic() < last + _LOST_AFTER_S:
            if time.monotonic() > following:
                following += _RELOAD_EVERY_S
                counts["files"] += 1
                (folder / "next").write_bytes(contents[counts["files"] % 2])
                (folder / "next").replace(served)
            for socket, reply in crowd.answers(0.1):
                now, header, last = time.perf_counter(), reply.header, time.monotonic()
                if done < requests:
                    times[done] = (now - asked.pop(header["id"])) * 1e6
                if done % max(1, requests // _MEMORY_SAMPLES) == 0:
                    memory.append(_resident_mb(pid))
                done += 1
                right = header["ok"] and np.allclose(
                    reply.arrays["actions"], expected[header["policy_version"]], atol=1e-5
                )
                counts["wrong"] += not right
                asked[crowd.ask(socket)] = time.perf_counter()
        memory.append(_resident_mb(pid))
        with PolicyClient(address) as client:
            reloads = client.status()["reloads_taken"]
    row = {
        "while": "a new file every second",
        "clients": _RELOADING_CLIENTS,
        "requests": min(done, requests),
        "reloads": reloads,
    }
    row |= {"lost": max(0, requests - done), "wrong": counts["wrong"]}
    return {**row, **trips.percentiles(times[: min(done, requests)]), "memory_mb": memory}


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
