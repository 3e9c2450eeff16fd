"""Round trips of a served policy, beside what they consist of and beside the usual way of serving, in one run.

Server, echo and WebSocket servers each run in a process of their own. The ways measured take turns call by call, so that what
else the machine does meets all of them.
"""

import asyncio
import itertools
import multiprocessing as mp
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from sacflow_robot.errors import RobotError
from sacflow_robot.export.onnx_policy import Engine, OnnxPolicy
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve.client import PolicyClient
from sacflow_robot.serve.gateways.openpi import OpenpiGateway, pack_array, unpack
from sacflow_robot.serve.server import PolicyServer
from sacflow_robot.utils.seeding import chunk_noise

Call = Callable[[], object]
_BINDS = {"ipc": "ipc://@sacflow-bench-{name}-{pid}", "tcp": "tcp://127.0.0.1:*"}
_ROUNDS = 20
IMAGES = {f"camera_{i}": np.zeros((1, 128, 128, 3), np.uint8) for i in range(2)}


def round_trips(path: Path, engine: Engine, requests: int) -> list[dict[str, Any]]:
    """A row per transport and payload: native server, bare ONNX Runtime (``InferenceSession.run``), bare ZeroMQ echo of the
    same bytes."""
    policy, rows = OnnxPolicy(path, engine), []
    observation, noise = example(policy)
    for transport, bind in _BINDS.items():
        with (
            process(serve_native, path, engine, bind.format(name="serve", pid=os.getpid())) as address,
            process(echo, bind.format(name="echo", pid=os.getpid())) as echo_address,
            PolicyClient(address) as client,
            dealer(echo_address) as socket,
        ):
            inputs = policy.check(observation, noise)
            for payload, extra in (("state", {}), ("state + 2 images 128x128", IMAGES)):
                sent = {**observation, **extra}
                frames = wire.encode(wire.Message({"op": "infer", "id": 1}, {**sent, "noise": noise}))
                calls: list[Call] = [
                    partial(client.infer, sent, noise),
                    partial(policy.run, inputs),
                    partial(_bounce, socket, frames),
                ]
                own, ort, bounced = map(percentiles, take_turns(calls, requests))
                row = {"velocity": policy.spec.velocity, "transport": transport, "payload": payload, **own}
                row |= {"ort_p50_us": ort["p50_us"], "echo_p50_us": bounced["p50_us"]}
                row["ratio_p50"] = round(own["p50_us"] / (ort["p50_us"] + bounced["p50_us"]), 3)
                rows.append(row)
    return rows


def _bounce(socket: zmq.Socket[bytes], frames: list[Any]) -> None:
    wire.send(socket, frames)
    wire.receive(socket)


def against_websockets(path: Path, engine: Engine, requests: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows, and by how much they differ: native client over TCP; the real openpi client with our gateway, and with a plain
    websockets + msgpack server.

    Asked back to back; and each way at 20 Hz, as a robot asks, where the cores sleep in between and every answer is slower.
    """
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    policy = OnnxPolicy(path, engine)
    observation, noise = example(policy)
    single = {key: array[0] for key, array in observation.items()}
    ways: dict[str, Call] = {}
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # openpi-client with websockets 17
        address = stack.enter_context(process(serve_native, path, engine, _BINDS["tcp"]))
        client = stack.enter_context(PolicyClient(address))
        ways["native"] = partial(client.infer, observation, noise)
        for name, server in (("openpi gateway", serve_gateway), ("plain websockets + msgpack", serve_plain)):
            port = int(stack.enter_context(process(server, path, engine)))
            websocket = WebsocketClientPolicy("127.0.0.1", port)
            stack.callback(websocket._ws.close)
            ways[name] = partial(websocket.infer, single)
        rows, gaps = [], []
        for asked, count, pause_s in (
            ("back to back", requests, 0.0),
            ("at 20 Hz", max(_ROUNDS, requests // 40), 0.05 / len(ways)),
        ):
            times = dict(zip(ways, take_turns(list(ways.values()), count, pause_s), strict=True))
            about = {"velocity": policy.spec.velocity, "asked": asked}
            rows += [{**about, "way": name, "requests": count, **percentiles(own)} for name, own in times.items()]
            for sooner, slower in itertools.combinations(ways, 2):
                gaps.append({**about, "way": slower, "against": sooner, **later(times[slower], times[sooner])})
    return rows, gaps


def take_turns(calls: list[Call], count: int, pause_s: float = 0.0) -> list[np.ndarray[Any, Any]]:
    """Times (microseconds) of ``count`` calls of each, after a tenth as many to warm up, with a pause before each call.

    They take turns, each turn in another order: what was called just before has filled the processor's caches, which suits
    one call better than another, and all have to meet it equally often.
    """
    times, shuffle = np.empty((len(calls), count)), random.Random(0).shuffle
    turns = list(zip(calls, times, strict=True))
    for i in range(-max(1, count // 10), count):
        shuffle(turns)
        for call, own in turns:
            if pause_s:
                time.sleep(pause_s)
            began = time.perf_counter_ns()
            call()
            own[i] = (time.perf_counter_ns() - began) / 1e3  # warming up fills the end, which is written again
    return list(times)


def percentiles(times: np.ndarray[Any, Any]) -> dict[str, float]:
    """p50, p99 and p99.9."""
    values = np.percentile(times, [50, 99, 99.9])
    return {name: round(float(v), 1) for name, v in zip(("p50_us", "p99_us", "p999_us"), values, strict=True)}


def later(times: np.ndarray[Any, Any], others: np.ndarray[Any, Any]) -> dict[str, float]:
    """By how much the p50 and p99 of ``times`` are above those of ``others`` (microseconds; both in the order of the turns).

    The median over rounds of turns, and its 95 % interval by bootstrap over the rounds.
    """
    rounds = [
        np.percentile(a, [50, 99]) - np.percentile(b, [50, 99])
        for a, b in zip(np.array_split(times, _ROUNDS), np.array_split(others, _ROUNDS), strict=True)
    ]
    drawn = np.random.default_rng(0).integers(len(rounds), size=(2000, len(rounds)))
    medians = np.median(np.array(rounds)[drawn], axis=1)
    middle, bounds = np.median(rounds, axis=0), np.percentile(medians, [2.5, 97.5], axis=0)
    return {
        f"{name}_{what}_us": round(float(value), 1)
        for i, name in enumerate(("p50", "p99"))
        for what, value in (("later", middle[i]), ("low", bounds[0, i]), ("high", bounds[1, i]))
    }


def example(policy: OnnxPolicy, rows: int = 1) -> tuple[dict[str, Any], Any]:
    """An observation and noise, the same every time."""
    rng = np.random.default_rng(0)
    arrays = {a.key: rng.standard_normal((rows, *a.shape)).astype(a.dtype) for a in policy.spec.robot.observations}
    return arrays, chunk_noise((rows, *policy.spec.noise_shape), 0)


def untrained_twin(path: Path, velocity: str, out: Path) -> Path:
    """A policy like that in ``path`` with another velocity network, as large as training makes it by default; needs torch.

    Untrained: how long it takes does not depend on its weights.
    """
    import torch

    from sacflow_robot.export.to_onnx import export_policy
    from sacflow_robot.learn.flow import FlowPolicy
    from sacflow_robot.learn.presets import preset

    spec = OnnxPolicy(path).spec
    torch.manual_seed(0)
    size = spec.chunk_length * spec.robot.action_dim
    flow = preset(spec.robot.task, velocity).flow
    policy = FlowPolicy(velocity, spec.robot.observation_dim, size, flow)
    export_policy(policy, policy.make_spec(spec.robot, {"untrained": True}), out)
    return out


# ---- servers, each in a process of its own; the first thing they send is their address


def serve_native(path: Path, engine: Engine, bind: str, ready: Connection) -> None:
    with PolicyServer(OnnxPolicy(path, engine), bind) as server:
        ready.send(server.address)
        server.run()


def echo(bind: str, ready: Connection) -> None:
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.bind(bind)
    ready.send(socket.getsockopt_string(zmq.LAST_ENDPOINT))
    while True:
        wire.send(socket, wire.receive(socket, heads=1))


def serve_gateway(path: Path, engine: Engine, ready: Connection) -> None:
    policy = OnnxPolicy(path, engine)
    gateway = OpenpiGateway(lambda: policy, "127.0.0.1", 0)
    ready.send(gateway.port)
    gateway._thread.join()


def serve_plain(path: Path, engine: Engine, ready: Connection) -> None:
    """Serve as labs do: websockets, msgpack, one request after another."""
    import msgpack
    from websockets.asyncio.server import ServerConnection, serve

    policy = OnnxPolicy(path, engine)
    rng = np.random.default_rng(0)

    async def talk(connection: ServerConnection) -> None:
        await connection.send(msgpack.packb({}))
        async for message in connection:
            observation: Mapping[str, Any] = unpack(message)
            noise = rng.standard_normal((1, *policy.spec.noise_shape), dtype=np.float32)
            actions = policy.infer({key: array[None] for key, array in observation.items()}, noise)[0]
            await connection.send(msgpack.packb({"actions": actions}, default=pack_array))

    async def run() -> None:
        async with serve(talk, "127.0.0.1", 0, compression=None, max_size=None) as server:
            ready.send(next(iter(server.sockets)).getsockname()[1])
            await server.serve_forever()

    asyncio.run(run())


@contextmanager
def process(target: Callable[..., None], *args: object) -> Iterator[Any]:
    """Run ``target(*args, ready)`` in a new process; what it sends first."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=target, args=(*args, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        try:
            first = ours.recv()
        except EOFError:
            raise RobotError("no server started; to see why: sacflow-robot serve --policy FILE") from None
        yield first
    finally:
        child.terminate()
        child.join()


@contextmanager
def dealer(address: str) -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(address)
    try:
        yield socket
    finally:
        context.destroy(linger=0)
