"""Latency of a served policy beside direct ONNX Runtime and a bare ZeroMQ echo, all in one run.

    python benchmarks/serve_latency.py --policy policies/lift.onnx

Server and echo each run in a process of their own. Prints one JSON object.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing as mp
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import tyro
import zmq

from sacflow_robot.bench.machine import machine
from sacflow_robot.randomness import chunk_noise
from sacflow_robot.serve import wire
from sacflow_robot.serve.client import PolicyClient
from sacflow_robot.serve.policy import OnnxPolicy
from sacflow_robot.serve.server import PolicyServer


@dataclass(frozen=True)
class Benchmark:
    """What to measure.

    Attributes:
        policy: Policy file.
        requests: Requests per measurement, after as many tenths to warm up.
        out: JSON file to write the result to as well.
    """

    policy: Path
    requests: int = 5000
    out: Path | None = None


def percentiles(call: Callable[[], object], count: int) -> dict[str, float]:
    """p50, p99 and p999 (microseconds) of single calls, one after another."""
    for _ in range(count // 10):
        call()
    times = np.empty(count)
    for i in range(count):
        began = time.perf_counter_ns()
        call()
        times[i] = time.perf_counter_ns() - began
    values = np.percentile(times / 1e3, [50, 99, 99.9])
    return {name: round(float(v), 1) for name, v in zip(("p50_us", "p99_us", "p999_us"), values, strict=True)}


def serve(path: Path, bind: str, ready: Connection) -> None:
    with PolicyServer(OnnxPolicy(path), bind) as server:
        ready.send(server.address)
        server.run()


def echo(bind: str, ready: Connection) -> None:
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.bind(bind)
    ready.send(socket.getsockopt_string(zmq.LAST_ENDPOINT))
    while True:
        socket.send_multipart(socket.recv_multipart())


def start(target: Callable[..., None], *args: object) -> tuple[mp.process.BaseProcess, str]:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(*args, theirs), daemon=True)
    process.start()
    return process, ours.recv()


def measure(config: Benchmark) -> dict[str, object]:
    policy = OnnxPolicy(config.policy)
    rng = np.random.default_rng(0)
    observation = {a.key: rng.standard_normal((1, *a.shape)).astype(np.float32) for a in policy.spec.arm.observations}
    noise = chunk_noise((1, *policy.spec.noise_shape), 0)
    frames = wire.encode(wire.Message({"op": "infer", "id": 1}, {**observation, "noise": noise}))
    rows = []
    for transport, bind in (("ipc", "ipc://@sacflow-bench-{}"), ("tcp", "tcp://127.0.0.1:*")):
        server, address = start(serve, config.policy, bind.format("serve"))
        echoer, echo_address = start(echo, bind.format("echo"))
        socket = zmq.Context.instance().socket(zmq.DEALER)
        socket.connect(echo_address)

        def bounce(socket: zmq.Socket = socket) -> None:
            socket.send_multipart(frames)
            socket.recv_multipart()

        with PolicyClient(address) as client:
            served = percentiles(lambda: client.infer(observation, noise), config.requests)
            direct = percentiles(lambda: policy.infer(observation, noise), config.requests)
            bounced = percentiles(bounce, config.requests)
        for process in (server, echoer):
            process.terminate()
            process.join()
        socket.close(linger=0)
        row = {"velocity": policy.spec.velocity, "transport": transport, **served}
        row |= {"ort_p50_us": direct["p50_us"], "echo_p50_us": bounced["p50_us"]}
        row["ratio_p50"] = round(served["p50_us"] / (direct["p50_us"] + bounced["p50_us"]), 3)
        rows.append(row)
    return {"date": datetime.date.today().isoformat(), "machine": machine(), "rows": rows}


if __name__ == "__main__":
    settings = tyro.cli(Benchmark, description=__doc__)
    result = json.dumps(measure(settings))
    print(result)
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(result + "\n")
