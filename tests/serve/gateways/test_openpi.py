"""The gateway with the real openpi client."""

import random
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import msgpack
import numpy as np
import pytest
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from sacflow_robot.errors import WireError
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.serve.gateways.openpi import OpenpiGateway, unpack
from tests.serve.raw_client import observation as batched

# openpi-client 0.1.2 opens its connection as websockets before 17 liked it.
pytestmark = pytest.mark.filterwarnings(r"ignore:connect\(\) must be used as a context manager:DeprecationWarning")


@pytest.fixture
def policy(policy_file: Path) -> OnnxPolicy:
    return OnnxPolicy(policy_file)


@pytest.fixture
def gateway(policy: OnnxPolicy) -> Iterator[OpenpiGateway]:
    with closing(OpenpiGateway(lambda: policy, "127.0.0.1", 0)) as running:
        yield running


def observation() -> dict[str, np.ndarray]:
    return {key: array[0] for key, array in batched().items()}


@pytest.mark.parametrize("prefix", ["", "observation/"])
def test_the_real_client_gets_the_policys_actions(gateway: OpenpiGateway, policy: OnnxPolicy, prefix: str) -> None:
    client = WebsocketClientPolicy("127.0.0.1", gateway.port)
    metadata = client.get_server_metadata()
    assert metadata["fingerprint"] == policy.spec.fingerprint and metadata["action_horizon"] == 5
    gateway._noise, noises = np.random.default_rng(3), np.random.default_rng(3)
    for count in (1, 2):
        answer = client.infer({prefix + key: array for key, array in observation().items()} | {"prompt": "lift it"})
        noise = noises.standard_normal((1, 5, 7), dtype=np.float32)
        assert np.array_equal(answer["actions"], policy.infer(batched(), noise)[0])
        assert 0 < answer["policy_timing"]["infer_ms"] <= answer["server_timing"]["infer_ms"]
        assert ("prev_total_ms" in answer["server_timing"]) == (count == 2)
    client._ws.close()


def test_health(gateway: OpenpiGateway) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{gateway.port}/healthz", timeout=5) as answer:
        assert answer.read() == b"OK\n"


def test_an_error_is_text_and_then_the_end_and_the_next_client_is_served(gateway: OpenpiGateway) -> None:
    bad = {**observation(), "object": np.full(10, np.nan, np.float32)}
    client = WebsocketClientPolicy("127.0.0.1", gateway.port)
    with pytest.raises(RuntimeError, match="'object' contains NaN"):
        client.infer(bad)
    with connect(f"ws://127.0.0.1:{gateway.port}", compression=None) as raw:
        raw.recv()
        raw.send(msgpack_numpy.packb({"object": observation()["object"]}))
        text = raw.recv()
        assert isinstance(text, str) and "lacks 'robot0_eef_pos'" in text
        with pytest.raises(ConnectionClosed) as closed:
            raw.recv()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1011
    client = WebsocketClientPolicy("127.0.0.1", gateway.port)
    assert client.infer(observation())["actions"].shape == (5, 7)
    client._ws.close()


def test_nonsense_is_neither_executed_nor_repeated(gateway: OpenpiGateway) -> None:
    rng, secret = random.Random(0), b"TOPSECRET"
    good = msgpack_numpy.packb(observation())
    array = {b"__ndarray__": True, b"data": secret, b"dtype": "|O", b"shape": (1,)}
    messages: list[bytes] = [
        msgpack.packb({"object": {**array, b"dtype": d}}) for d in ("|O", "c16", "<f4,<i4", ",<f4", "V9", "x", 3)
    ]
    messages += [msgpack.packb(secret), msgpack.packb({secret: 1}), msgpack.packb({"object": secret}), b"\x81" * 3000]
    messages += [
        msgpack.packb({"object": {**array, b"dtype": "<f4", b"shape": s}}) for s in ((-1,), (2**62, 4), "x", (9,))
    ]
    messages += [good[: rng.randrange(len(good))] for _ in range(20)]
    messages += [bytes(rng.randrange(256) for _ in range(rng.randrange(60))) for _ in range(40)]
    for message in messages:
        with connect(f"ws://127.0.0.1:{gateway.port}", compression=None) as raw, suppress(ConnectionClosed):
            raw.recv()
            raw.send(message)
            answer = raw.recv()
            assert isinstance(answer, str) and "TOPSECRET" not in answer and "Traceback" not in answer
    client = WebsocketClientPolicy("127.0.0.1", gateway.port)
    assert client.infer(observation())["actions"].shape == (5, 7)
    client._ws.close()


def test_a_message_of_many_small_values_does_not_hold_up_others(gateway: OpenpiGateway) -> None:
    """The interpreter does nothing else while a message is read."""
    many = msgpack.packb({"object": [[{}] * 1000] * 4000})
    began = time.thread_time()
    with pytest.raises(WireError, match="not msgpack of plain values"):
        unpack(many)
    assert time.thread_time() - began < 0.25
    large = {"image": np.zeros((1024, 1024, 3), np.uint8), "list": [[0.5] * 7] * 1000}
    assert unpack(msgpack_numpy.packb(large))["image"].shape == (1024, 1024, 3), "a large array is one value"
