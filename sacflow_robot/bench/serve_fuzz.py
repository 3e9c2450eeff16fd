"""Hostile clients against the native port, open and locked, and both gateways, beside a good client that must not notice."""

import itertools
import random
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import zmq
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from sacflow_robot.bench import serve as trips
from sacflow_robot.errors import ServerError
from sacflow_robot.export.onnx_policy import Engine, OnnxPolicy
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve.auth import Security, load_keys, load_secret, new_keys
from sacflow_robot.serve.client import Keys, PolicyClient
from sacflow_robot.serve.gateways import groot, openpi
from sacflow_robot.serve.server import PolicyServer

MARKER = b"MARKER-7f3a"
_GOOD_EVERY = 50
_DEADLINE_S = 0.05
_KNOCK_EVERY, _KNOCKING = 20, 8

Attack = Callable[[list[bytes]], list[bytes]]
"""Sends a message, and returns what came back."""


def fuzz(path: Path, engine: Engine, messages: int, seed: int = 0) -> list[dict[str, Any]]:
    """A row per door: broken, truncated, oversized, reordered and replayed messages; what came back of them, and how a good
    client of the native port fared, each of whose requests has a deadline of 50 ms. At the last door, which is locked, the
    attacker has no key or one that the server does not know, and the good client has one that it does."""
    policy, rows = OnnxPolicy(path, engine), []
    arrays, noise = trips.example(policy)
    expected = policy.infer(arrays, noise)

    def one_door(door: str, good: PolicyClient, whole: list[bytes], attack: Attack) -> dict[str, Any]:
        rng, counts, times = random.Random(seed), Counter[str](), []
        for i in range(messages):
            if i == messages - 1:
                time.sleep(0.5)  # for the answers that are still on their way
            for frame in attack(spoil(whole, rng)):
                counts["answered"] += 1
                counts["echoed"] += MARKER in frame
            if i % _GOOD_EVERY == 0:
                began = time.perf_counter_ns()
                try:
                    actions = good.collect(good.ask(arrays, noise, deadline_s=_DEADLINE_S))
                    counts["wrong"] += not np.allclose(actions, expected, atol=1e-5)
                except ServerError:
                    counts["late"] += 1
                times.append((time.perf_counter_ns() - began) / 1e3)
        row = {"door": door, "messages": messages, "answered": counts["answered"], "echoed": counts["echoed"]}
        row |= {"good_asked": len(times), "good_late": counts["late"], "good_wrong": counts["wrong"]}
        return {**row, **{f"good_{k}": v for k, v in trips.percentiles(np.array(times)).items()}}

    with trips.process(serve_all, path, engine) as addresses, PolicyClient(addresses["native"]) as good:
        for door, attacker in (("native", _native), ("openpi", _openpi), ("groot", _groot)):
            with attacker(addresses[door], arrays, noise) as (whole, attack):
                rows.append(one_door(door, good, whole, attack))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server_key, _ = new_keys(folder, "server")
        _, known = new_keys(folder / "clients", "arm")
        _, unknown = new_keys(folder / "elsewhere", "stranger")
        strangers = [None, Keys(unknown, server_key)]
        with (
            trips.process(serve_locked, path, engine, folder) as address,
            PolicyClient(address, keys=Keys(known, server_key)) as good,
            _stranger(address, strangers, arrays, noise) as (whole, attack),
        ):
            rows.append(one_door("native, locked", good, whole, attack))
    return rows


def spoil(whole: list[bytes], rng: random.Random) -> list[bytes]:
    """A message made from a good one by one of the accidents or attacks there are."""
    frames, kind = list(whole), rng.randrange(9)
    at = rng.randrange(len(frames))
    if kind == 0:  # random bytes
        return [rng.randbytes(rng.randrange(60)) for _ in range(rng.randrange(1, 5))]
    if kind == 1:  # a truncated frame
        frames[at] = frames[at][: rng.randrange(len(frames[at]))]
    elif kind == 2:  # an oversized frame
        frames[at] += MARKER * rng.randrange(1, 2000)
    elif kind == 3:  # a flipped bit in the first frame
        spot = rng.randrange(len(frames[0]))
        frames[0] = frames[0][:spot] + bytes([frames[0][spot] ^ 1 << rng.randrange(8)]) + frames[0][spot + 1 :]
    elif kind == 4:  # frames in another order
        rng.shuffle(frames)
    elif kind == 5:  # frames missing, or twice
        frames = frames[:at] if rng.random() < 0.5 else frames + frames[at:]
    elif kind == 6:  # a header of its own
        values = [MARKER.decode(), -1, 2**63, [[]], {}, None, 1e300, MARKER]
        fields = ["op", "id", "session", "arrays", "seed", "deadline_ns", "v", "expect", "endpoint", "data", "object"]
        head = msgpack.unpackb(frames[0], strict_map_key=False)
        frames[0] = msgpack.packb({**head, rng.choice(fields): rng.choice(values)})
    elif kind == 7:  # values that are not numbers
        frames[-1] = frames[-1][:-8] + b"\xff" * len(frames[-1][-8:])
    return frames or [b""]  # kind 8 is the message itself, replayed


@contextmanager
def _native(address: str, arrays: dict[str, Any], noise: Any) -> Iterator[tuple[list[bytes], Attack]]:
    with trips.dealer(address) as socket:
        wire.send(socket, wire.encode(wire.Message({"op": "hello", "id": 0})))
        session = wire.decode(wire.receive(socket)).header["session"]
        header = {"op": "infer", "id": 1, "session": session, "client": MARKER.decode()}
        whole = [bytes(frame) for frame in wire.encode(wire.Message(header, {**arrays, "noise": noise}))]

        def attack(frames: list[bytes]) -> list[bytes]:
            socket.send_multipart(frames)
            return _arrived([socket])

        yield whole, attack


def _arrived(sockets: Iterable[zmq.Socket[bytes]]) -> list[bytes]:
    """Frames that have come back by now."""
    back: list[bytes] = []
    for socket in sockets:
        while socket.poll(0):
            back += socket.recv_multipart()
    return back


@contextmanager
def _stranger(
    address: str, keys: list[Keys | None], arrays: dict[str, Any], noise: Any
) -> Iterator[tuple[list[bytes], Attack]]:
    """Knocks again every few messages, each time with the next of the keys."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    header = {"op": "infer", "id": 1, "session": MARKER.decode()}
    whole = [bytes(frame) for frame in wire.encode(wire.Message(header, {**arrays, "noise": noise}))]
    turn, sockets = itertools.count(), deque[zmq.Socket[bytes]]()

    def attack(frames: list[bytes]) -> list[bytes]:
        knock, again = divmod(next(turn), _KNOCK_EVERY)
        if not again:
            if len(sockets) == _KNOCKING:
                sockets.popleft().close(linger=0)
            sockets.append(context.socket(zmq.DEALER))
            key = keys[knock % len(keys)]
            if key is not None:
                sockets[-1].curve_publickey, sockets[-1].curve_secretkey = load_secret(key.own)
                sockets[-1].curve_serverkey = load_keys(key.server)[0]
            sockets[-1].connect(address)
        with suppress(zmq.Again):
            sockets[-1].send_multipart(frames, zmq.NOBLOCK)
        return _arrived(sockets)

    yield whole, attack
    context.destroy(linger=0)


@contextmanager
def _groot(address: str, arrays: dict[str, Any], noise: Any) -> Iterator[tuple[list[bytes], Attack]]:
    data = {"observation": {"state": {key: array[:, None] for key, array in arrays.items()}}}
    whole = [msgpack.packb({"endpoint": "get_action", "data": data}, default=groot.pack)]
    with trips.dealer(address) as socket:  # a REQ socket without its manners

        def attack(frames: list[bytes]) -> list[bytes]:
            socket.send_multipart([b"", *frames])
            return [frame for frame in _arrived([socket]) if frame]  # without the empty delimiters

        yield whole, attack


@contextmanager
def _openpi(address: str, arrays: dict[str, Any], noise: Any) -> Iterator[tuple[list[bytes], Attack]]:
    """An error ends a connection by protocol, so that every attack takes a new one."""
    whole = [msgpack.packb({key: array[0] for key, array in arrays.items()}, default=openpi.pack_array)]

    def attack(frames: list[bytes]) -> list[bytes]:
        back: list[bytes] = []
        with suppress(ConnectionClosed), connect(address, compression=None) as connection:
            connection.recv()
            connection.send(b"".join(frames))
            answer = connection.recv(5)
            back.append(answer.encode() if isinstance(answer, str) else answer)
        return back

    yield whole, attack


def serve_all(path: Path, engine: Engine, ready: Connection) -> None:
    """The native port and both gateways, as ``sacflow-robot serve --openpi --groot``."""
    with (
        PolicyServer(OnnxPolicy(path, engine), "tcp://127.0.0.1:*") as server,
        closing(openpi.OpenpiGateway(lambda: server.policy, "127.0.0.1", 0)) as websocket,
        closing(groot.GrootGateway(lambda: server.policy, "tcp://127.0.0.1:*")) as other,
    ):
        places = {"openpi": f"ws://127.0.0.1:{websocket.port}", "groot": other.address}
        ready.send({"native": server.address, **places})
        server.run()


def serve_locked(path: Path, engine: Engine, folder: Path, ready: Connection) -> None:
    """The native port with keys."""
    security = Security(folder / "server.key_secret", folder / "clients")
    with PolicyServer(OnnxPolicy(path, engine), "tcp://127.0.0.1:*", security=security) as server:
        ready.send(server.address)
        server.run()
