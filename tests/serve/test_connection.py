"""A client's end of a connection, over real sockets."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import zmq

from sacflow_robot.serve.connection import Connection
from sacflow_robot.serve.habit import Habit


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


@pytest.mark.parametrize(("awake_s", "asleep_s", "often"), [(1e-4, 2e-4, True), (2e-3, 2e-4, False)])
def test_the_way_of_waiting_that_brings_answers_sooner_is_taken(awake_s: float, asleep_s: float, often: bool) -> None:
    habit, ways = Habit(), []
    for _ in range(1000):
        ways.append(habit.awake())
        habit.learn(ways[-1], awake_s if ways[-1] else asleep_s)
    assert ways[:2] == [True, False] and 0.9 < ways.count(often) / 1000 < 1
    for _ in range(3000):  # it changes its mind when things change
        habit.learn(way := habit.awake(), asleep_s if way else awake_s)
    assert [habit.awake() for _ in range(512)].count(often) == 2


def test_an_answer_is_found_awake_and_asleep(ends: tuple[zmq.Socket[bytes], Connection]) -> None:
    router, own = ends
    for way in (True, False):
        own._habit._typical_s = {way: 0.0, not way: 1.0}
        own.send([b"question"])
        peer, _ = router.recv_multipart()
        threading.Timer(0.001 if way else 0.1, router.send_multipart, [[peer, b"answer"]]).start()
        assert own.receive(5) == [b"answer"]
        assert own.receive(0) is None and own.receive(0.003) is None


def test_a_lost_connection_ends_the_wait_and_is_said_once(ends: tuple[zmq.Socket[bytes], Connection]) -> None:
    router, own = ends
    assert not own.broken()
    own.send([b"question"])
    assert router.recv_multipart()[1] == b"question"
    router.close(linger=0)
    assert own.receive(30) is None
    assert own.broken() and not own.broken()
    assert not own.ready(0.01)
