"""Servers that are killed, stopped and started again, in processes of their own."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from sacflow_robot.errors import ConnectionLost, RefusedError, ServerError, ServerRestartedError
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve.client import PolicyClient

pytestmark = pytest.mark.realtime

Start = Callable[..., "subprocess.Popen[str]"]


def observation() -> dict[str, np.ndarray]:
    sizes = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "object": 10}
    return {key: np.zeros((1, size), np.float32) for key, size in sizes.items()}


@pytest.fixture
def address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def start(policy_file: Path, address: str) -> Iterator[Start]:
    running: list[subprocess.Popen[str]] = []

    def start(*options: object) -> subprocess.Popen[str]:
        words = ["serve", "--policy", policy_file, "--bind", address, "--threads", 1, *options]
        command = [sys.executable, "-m", "sacflow_robot", *map(str, words)]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        running.append(server)
        assert server.stderr is not None
        assert "self-test passed" in server.stderr.readline()
        return server

    yield start
    for server in running:
        server.kill()
        server.communicate()


def resumed(client: PolicyClient) -> np.ndarray:
    """The first answer after a crash; the client is asked again, not connected again."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return client.infer(observation())
        except ServerError:
            if time.monotonic() > deadline:
                raise


def test_a_killed_server_is_noticed_and_a_new_one_found(start: Start, address: str) -> None:
    server = start()
    with PolicyClient(address, timeout_s=5) as client:
        client.begin_episode(7)
        client.infer(observation())
        assert client.connected
        server.send_signal(signal.SIGSTOP)  # the request reaches it, and it never answers
        number = client.ask(observation())
        server.kill()
        server.wait()
        began = time.monotonic()
        with pytest.raises(ConnectionLost, match=r"connection to .* is lost"):
            client.collect(number)
        assert time.monotonic() - began < 5, "that is the timeout; heartbeats tell earlier"
        assert not client.connected
        start()
        assert resumed(client).shape == (1, 5, 7)
        header = client.last_header
        assert client.connected and (header["seed"], header["step"]) == (7, 2), (
            "the episode's noise, after the lost chunk's"
        )


def test_a_server_that_hangs_is_gone_as_far_as_heartbeats_tell(start: Start, address: str) -> None:
    server = start("--heartbeat", 0.2)
    with PolicyClient(address, timeout_s=30) as client:
        client.infer(observation())
        session = client._session
        server.send_signal(signal.SIGSTOP)
        with pytest.raises(ConnectionLost, match="is lost"):
            client.infer(observation())
        with pytest.raises(ConnectionLost, match="is being made again"):
            client.ask(observation())  # at once, not after 30 s
        server.send_signal(signal.SIGCONT)
        assert resumed(client).shape == (1, 5, 7)
        assert client._session == session and len(client.status()["clients"]) == 1, "it was there all the time"


def test_nothing_sent_to_a_server_that_died_is_acted_on_by_the_next(start: Start, address: str) -> None:
    """A client that queues, as plain DEALER sockets do: what it sent is delivered to the next server, which refuses it."""
    server = start()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        plain = context.socket(zmq.DEALER)
        plain.connect(address)
        plain.send_multipart(wire.encode(wire.Message({"op": "hello", "id": 1})))
        assert plain.poll(5000)
        session = wire.decode(plain.recv_multipart()).header["session"]
        server.kill()
        server.wait()
        for identifier in (2, 3):
            header = {"op": "infer", "id": identifier, "session": session}
            plain.send_multipart(wire.encode(wire.Message(header, observation())))
        start()
        with PolicyClient(address, timeout_s=20) as client:
            for _ in range(2):
                assert plain.poll(10_000)
                reply = wire.decode(plain.recv_multipart())
                assert reply.header["error"]["kind"] == "session" and not reply.arrays
            assert client.status()["requests"] == 0
            client._session = session  # one that has not noticed the restart
            client._linked = True
            with pytest.raises(ServerRestartedError, match="nothing asked before counts"):
                client.infer(observation())
            assert client.infer(observation()).shape == (1, 5, 7)
    finally:
        context.destroy(linger=0)


def test_a_server_asked_to_stop_answers_what_has_come(start: Start, address: str) -> None:
    server = start()
    with PolicyClient(address, timeout_s=10) as client:
        client.infer(observation())
        server.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        number = client.ask(observation())
        server.send_signal(signal.SIGTERM)
        server.send_signal(signal.SIGCONT)
        assert client.collect(number).shape == (1, 5, 7)
        assert server.wait(10) == 0
        with pytest.raises(ServerError):
            client.infer(observation())


def test_keys_keep_others_out(start: Start, address: str, tmp_path: Path) -> None:
    from sacflow_robot.cli import main
    from sacflow_robot.serve.client import Keys

    for folder, name in (("", "server"), ("allowed", "arm"), ("elsewhere", "stranger")):
        assert main(["keys", "new", name, "--out", str(tmp_path / folder)]) == 0
    secret = tmp_path / "allowed" / "arm.key_secret"
    assert secret.stat().st_mode & 0o077 == 0
    start("--key", tmp_path / "server.key_secret", "--clients", tmp_path / "allowed", "--heartbeat", 0.2)
    with PolicyClient(address, keys=Keys(secret, tmp_path / "server.key")) as client:
        assert client.infer(observation()).shape == (1, 5, 7)
        with pytest.raises(RefusedError, match="does not let this client in"):
            PolicyClient(address, keys=Keys(tmp_path / "elsewhere" / "stranger.key_secret", tmp_path / "server.key"))
        with pytest.raises(ServerError):
            PolicyClient(address, timeout_s=0.5)
        (tmp_path / "elsewhere" / "stranger.key").rename(tmp_path / "allowed" / "stranger.key")
        stranger = Keys(tmp_path / "elsewhere" / "stranger.key_secret", tmp_path / "server.key")
        with PolicyClient(address, keys=stranger) as added:
            assert added.infer(observation()).shape == (1, 5, 7)
        assert client.infer(observation()).shape == (1, 5, 7)
