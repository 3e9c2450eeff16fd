"""Stops over a real socket."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from sacflow_robot.cli import main
from sacflow_robot.errors import DataError, RobotError, UsageError
from sacflow_robot.robot.control import stop_server
from sacflow_robot.robot.control.estop import PENDING, proof_of, read_key, request
from sacflow_robot.robot.control.operator import OperatorInput, OperatorRequests
from sacflow_robot.robot.control.stop_server import StopServer

KEY = b"0123456789abcdef0123456789abcdef"
ANYWHERE = "tcp://127.0.0.1:0"


def put(address: str, verb: str, reason: str = "", key: bytes = b"") -> str:
    """A request to a robot that never says what became of it."""
    return request(address, verb, reason, key, timeout_s=0.5)


@contextmanager
def loop(requests: OperatorRequests, braking_s: float = 0.1, refuse: bool = False) -> Iterator[None]:
    """Plays a control loop: comes to rest within a time, and is enabled at once, or refuses to be."""
    ended = threading.Event()

    def run() -> None:
        state, at_rest = "running", 0.0
        while not ended.wait(0.005):
            found = requests.take()
            if found.stop and state != "stopped":
                state, at_rest = "stopped", time.monotonic() + braking_s
            elif found.enable and not refuse and time.monotonic() > at_rest:
                state = "running"
            requests.report(state, state == "running" or time.monotonic() > at_rest)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def client(address: str) -> Iterator[zmq.Socket[bytes]]:
    """A client that speaks the protocol by itself."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(address)
        yield socket


def ask(socket: zmq.Socket[bytes], *frames: bytes) -> list[bytes]:
    socket.send_multipart(frames)
    assert socket.poll(2000)
    return socket.recv_multipart()


def test_a_stop_arrives_with_its_reason_and_an_arming_needs_the_key() -> None:
    requests = OperatorRequests()
    with StopServer(ANYWHERE, requests, KEY) as server:
        assert put(server.address, "stop", "smoke", KEY) == PENDING
        assert requests.take() == OperatorInput("stopped over the network: smoke")
        put(server.address, "enable", key=KEY)
        assert requests.take() == OperatorInput(enable=True) and requests.take() == OperatorInput()
        for verb, key in (("stop", b""), ("stop", b"x" * 32), ("enable", b"")):
            with pytest.raises(RobotError, match="the key is not the right one"):
                put(server.address, verb, key=key)
        with pytest.raises(RobotError, match="unknown request"):
            put(server.address, "home", key=KEY)
        assert requests.take() == OperatorInput()


def test_without_a_key_this_machine_may_stop_and_nobody_arm() -> None:
    requests = OperatorRequests()
    with StopServer(ANYWHERE, requests) as server:
        put(server.address, "stop")
        assert requests.take().stop == "stopped over the network"
        with pytest.raises(RobotError, match="enabling over the network needs a key"):
            put(server.address, "enable")
    for address in ("tcp://0.0.0.0:0", "tcp://*:0"):
        with pytest.raises(UsageError, match="needs a key"):
            StopServer(address, requests)


def test_the_answer_is_the_state_that_was_reached() -> None:
    requests = OperatorRequests()
    with StopServer(ANYWHERE, requests, KEY) as server, loop(requests):
        began = time.monotonic()
        assert request(server.address, "stop", key=KEY) == "stopped"
        assert time.monotonic() - began >= 0.1, "once at rest"
        assert request(server.address, "stop", key=KEY) == "stopped", "again"
        assert request(server.address, "enable", key=KEY) == "running"
    with StopServer(ANYWHERE, requests, KEY) as server, loop(requests, refuse=True):
        request(server.address, "stop", key=KEY)
        assert request(server.address, "enable", key=KEY) == "stopped"


def test_others_are_answered_while_one_waits_for_its_state() -> None:
    requests = OperatorRequests()
    with StopServer(ANYWHERE, requests) as server, client(server.address) as socket:
        waiting = threading.Thread(target=request, args=(server.address, "stop"), kwargs={"timeout_s": 0.5})
        waiting.start()
        began = time.monotonic()
        for _ in range(50):
            assert len(ask(socket, b"challenge")[0]) == 32
        assert waiting.is_alive() and time.monotonic() - began < 0.4
        waiting.join()


def test_the_command_says_the_state_and_fails_without_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(KEY)
    requests = OperatorRequests()
    with StopServer(ANYWHERE, requests, KEY) as server:
        words = ["estop", server.address, "--key", str(tmp_path / "key")]
        with loop(requests):
            assert main(words) == 0 and capsys.readouterr().out == f"{server.address}: stopped\n"
            assert main([*words, "--arm"]) == 0 and capsys.readouterr().out == f"{server.address}: running\n"
        with loop(requests, refuse=True):
            main(words)
            capsys.readouterr()
            assert main([*words, "--arm"]) == 1 and "stays in stopped" in capsys.readouterr().err
        assert main([*words, "--timeout", "0.3"]) == 1
        said = capsys.readouterr()
        assert not said.out and "accepted" in said.err and "USE THE ROBOT'S OWN STOP BUTTON" in said.err


def test_what_was_overheard_cannot_be_sent_again() -> None:
    """A proof is for one challenge of one connection; noise of any kind is refused, and the server goes on."""
    requests = OperatorRequests()
    with StopServer(ANYWHERE, requests, KEY) as server, client(server.address) as one, client(server.address) as other:
        for frames in ([b"stop", b"", b"proof"], [b""], [b"\xff" * 4000], [b"challenge", b"challenge"], [b"x"] * 8):
            assert ask(one, *frames)[0] == b"refused"
        nonce = ask(one, b"challenge")[0]
        enabling = b"arm", b"", proof_of(KEY, nonce, b"arm", b"")
        ask(other, b"challenge")
        assert ask(other, *enabling)[0] == b"refused", "another connection's"
        assert ask(one, *enabling)[0] == b"ok" and requests.take() == OperatorInput(enable=True)
        assert ask(one, *enabling)[0] == b"refused"
        for _ in range(3):
            assert ask(one, b"challenge")[0] != nonce and ask(one, *enabling)[0] == b"refused"
        assert ask(one, b"outcome", b"\0" * 24)[0] == ask(one, b"outcome", b"")[0] == b"refused"
        assert requests.take() == OperatorInput()
        put(server.address, "stop", key=KEY)
        assert requests.take().stop


def test_a_challenge_is_not_valid_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_server, "_NONCE_S", 0.05)
    with StopServer(ANYWHERE, OperatorRequests(), KEY) as server, client(server.address) as socket:
        nonce = ask(socket, b"challenge")[0]
        time.sleep(0.12)
        assert ask(socket, b"arm", b"", proof_of(KEY, nonce, b"arm", b""))[0] == b"refused"


def test_a_client_of_an_earlier_version_stops_and_what_it_says_is_printable() -> None:
    requests = OperatorRequests()
    with StopServer(ANYWHERE, requests, KEY) as server, client(server.address) as socket:
        nonce, reason = ask(socket, b"challenge")[0], b"\x1b[2J\xff\n"
        assert ask(socket, b"stop", reason, proof_of(KEY, nonce, b"stop", reason))[0] == b"ok"
        assert requests.take().stop == "stopped over the network: ?[2J�?"


FLOOD = """
import sys, time, zmq
context = zmq.Context()
context.set(zmq.MAX_SOCKETS, 2000)
sockets = []
for _ in range(400):
    socket = context.socket(zmq.DEALER)
    socket.connect(sys.argv[1])
    sockets.append(socket)
print("up", flush=True)
while True:
    for i, socket in enumerate(sockets):
        try:
            junk = [b"x"] * 3000 if sys.argv[2] == "frames" else [b"home", b"", b"no proof"]
            socket.send_multipart([b"challenge"] if i % 2 else junk, zmq.NOBLOCK)
        except zmq.Again:
            pass
        while i % 3 and socket.poll(0):  # every third reads no answers
            socket.recv()
"""


@pytest.mark.realtime
@pytest.mark.parametrize(("key", "junk"), [(b"", "requests"), (KEY, "requests"), (KEY, "frames")])
def test_a_flood_from_connections_without_a_key_stops_no_stop(key: bytes, junk: str) -> None:
    requests = OperatorRequests()
    with StopServer(ANYWHERE, requests, key) as server, loop(requests, braking_s=0.0):
        flood = subprocess.Popen([sys.executable, "-c", FLOOD, server.address, junk], stdout=subprocess.PIPE)
        try:
            assert flood.stdout is not None and flood.stdout.readline() == b"up\n"
            time.sleep(0.5)
            for _ in range(30):
                assert request(server.address, "stop", key=key) == "stopped"
        finally:
            flood.kill()
            flood.communicate()


class FailsOnce(OperatorRequests):
    def stop(self, reason: str) -> int:
        if not self.state:
            self.report("running", False)
            raise RuntimeError("no room for a reason")
        return super().stop(reason)


def test_an_error_is_said_and_the_server_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = FailsOnce()
    with StopServer(ANYWHERE, requests) as server:
        put(server.address, "stop", "twice")
        assert requests.take().stop == "stopped over the network: twice", "the client tried again"
        monkeypatch.setattr(server, "_receive", lambda: 1 / 0)
        time.sleep(0.3)
        with pytest.raises(RobotError, match="no answer"):
            put(server.address, "stop")
        monkeypatch.undo()
        put(server.address, "stop", "third")
        assert requests.take().stop == "stopped over the network: third"
    said = capsys.readouterr().err
    assert "no room for a reason" in said and said.count("goes on after an error: division by zero") == 1


@contextmanager
def deaf(silent: int, answers: list[list[bytes]]) -> Iterator[tuple[str, list[list[bytes]]]]:
    """A stop server that swallows the first messages; its address, and what it heard after the challenges."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 0
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        heard: list[list[bytes]] = []
        ended = threading.Event()

        def serve() -> None:
            count = 0
            while not ended.is_set():
                if not socket.poll(20):
                    continue
                who, *frames = socket.recv_multipart()
                count += 1
                if frames != [b"challenge"]:
                    heard.append(frames)
                if count > silent:
                    socket.send_multipart([who, bytes(32)] if frames == [b"challenge"] else [who, *answers.pop(0)])

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"tcp://127.0.0.1:{port}", heard
        ended.set()
        thread.join()


def test_a_lost_message_is_sent_again_but_never_an_enabling_one() -> None:
    with deaf(1, [[b"ok"]]) as (address, heard):
        assert request(address, "enable", key=KEY) == PENDING and len(heard) == 1
    with deaf(1, [[b"failed", b"for once"], [b"ok", b"pending", b"1"], [b"ok", b"hold"]]) as (address, heard):
        assert request(address, "stop") == "hold"
        assert [frames[0] for frames in heard] == [b"stop", b"stop", b"outcome"]
    with deaf(10**6, []) as (address, heard), pytest.raises(RobotError, match="USE THE ROBOT'S OWN STOP BUTTON"):
        request(address, "stop", timeout_s=0.6)
    with deaf(0, [[b"failed", b"for once"], [b"ok"]]) as (address, heard):
        with pytest.raises(RobotError, match="for once"):
            request(address, "enable", key=KEY, timeout_s=0.6)
        assert len(heard) == 1, "who knows what happened since"


def test_nobody_there_says_what_to_do_instead() -> None:
    began = time.monotonic()
    with pytest.raises(RobotError, match="USE THE ROBOT'S OWN STOP BUTTON"):
        request("tcp://127.0.0.1:9", "stop", timeout_s=0.2)
    assert time.monotonic() - began < 2
    with pytest.raises(UsageError, match="cannot connect to nonsense"):
        request("nonsense", "stop")


def test_another_kind_of_server_is_named() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 0
        address = f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"

        def serve() -> None:
            who, *_ = socket.recv_multipart()
            socket.send_multipart([who, b"\x81\xa4kind\xa5error", b"no request"])

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(RobotError, match="is not a stop server; give the address of run --estop"):
            request(address, "stop")
        thread.join()


def test_one_process_at_a_time_listens_at_a_unix_socket(tmp_path: Path) -> None:
    address, requests = f"ipc://{tmp_path}/stop.sock", OperatorRequests()
    for _ in range(2):
        with StopServer(address, requests):
            with pytest.raises(UsageError, match="another process serves there"):
                StopServer(address, OperatorRequests())
            put(address, "stop")
            assert requests.take().stop, "the first has the address still"


def test_keys_are_read_and_weak_ones_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(KEY + b"\n")
    assert read_key(tmp_path / "key") == KEY and read_key(None) == b""
    (tmp_path / "weak").write_bytes(b"1234")
    with pytest.raises(DataError, match="shorter than 16 bytes"):
        read_key(tmp_path / "weak")
    with pytest.raises(DataError, match="cannot be read"):
        read_key(tmp_path / "absent")
