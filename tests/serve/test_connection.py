"""A client's end of a connection, over real sockets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zmq

from sacflow_robot.serve import connection
from sacflow_robot.serve.connection import Connection


@pytest.fixture
def router() -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.bind("tcp://127.0.0.1:*")
    yield socket
    context.destroy(linger=0)


@pytest.fixture
def ends(router: zmq.Socket[bytes]) -> Iterator[tuple[zmq.Socket[bytes], Connection]]:
    own = Connection(router.getsockopt_string(zmq.LAST_ENDPOINT), 1.0, None)
    assert own.ready(5)
    yield router, own
    own.close()


def test_answers_that_do_not_come_soon_are_waited_for_asleep_more_and_more_often(
    ends: tuple[zmq.Socket[bytes], Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    router, own = ends
    turns: list[int] = []
    monkeypatch.setattr(connection, "_give_way", lambda: turns.append(1))
    awake = []
    for _ in range(20):
        turns.clear()
        assert own.receive(0.003) is None
        awake.append(bool(turns))
    assert [i for i, was in enumerate(awake) if was] == [0, 2, 5, 10, 19]

    own.send([b"question"])
    peer, _ = router.recv_multipart()
    monkeypatch.setattr(connection, "_give_way", lambda: router.send_multipart([peer, b"answer"]))
    own._sleeps = 0
    assert own.receive(5) == [b"answer"]
    monkeypatch.setattr(connection, "_give_way", lambda: turns.append(1))
    turns.clear()
    while own.receive(0.003) is not None:  # what was sent twice
        pass
    assert turns, "one that came soon, and the next is waited for awake"


def test_a_lost_connection_ends_the_wait_and_is_said_once(ends: tuple[zmq.Socket[bytes], Connection]) -> None:
    router, own = ends
    assert not own.broken()
    own.send([b"question"])
    assert router.recv_multipart()[1] == b"question"
    router.close(linger=0)
    assert own.receive(30) is None
    assert own.broken() and not own.broken()
    assert not own.ready(0.01)
