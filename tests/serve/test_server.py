"""Server and client over real sockets on free ports."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import onnxruntime
import pytest
import zmq

from sacflow_robot.errors import ServerError, UsageError
from sacflow_robot.randomness import chunk_noise
from sacflow_robot.serve import wire
from sacflow_robot.serve.client import PolicyClient
from sacflow_robot.serve.policy import OnnxPolicy
from sacflow_robot.serve.server import PolicyServer

ANY_PORT = "tcp://127.0.0.1:*"


@pytest.fixture
def server(policy_file: Path) -> Iterator[PolicyServer]:
    with PolicyServer(OnnxPolicy(policy_file), ANY_PORT) as running:
        yield running.start()


def observation(batch: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "object": 10}
    return {key: rng.standard_normal((batch, size)).astype(np.float32) for key, size in sizes.items()}


def test_served_actions_equal_onnx_runtime_bit_for_bit(server: PolicyServer, policy_file: Path) -> None:
    session = onnxruntime.InferenceSession(policy_file, providers=["CPUExecutionProvider"])
    with PolicyClient(server.address) as client:
        assert client.spec == OnnxPolicy(policy_file).spec
        for batch, seed in ((1, 0), (1, 1), (3, 2)):
            noise = chunk_noise((batch, 5, 7), seed)
            served = client.infer(observation(batch, seed), noise)
            (direct,) = session.run(None, {**observation(batch, seed), "noise": noise})
            assert np.array_equal(served, direct)
        assert client.policy_version == client.last_header["policy_version"]
        timings = client.last_header["timings_us"]
        assert 0 < timings["infer"] <= timings["total"]


def ask(server: PolicyServer, frames: list[bytes]) -> wire.Message:
    """Send raw frames and return the reply, as a client in another language would."""
    context = zmq.Context()
    try:
        socket = context.socket(zmq.DEALER)
        socket.connect(server.address)
        socket.send_multipart(frames)
        assert socket.poll(2000)
        return wire.decode(socket.recv_multipart())
    finally:
        context.destroy(linger=0)


def test_the_server_draws_noise_from_a_seed_and_tells_which(server: PolicyServer, policy_file: Path) -> None:
    def infer(**fields: object) -> wire.Message:
        return ask(server, wire.encode(wire.Message({"op": "infer", "id": 1, **fields}, observation())))

    seeded = infer(seed=42)
    expected = OnnxPolicy(policy_file).infer(observation(), chunk_noise((1, 5, 7), 42))
    assert seeded.header["seed"] == 42 and np.array_equal(seeded.arrays["actions"], expected)
    drawn = infer()
    again = infer(seed=drawn.header["seed"])
    assert np.array_equal(drawn.arrays["actions"], again.arrays["actions"])
    for bad in (-1, "x", 1.5, True):
        assert "non-negative integer" in infer(seed=bad).header["error"]["message"]


def test_bad_requests_are_answered_and_the_server_goes_on(server: PolicyServer) -> None:
    with PolicyClient(server.address) as client:
        noise = chunk_noise((1, 5, 7), 0)
        bad = {**observation(), "object": np.full((1, 10), np.nan, np.float32)}
        with pytest.raises(ServerError, match="refused the request: observation 'object' holds NaN"):
            client.infer(bad, noise)
        with pytest.raises(ServerError, match="lacks 'robot0_eef_pos'"):
            client.infer({"object": bad["object"]}, noise)
        assert client.infer(observation(), noise).shape == (1, 5, 7)
    for frames in ([b"junk"], [b""], [b"\x80"], [b"\x81\xa1v\x01", b"extra"]):
        reply = ask(server, frames)
        assert reply.header["ok"] is False and reply.header["error"]["kind"] == "WireError"
    for shape in ([float("inf")], [2**62, 0], [1] * 70, [2**40, 0], [True], "x", [-1], [None]):
        layout = [{"name": "robot0_eef_pos", "dtype": "<f4", "shape": shape}]
        reply = ask(server, [msgpack.packb({"v": 1, "op": "infer", "id": 1, "arrays": layout}), b""])
        assert reply.header["error"]["kind"] == "WireError", shape
    scalar = wire.encode(wire.Message({"op": "infer"}, {"robot0_eef_pos": np.float32(1)}))
    assert "shape ()" in ask(server, scalar).header["error"]["message"]
    crowd = wire.encode(wire.Message({"op": "infer"}, {"robot0_eef_pos": np.zeros((5000, 3), np.float32)}))
    assert "batch of 5000" in ask(server, crowd).header["error"]["message"]
    unknown = ask(server, wire.encode(wire.Message({"op": "kill", "id": 9})))
    assert unknown.header["id"] == 9 and "valid: hello, infer" in unknown.header["error"]["message"]
    empty = ask(server, wire.encode(wire.Message({"op": "infer", "id": 1})))
    assert empty.header["ok"] is False
    with PolicyClient(server.address) as client:
        assert client.infer(observation(), noise).shape == (1, 5, 7)


def test_several_clients_each_get_their_own_answers(server: PolicyServer) -> None:
    with PolicyClient(server.address) as a, PolicyClient(server.address) as b:
        noise = chunk_noise((1, 5, 7), 0)
        first = [c.infer(observation(seed=s), noise) for s, c in ((1, a), (2, b))]
        second = [c.infer(observation(seed=s), noise) for s, c in ((2, a), (1, b))]
    assert np.array_equal(first[0], second[1]) and np.array_equal(first[1], second[0])
    assert not np.array_equal(first[0], first[1])


def test_no_server_is_said_within_the_timeout() -> None:
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"no answer from tcp://127.0.0.1:9 within 0.3 s.*sacflow-robot serve"):
        PolicyClient("tcp://127.0.0.1:9", timeout_s=0.3)
    assert time.monotonic() - began < 5
    with pytest.raises(ServerError, match="cannot connect to nonsense"):
        PolicyClient("nonsense")


def test_a_late_answer_is_not_taken_for_the_next_one(policy_file: Path) -> None:
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(ANY_PORT)
    address = router.getsockopt_string(zmq.LAST_ENDPOINT)
    spec = OnnxPolicy(policy_file).spec
    import threading

    def slow_server() -> None:
        def reply(client: bytes, header: dict[str, object], value: float) -> None:
            arrays = {"actions": np.full((1, 5, 7), value, np.float32)}
            router.send_multipart([client, *wire.encode(wire.Message({"ok": True, **header}, arrays))])

        client, *frames = router.recv_multipart()
        hello = {"spec": spec.to_json(), "policy_version": "1"}
        reply(client, {"id": wire.decode(frames).header["id"], **hello}, 0)
        _, *late = router.recv_multipart()
        _, *frames = router.recv_multipart()
        reply(client, {"id": wire.decode(late).header["id"], "policy_version": "1"}, 1)
        reply(client, {"id": wire.decode(frames).header["id"], "policy_version": "1"}, 2)

    thread = threading.Thread(target=slow_server)
    thread.start()
    try:
        with PolicyClient(address, timeout_s=0.5) as client:
            noise = chunk_noise((1, 5, 7), 0)
            with pytest.raises(ServerError, match="no answer"):
                client.infer(observation(), noise)
            assert client.infer(observation(), noise)[0, 0, 0] == 2
    finally:
        thread.join()
        context.destroy(linger=0)


def test_a_client_notices_that_the_policy_was_replaced(policy_file: Path) -> None:
    policy = OnnxPolicy(policy_file)
    with PolicyServer(policy, ANY_PORT) as server, PolicyClient(server.start().address) as client:
        policy.version = "another"
        with pytest.raises(ServerError, match="serves another policy by now"):
            client.infer(observation(), chunk_noise((1, 5, 7), 0))


def test_a_port_in_use(server: PolicyServer, policy_file: Path) -> None:
    with pytest.raises(UsageError, match="it is in use; give another address with --bind"):
        PolicyServer(OnnxPolicy(policy_file), server.address)
    for port in ("99999", "-1", "5\n5", "x", ""):
        with pytest.raises(UsageError, match="is no port"):
            PolicyServer(OnnxPolicy(policy_file), f"tcp://127.0.0.1:{port}")
    with pytest.raises(UsageError, match="cannot bind nonsense"):
        PolicyServer(OnnxPolicy(policy_file), "nonsense")


def test_a_file_is_not_turned_into_a_socket(policy_file: Path, tmp_path: Path) -> None:
    precious = tmp_path / "notes"
    precious.write_text("precious")
    with pytest.raises(UsageError, match="notes exists"):
        PolicyServer(OnnxPolicy(policy_file), f"ipc://{precious}")
    assert precious.read_text() == "precious"
    for _ in range(2):  # its own socket is gone once it stops
        with PolicyServer(OnnxPolicy(policy_file), f"ipc://{tmp_path}/cell") as server:
            server.start()
            with pytest.raises(UsageError, match="cell exists"):
                PolicyServer(OnnxPolicy(policy_file), f"ipc://{tmp_path}/cell")
