"""A client and servers that do not behave, over real sockets."""

import math
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from sacflow_robot.errors import ConnectionLost, RefusedError, RobotError, ServerError, ServerRestartedError, UsageError
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.robot.control.estop import request
from sacflow_robot.robot.control.operator import OperatorRequests
from sacflow_robot.robot.control.stop_server import StopServer
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve.auth import Security, new_keys
from sacflow_robot.serve.client import Keys, PolicyClient
from sacflow_robot.serve.server import PolicyServer

Answers = list[dict[str, Any]]
Serve = Callable[[Callable[[dict[str, Any]], Answers]], str]


def observation() -> dict[str, np.ndarray]:
    sizes = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "object": 10}
    return {key: np.zeros((1, size), np.float32) for key, size in sizes.items()}


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server that answers whatever it is told to; returns its address."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    ended, threads = threading.Event(), []

    def serve(answers: Callable[[dict[str, Any]], Answers]) -> str:
        router = context.socket(zmq.ROUTER)
        router.sndhwm = 10
        router.bind("tcp://127.0.0.1:*")

        def run() -> None:
            while not ended.is_set():
                if router.poll(20):
                    peer, *frames = router.recv_multipart()
                    for answer in answers(dict(wire.decode(frames).header)):
                        if ended.is_set():
                            break
                        router.send_multipart([peer, *wire.encode(wire.Message(answer))])
            router.close(linger=0)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return router.getsockopt_string(zmq.LAST_ENDPOINT)

    yield serve
    ended.set()
    for thread in threads:
        thread.join()
    context.destroy(linger=0)


@pytest.fixture
def welcome(policy_file: Path) -> dict[str, Any]:
    spec = OnnxPolicy(policy_file).spec.to_json()
    return {"ok": True, "spec": spec, "policy_version": "1", "session": "s", "seed": 1, "heartbeat_s": 1.0}


def test_other_answers_without_end_do_not_keep_a_client_beyond_its_timeout(
    serve: Serve, welcome: dict[str, Any]
) -> None:
    def pour(asked: dict[str, Any]) -> Answers:
        """Greet a client; once it asks, send it answers to something else, as fast as it takes them."""
        if asked["op"] == "hello":
            return [{**welcome, "id": asked["id"]}]
        return [{"ok": True, "id": 2**40}] * 100_000

    with PolicyClient(serve(pour), timeout_s=0.3) as client:
        for way in (
            lambda: client.collect(client.ask(observation()), wait_s=0),
            lambda: client.infer(observation()),
        ):
            began = time.monotonic()
            with pytest.raises((TimeoutError, ConnectionLost)):
                way()
            assert time.monotonic() - began < 3


def test_a_client_that_hears_itself_connects_anew(serve: Serve, welcome: dict[str, Any]) -> None:
    """A system can connect a socket to itself where nobody serves on a port yet."""
    asked: list[dict[str, Any]] = []

    def answer(header: dict[str, Any]) -> Answers:
        asked.append(header)
        return [header if len(asked) == 1 else {**welcome, "id": header["id"]}]

    address = serve(answer)
    with pytest.raises(ConnectionLost, match="came back"):
        PolicyClient(address)
    with PolicyClient(address) as client:
        assert client.policy_version == "1"


def test_a_forked_process_neither_ends_nor_uses_the_client_of_its_parent(server: PolicyServer) -> None:
    with PolicyClient(server.address) as client, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork: the case in question
        child = os.fork()
        if child == 0:
            says_so = False
            with suppress(BaseException):
                try:
                    client.infer(observation())
                except UsageError as error:
                    says_so = "make a new one" in str(error)
                client.close()
            os._exit(0 if says_so and not client.connected else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert client.connected and client.infer(observation()).shape == (1, 5, 7)


def test_what_is_no_zeromq_server_is_no_policy_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_answer_as_a_web_server, args=(listener,))
        thread.start()
        with pytest.raises(ConnectionLost, match="no answer"):
            PolicyClient(f"tcp://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.5)
        thread.join()


def _answer_as_a_web_server(listener: socket.socket) -> None:
    peer, _ = listener.accept()
    with peer:
        peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n".ljust(200))
        time.sleep(0.7)


@pytest.mark.parametrize("heartbeat_s", [math.nan, math.inf, 1e300, 0.0, -1.0, "soon"])
def test_a_heartbeat_that_cannot_be_kept_is_no_policy_servers(
    serve: Serve, welcome: dict[str, Any], heartbeat_s: object
) -> None:
    spoilt = {**welcome, "heartbeat_s": heartbeat_s}
    address = serve(lambda header: [{**spoilt, "id": header["id"]}])
    with pytest.raises(ServerError, match="did not introduce itself as a policy server"):
        PolicyClient(address)


@pytest.mark.parametrize("clock", [{}, {"server_ns": 2**64 - 1}, {"server_ns": -1}, {"server_ns": "noon"}])
def test_no_deadline_without_a_clock(serve: Serve, welcome: dict[str, Any], clock: dict[str, Any]) -> None:
    address = serve(lambda header: [{**welcome, **clock, "id": header["id"]}])
    with PolicyClient(address, deadline_s=0.1) as client, pytest.raises(ServerError, match="does not tell its clock"):
        client.infer(observation())


@pytest.mark.parametrize("with_keys", [False, True])
def test_a_closed_client_says_so(policy_file: Path, tmp_path: Path, with_keys: bool) -> None:
    server_key, own_key = new_keys(tmp_path, "server")[1], new_keys(tmp_path / "clients", "arm")[1]
    security = Security(server_key, tmp_path / "clients") if with_keys else None
    keys = Keys(own_key, tmp_path / "server.key") if with_keys else None
    with PolicyServer(OnnxPolicy(policy_file), "tcp://127.0.0.1:*", security=security).start() as server:
        client = PolicyClient(server.address, keys=keys)
        number = client.ask(observation())
        client.close()
        client.close()
        assert not client.connected
        calls = (
            client.begin_episode,
            client.status,
            lambda: client.infer(observation()),
            lambda: client.ask(observation()),
        )
        for call in (*calls, lambda: client.collect(number), lambda: client.collect(number, 0)):
            with pytest.raises(UsageError, match="is closed"):
                call()


def test_a_key_taken_off_the_list_ends_what_its_client_may_do(policy_file: Path, tmp_path: Path) -> None:
    server_key, folder = new_keys(tmp_path, "server")[1], tmp_path / "clients"
    (public, own_key), other_key = new_keys(folder, "arm"), new_keys(folder, "other")[1]
    policy, spare = OnnxPolicy(policy_file), public.read_bytes()
    with (
        PolicyServer(policy, "tcp://127.0.0.1:*", security=Security(server_key, folder)).start() as server,
        PolicyClient(server.address, keys=Keys(own_key, tmp_path / "server.key")) as client,
        PolicyClient(server.address, keys=Keys(other_key, tmp_path / "server.key")) as other,
    ):
        for _ in range(3):
            assert client.infer(observation()).shape == other.infer(observation()).shape
        for change in (public.unlink, lambda: public.write_bytes((folder / "other.key").read_bytes())):
            change()
            time.sleep(0.4)
            for asked in (lambda: client.infer(observation()), client.status, client.begin_episode):
                with pytest.raises(RefusedError, match="key is not on the server's list any more"):
                    asked()
            assert other.infer(observation()).shape == (1, 5, 7)
            assert [session.client for session in server.sessions._sessions.values()] == ["python"], "the other one's"
        public.write_bytes(spare)
        time.sleep(0.4)
        with pytest.raises(ServerRestartedError):
            client.infer(observation())
        assert client.infer(observation()).shape == (1, 5, 7), "and in again, in a session of its own"


def test_a_folder_of_keys_that_is_gone_lets_nobody_ask(policy_file: Path, tmp_path: Path) -> None:
    server_key, own_key = new_keys(tmp_path, "server")[1], new_keys(tmp_path / "clients", "arm")[1]
    security = Security(server_key, tmp_path / "clients")
    with (
        PolicyServer(OnnxPolicy(policy_file), "tcp://127.0.0.1:*", security=security).start() as server,
        PolicyClient(server.address, keys=Keys(own_key, tmp_path / "server.key")) as client,
    ):
        assert client.infer(observation()).shape == (1, 5, 7)
        (tmp_path / "clients").rename(tmp_path / "elsewhere")
        time.sleep(0.4)
        with pytest.raises(RefusedError, match="key is not on the server's list any more"):
            client.infer(observation())


@pytest.mark.parametrize("verb", ["stop", "enable"])
def test_a_stop_sent_to_a_policy_server_is_told_where_to_go(policy_file: Path, verb: str) -> None:
    with PolicyServer(OnnxPolicy(policy_file), "tcp://127.0.0.1:*").start() as server:
        with pytest.raises(RobotError, match=r"refused to .*this is a policy server.*run --estop"):
            request(server.address, verb, timeout_s=3.0)
        with PolicyClient(server.address) as client:
            assert client.infer(observation()).shape == (1, 5, 7)


def test_a_client_that_asks_a_stop_server_is_told_so() -> None:
    expected = r"is where a robot listens for stops \(run --estop\)"
    with StopServer("tcp://127.0.0.1:0", OperatorRequests()) as server, pytest.raises(ServerError, match=expected):
        PolicyClient(server.address)


@pytest.mark.parametrize("shape", [(0, 5, 7), (1, 5, 6), (5, 7)])
@pytest.mark.parametrize("kind", ["<f4", "<f8"])
def test_what_are_no_actions_is_said(
    serve: Serve, welcome: dict[str, Any], shape: tuple[int, ...], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = serve(lambda header: [{**welcome, "id": header["id"]}])
    with PolicyClient(address) as client:
        actions = np.zeros(shape, kind)
        monkeypatch.setattr(client, "_await", lambda *_: wire.Message({"ok": True}, {"actions": actions}))
        with pytest.raises(ServerError, match=r"without float32 actions of shape \(B, 5, 7\)"):
            client.infer(observation())


@pytest.mark.parametrize("kind", [zmq.PUB, zmq.PULL, zmq.PAIR])
def test_a_socket_that_takes_no_requests_is_no_server(kind: int) -> None:
    with zmq.Context() as context, context.socket(kind) as other:
        other.linger = 0
        other.bind("tcp://127.0.0.1:*")
        # libzmq tells a socket that hangs up from a server with keys by neither event nor value.
        with pytest.raises(ServerError, match=r"no answer|does not let this client in"):
            PolicyClient(other.getsockopt_string(zmq.LAST_ENDPOINT), 0.3)


def test_a_wait_for_actions_ends_once_a_person_asks_for_a_stop(serve: Serve, welcome: dict[str, Any]) -> None:
    def greet_only(asked: dict[str, Any]) -> Answers:
        return [{**welcome, "id": asked["id"]}] if asked["op"] == "hello" else []

    with PolicyClient(serve(greet_only), 30.0) as client:
        requests = OperatorRequests()
        client.interrupted = lambda: requests.halt_pending
        requests.enable()
        number = client.ask(observation())
        with pytest.raises(TimeoutError):
            client.collect(number, 0.1)
        threading.Timer(0.2, requests.stop, ("enough",)).start()
        began = time.monotonic()
        with pytest.raises(ServerError, match="ended by a person's request"):
            client.collect(number)
        assert time.monotonic() - began < 5
