"""A client's end of a connection, over real sockets."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from sacflow_robot.errors import ConnectionLost, RefusedError, UsageError
from sacflow_robot.serve.connection import Connection

pytestmark = pytest.mark.realtime

Ends = tuple[zmq.Socket[bytes], Connection]


@pytest.fixture(params=["tcp://127.0.0.1:*", f"ipc://@sacflow-test-{os.getpid()}"], ids=["tcp", "ipc"])
def router(request: pytest.FixtureRequest) -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.rcvtimeo = 5000
    socket.bind(request.param)
    yield socket
    context.destroy(linger=0)


@pytest.fixture
def ends(router: zmq.Socket[bytes]) -> Iterator[Ends]:
    own = Connection(router.getsockopt_string(zmq.LAST_ENDPOINT), 1.0)
    assert own.ready(5)
    yield router, own
    own.close()


def until(true: Callable[[], bool]) -> bool:
    """Whether it becomes so within seconds."""
    deadline = time.monotonic() + 10
    while not (so := true()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return so


def test_an_answer_is_found_awake_and_asleep(ends: Ends) -> None:
    router, own = ends
    for delay_s in (0.0, 0.001, 0.1):
        own.send([b"question"])
        peer, _ = router.recv_multipart()
        threading.Timer(delay_s, router.send_multipart, [[peer, b"answer"]]).start()
        assert own.receive(5) == [b"answer"]
        assert own.receive(0) is None and own.receive(0.003) is None


def test_a_lost_connection_ends_the_wait_and_is_said_once(ends: Ends) -> None:
    router, own = ends
    assert not own.broken()
    own.send([b"question"])
    assert router.recv_multipart()[1] == b"question"
    router.close(linger=0)
    assert own.receive(30) is None
    assert own.broken() and not own.broken()
    assert not own.ready(0.01)
    with pytest.raises(ConnectionLost):
        own.send([b"question"])
    assert own.receive(0.01) is None


def test_a_connection_is_made_again_and_keeps_nothing_of_the_one_before(ends: Ends) -> None:
    router, own = ends
    address = router.getsockopt_string(zmq.LAST_ENDPOINT)
    own.send([b"question"])
    peer, _ = router.recv_multipart()
    router.send_multipart([peer, b"answer that nobody takes"])
    router.close(linger=1000)
    assert until(own.broken)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as anew:
        anew.rcvtimeo = 5000
        assert until(lambda: bound(anew, address)) and own.ready(10)
        own.send([b"another"])
        peer, question = anew.recv_multipart()
        anew.send_multipart([peer, b"answer"])
        assert question == b"another" and own.receive(5) == [b"answer"]
        own.close()


def bound(router: zmq.Socket[bytes], address: str) -> bool:
    try:
        router.bind(address)
    except zmq.ZMQError:
        return False
    return True


def test_large_messages_arrive_whole_also_where_the_server_is_slow_to_take_them(ends: Ends) -> None:
    router, own = ends
    frames = [b"head", os.urandom(12_000_000), b"", os.urandom(300)]
    for _ in range(3):  # more than the system keeps: the caller goes on all the same
        own.send([memoryview(frame) for frame in frames])
    time.sleep(0.1)
    for _ in range(3):
        peer, *arrived = router.recv_multipart()
        assert arrived == frames
    router.send_multipart([peer, *frames])
    received = own.receive(10)
    assert received is not None and [bytes(frame) for frame in received] == frames


def test_a_connection_that_is_idle_stands(ends: Ends) -> None:
    router, own = ends
    fast = Connection(router.getsockopt_string(zmq.LAST_ENDPOINT), 0.1)
    assert fast.ready(5)
    time.sleep(0.7)  # the server forgets after 0.2 s who does not ping, the client who does not answer
    assert not fast.broken() and not own.broken()
    fast.send([b"question"])
    assert router.recv_multipart()[1] == b"question"
    fast.close()


@pytest.fixture
def stream() -> Iterator[tuple[socket.socket, str]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        yield listener, f"tcp://127.0.0.1:{listener.getsockname()[1]}"


# ZMTP 3.1, byte for byte (rfc.zeromq.org/spec/37): a ROUTER without keys introduces itself, then says nothing more.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06ROUTER"


def test_a_server_that_falls_silent_is_gone_within_two_heartbeats(stream: tuple[socket.socket, str]) -> None:
    listener, address = stream
    own = Connection(address, 0.4)
    peer, _ = listener.accept()
    with peer:
        peer.sendall(GREETING + READY)
        assert own.ready(5)
        began = time.monotonic()
        assert own.receive(30) is None and own.broken()
        assert 0.3 < time.monotonic() - began < 2
    own.close()


def test_a_name_that_cannot_be_one_is_nobody() -> None:
    for name in ("a..b", "a" * 70, "no-such-computer.invalid"):
        own = Connection(f"tcp://{name}:5555", 1.0)
        assert not own.ready(0.2)
        own.close()


def test_a_server_that_asks_for_keys_lets_nobody_in_without() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.curve_publickey, router.curve_secretkey = zmq.curve_keypair()
        router.curve_server = True
        router.bind("tcp://127.0.0.1:*")
        own = Connection(router.getsockopt_string(zmq.LAST_ENDPOINT), 1.0)
        with pytest.raises(RefusedError, match="does not let this client in"):
            own.ready(10)
        own.close()


@pytest.mark.parametrize("address", ["host:5", "tcp://host", "ipc:///" + 200 * "x"])
def test_a_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="cannot connect to"):
        Connection(address, 1.0)
