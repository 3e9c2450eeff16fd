"""A client's end of a connection, over real sockets: by libzmq, as with keys, and direct."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import pytest
import zmq

from sacflow_robot.errors import RefusedError, UsageError
from sacflow_robot.serve import link, zmtp
from sacflow_robot.serve.connection import Connection, connect
from sacflow_robot.serve.direct import DirectConnection
from sacflow_robot.serve.habit import NotThereError
from sacflow_robot.serve.link import place_of

pytestmark = pytest.mark.realtime

Open = Callable[[str, float], Connection | DirectConnection]
Ends = tuple[zmq.Socket[bytes], Connection | DirectConnection]
DirectEnds = tuple[zmq.Socket[bytes], DirectConnection]


@pytest.fixture(params=["tcp://127.0.0.1:*", f"ipc://@sacflow-test-{os.getpid()}"], ids=["tcp", "ipc"])
def router(request: pytest.FixtureRequest) -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.rcvtimeo = 5000
    socket.bind(request.param)
    yield socket
    context.destroy(linger=0)


@pytest.fixture(params=["libzmq", "direct"])
def opened(request: pytest.FixtureRequest) -> Open:
    def libzmq(address: str, heartbeat_s: float) -> Connection:
        return Connection(address, heartbeat_s, None)

    def direct(address: str, heartbeat_s: float) -> DirectConnection:
        connection = connect(address, heartbeat_s, None)
        assert isinstance(connection, DirectConnection)
        return connection

    return libzmq if request.param == "libzmq" else direct


@pytest.fixture
def ends(router: zmq.Socket[bytes], opened: Open) -> Iterator[Ends]:
    own = opened(router.getsockopt_string(zmq.LAST_ENDPOINT), 1.0)
    assert own.ready(5)
    yield router, own
    own.close()


@pytest.fixture
def direct_ends(router: zmq.Socket[bytes]) -> Iterator[DirectEnds]:
    own = connect(router.getsockopt_string(zmq.LAST_ENDPOINT), 1.0, None)
    assert isinstance(own, DirectConnection) and own.ready(5)
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
    for way in (True, False):
        own._habit._better, own._habit._typical_s = way, 1.0
        own.send([b"question"])
        peer, _ = router.recv_multipart()
        threading.Timer(0.001 if way else 0.1, router.send_multipart, [[peer, b"answer"]]).start()
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
    with pytest.raises(NotThereError):
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


def test_answers_that_nobody_collects_do_not_pile_up(router: zmq.Socket[bytes]) -> None:
    own = connect(router.getsockopt_string(zmq.LAST_ENDPOINT), 0.1, None)
    assert own.ready(5)
    own.send([b"question"])
    peer, _ = router.recv_multipart()
    for i in range(500):
        router.send_multipart([peer, b"%d" % i])
    time.sleep(0.3)
    kept = []
    while (answer := own.receive(0.2)) is not None:
        kept.append(int(answer[0]))
    assert kept[-1] == 499 and kept == list(range(500 - len(kept), 500)) and len(kept) < 500
    own.close()


def test_a_connection_that_is_idle_stands(ends: Ends) -> None:
    router, own = ends
    fast = connect(router.getsockopt_string(zmq.LAST_ENDPOINT), 0.1, None)
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


def greeted(listener: socket.socket) -> socket.socket:
    """A peer's end of a handshake, byte for byte."""
    peer, _ = listener.accept()
    peer.settimeout(5)
    peer.sendall(zmtp.GREETING + zmtp.READY)
    taken = b""
    while len(taken) < len(zmtp.GREETING + zmtp.READY):
        taken += peer.recv(len(zmtp.GREETING + zmtp.READY) - len(taken))
    assert taken == zmtp.GREETING + zmtp.READY
    return peer


@contextlib.contextmanager
def linked(
    stream: tuple[socket.socket, str], heartbeat_s: float = 60.0
) -> Iterator[tuple[Connection | DirectConnection, socket.socket]]:
    """A connection that stands, and the peer's end of it."""
    listener, address = stream
    own = connect(address, heartbeat_s, None)
    with greeted(listener) as peer:
        assert own.ready(5)
        yield own, peer
    own.close()


def test_a_server_that_falls_silent_is_gone_within_two_heartbeats(stream: tuple[socket.socket, str]) -> None:
    with linked(stream, 0.4) as (own, peer):
        assert own.receive(30) is None and own.broken()
        pings = peer.recv(1000)
        assert pings == len(pings) // len(zmtp.ping(0.8)) * zmtp.ping(0.8) and pings


def test_a_server_that_pings_is_answered(stream: tuple[socket.socket, str]) -> None:
    with linked(stream) as (own, peer):
        peer.recv(100)
        peer.sendall(b"\x04\x0b\x04PING\x00\x00dear" + b"\x00\x06answer")
        assert own.receive(5) == [b"answer"]
        assert peer.recv(100) == zmtp.pong(b"dear")


LONG_PING = b"\x06" + (400).to_bytes(8, "big") + b"\x04PING\x00\x00" + bytes(393)


@pytest.mark.parametrize(
    "noise", [LONG_PING, b"\x00\xff" + b"x" * 300 + b"\x80\x00", b"\x02" + b"\xff" * 8, b"\x01\x00" * 70]
)
def test_a_server_that_talks_nonsense_is_left(stream: tuple[socket.socket, str], noise: bytes) -> None:
    with linked(stream) as (own, peer):
        peer.sendall(noise)
        while own.receive(5) is not None:
            pass
        assert own.broken()


def test_what_is_no_zeromq_server_is_not_taken_for_one(stream: tuple[socket.socket, str]) -> None:
    listener, address = stream
    own = connect(address, 1.0, None)
    peer, _ = listener.accept()
    peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n".ljust(200))
    assert not own.ready(0.3)
    peer.close()
    own.close()


@pytest.mark.parametrize("drip", [True, False])
def test_a_handshake_that_never_ends_is_given_up(
    stream: tuple[socket.socket, str], drip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "_HANDSHAKE_S", 0.5 if drip else 60.0)
    listener, address = stream
    own = connect(address, 1.0, None)
    peer, _ = listener.accept()
    with peer, pytest.raises(ConnectionError):
        if not drip:
            peer.sendall(zmtp.GREETING)
        for i in range(10_000):
            peer.sendall(zmtp.GREETING[i % 64 : i % 64 + 1] if drip else b"\x00\x05hello")
            time.sleep(0.05 if drip else 0.001)
    assert not own.ready(0)
    own.close()


def test_a_name_that_cannot_be_one_is_nobody(opened: Open) -> None:
    for name in ("a..b", "a" * 70, "no-such-computer.invalid"):
        own = opened(f"tcp://{name}:5555", 1.0)
        assert not own.ready(0.2)
        if isinstance(own, DirectConnection):
            assert own._keeper._thread.is_alive(), "it tries again: names come to be"
        own.close()


def test_a_server_that_asks_for_keys_lets_nobody_in_without(opened: Open) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.curve_publickey, router.curve_secretkey = zmq.curve_keypair()
        router.curve_server = True
        router.bind("tcp://127.0.0.1:*")
        own = opened(router.getsockopt_string(zmq.LAST_ENDPOINT), 1.0)
        with pytest.raises(RefusedError, match="does not let this client in"):
            own.ready(10)
        own.close()


def test_a_connection_that_nobody_holds_any_more_ends(stream: tuple[socket.socket, str]) -> None:
    listener, address = stream
    own = connect(address, 60.0, None)
    with greeted(listener) as peer:
        assert own.ready(5)
        keeper = own._keeper  # type: ignore[union-attr]
        del own
        gc.collect()
        assert until(lambda: not keeper._thread.is_alive())
        while peer.recv(100):
            pass


def test_a_forked_process_neither_ends_nor_uses_the_connection_of_its_parent(direct_ends: DirectEnds) -> None:
    router, own = direct_ends
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork: the case in question
        child = os.fork()
    if child == 0:
        wrong = 1
        with contextlib.suppress(BaseException):
            try:
                own.broken()
                own.ready(5)
            except UsageError:
                with contextlib.suppress(NotThereError):
                    own.send([b"of the child"])
                    wrong = 2
                own.close()
                wrong = wrong - 1
        os._exit(wrong)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not own.broken()
    own.send([b"question"])
    peer, question = router.recv_multipart()
    router.send_multipart([peer, b"answer"])
    assert question == b"question" and own.receive(5) == [b"answer"]


def test_who_waits_beside_another_waits_no_longer_than_it_wants(direct_ends: DirectEnds) -> None:
    _, own = direct_ends
    waits = threading.Thread(target=own.receive, args=(60,))
    waits.start()
    assert until(own._keeper.link.reading.locked)  # type: ignore[union-attr]
    assert own.receive(0) is None and own.receive(0.01) is None and waits.is_alive()
    own.close()
    waits.join()


def test_a_connection_closed_meanwhile_ends_the_wait(direct_ends: DirectEnds) -> None:
    _, own = direct_ends
    waits = threading.Thread(target=own.receive, args=(60,))
    waits.start()
    assert until(own._keeper.link.reading.locked)  # type: ignore[union-attr]
    own.close()
    waits.join()
    assert own.broken()
    for way in (own.ready, own.receive):
        with pytest.raises(UsageError, match="is closed"):
            way(60)


def test_only_plain_addresses_are_reached_directly() -> None:
    assert place_of("tcp://127.0.0.1:5555") == ("127.0.0.1", 5555) and place_of("tcp://[::1]:5") == ("::1", 5)
    assert place_of("tcp://arm-1.lab:5555") == ("arm-1.lab", 5555)
    assert place_of("ipc://@name") == "\0name" and place_of("ipc:///a/b") == "/a/b"
    for address in (
        "tcp://eth0;10.0.0.1:5555",
        "tcp://host:0",
        "tcp://host:65536",
        "tcp://host",
        "inproc://x",
        "host:5",
        "ipc:///" + 107 * "x",
        "ipc://@" + 107 * "x",
    ):
        assert place_of(address) is None
    with pytest.raises(UsageError, match="cannot connect to"):
        connect("host:5", 1.0, None)
    with pytest.raises(UsageError, match="cannot connect to"):
        connect("ipc:///" + 107 * "x", 1.0, None)
