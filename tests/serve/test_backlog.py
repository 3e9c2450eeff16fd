"""What one client asks for is not another's delay: order, budgets and bounds, over real sockets, round by round."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.serve import handlers as operations
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve.batching import Backlog, TimeBudget
from sacflow_robot.serve.server import PolicyServer

MAPS = 4000
EXPENSIVE = msgpack.packb({"v": 2, "op": "hello", "expect": [{}] * MAPS})
TOO_LARGE = b"\x81\xa1a\xdd" + (10**6).to_bytes(4, "big") + b"\x80" * 10**6
TOO_MANY = b"\x81\xa1a\xdd" + (60_000).to_bytes(4, "big") + b"\x80" * 60_000


@pytest.fixture(scope="module")
def policy(policy_file: Path) -> OnnxPolicy:
    return OnnxPolicy(policy_file)


@pytest.fixture
def server(policy: OnnxPolicy) -> Iterator[PolicyServer]:
    """Not started: a test calls its rounds."""
    with PolicyServer(policy, "tcp://127.0.0.1:*") as made:
        yield made


class Peer:
    """A client of its own connection, whose answers come when rounds are played."""

    def __init__(self, server: PolicyServer, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._server, self.socket = server, context.socket(zmq.DEALER)
        self.socket.connect(server.address)
        self._ids = itertools.count(1)
        self.answers: list[dict[str, Any]] = []

    def send(self, op: str, arrays: dict[str, np.ndarray] | None = None, **fields: object) -> None:
        header = {"op": op, "id": next(self._ids), **fields}
        self.socket.send_multipart(wire.encode(wire.Message(header, arrays or {})))

    def look(self) -> int:
        """How many answers have come by now."""
        while self.socket.poll(1):
            self.answers.append(dict(wire.decode(self.socket.recv_multipart()).header))
        return len(self.answers)

    def ask(self, op: str, arrays: dict[str, np.ndarray] | None = None, **fields: object) -> dict[str, Any]:
        had = self.look()
        self.send(op, arrays, **fields)
        for _ in range(1000):
            self._server._round()
            if self.look() > had:
                return self.answers[-1]
        raise AssertionError("no answer")


@contextmanager
def peers(server: PolicyServer) -> Iterator[Callable[[], Peer]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        yield lambda: Peer(server, context)
    finally:
        context.destroy(linger=0)


def observation(policy: OnnxPolicy) -> dict[str, np.ndarray]:
    return {array.key: np.zeros((1, *array.shape), np.float32) for array in policy.spec.robot.observations}


def flood_of(kind: str, policy: OnnxPolicy) -> list[bytes]:
    if kind in ("hello", "status", "ping"):
        return wire.encode(wire.Message({"op": kind, "id": 1}, {}))
    header = {"maps": EXPENSIVE, "1 MB": TOO_LARGE, "60,000 maps": TOO_MANY}[kind.removesuffix(" with arrays")]
    return [header, b"four"] if kind.endswith("with arrays") else [header]


@pytest.mark.parametrize(
    "kind", ["hello", "status", "ping", "maps", "maps with arrays", "1 MB", "1 MB with arrays", "60,000 maps"]
)
@pytest.mark.parametrize("flooders", [1, 12])
def test_a_flood_of_others_does_not_hold_up_a_request_for_actions(
    server: PolicyServer, policy: OnnxPolicy, kind: str, flooders: int
) -> None:
    with peers(server) as connect:
        good, bad = connect(), [connect() for _ in range(flooders)]
        session = good.ask("hello")["session"]
        frames = flood_of(kind, policy)
        for peer in bad:
            for _ in range(400 // flooders):
                peer.socket.send_multipart(frames)
        time.sleep(0.1)
        for _ in range(12):
            server._round()  # the budgets of the flooders are used up
        waits = []
        for _ in range(10):
            good.send("infer", observation(policy), session=session)
            had = good.look()
            time.sleep(0.005)
            rounds, spent = 0, 0.0
            while good.look() == had:
                assert rounds < 10
                began = time.thread_time()
                server._round()
                spent, rounds = spent + time.thread_time() - began, rounds + 1
            waits.append(spent)
        assert all(answer["ok"] for answer in good.answers)
        assert np.median(waits) < 0.01, "seconds of the server's own time"


def test_everybody_gets_an_answer_and_a_newcomer_soon(server: PolicyServer) -> None:
    with peers(server) as connect:
        bad, newcomer = connect(), connect()
        for _ in range(60):
            bad.send("hello")
        time.sleep(0.05)
        for _ in range(3):
            server._round()
        newcomer.send("hello")
        time.sleep(0.05)
        rounds = 0
        while not newcomer.look():
            assert rounds < 6
            server._round()
            rounds += 1
        while bad.look() < 60:
            server._round()
        assert [answer["id"] for answer in bad.answers] == list(range(1, 61)), "all, and in order"
        assert all(answer["ok"] for answer in bad.answers)


def test_requests_of_one_connection_are_met_in_the_order_in_which_they_were_sent(
    server: PolicyServer, policy: OnnxPolicy
) -> None:
    with peers(server) as connect:
        peer = connect()
        session = peer.ask("hello", seed=1)["session"]
        peer.answers.clear()
        for seed in (5, 6):
            peer.send("infer", observation(policy), session=session)
            peer.send("episode", session=session, seed=seed)
            peer.send("infer", observation(policy), session=session)
        time.sleep(0.05)
        for _ in range(6):
            server._round()
        assert peer.look() == 6
        assert [(answer["id"], answer["seed"]) for answer in peer.answers] == [
            *((2, 1), (3, 5), (4, 5)),
            *((5, 5), (6, 6), (7, 6)),
        ]


def test_the_status_is_computed_at_most_ten_times_a_second(
    server: PolicyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    look = operations.Operations._look
    monkeypatch.setattr(operations.Operations, "_look", lambda *given: looks.append(1) or look(*given))
    with peers(server) as connect:
        peer = connect()
        began = time.monotonic()
        for _ in range(100):
            assert peer.ask("status")["requests"] == 0
        assert len(looks) <= 1 + (time.monotonic() - began) / 0.1
        server.meters.reloaded("refused", {"reason": "not fit"})
        assert peer.ask("status")["last_reload"]["reason"] == "not fit", "not the one before"


def test_sessions_of_a_connection_are_bounded_and_the_newest_stay(server: PolicyServer, policy: OnnxPolicy) -> None:
    with peers(server) as connect:
        good, bad = connect(), connect()
        standing = good.ask("hello")["session"]
        assert good.ask("infer", observation(policy), session=standing)["ok"]
        sessions = [bad.ask("hello")["session"] for _ in range(100)]
        outcomes = [bad.ask("infer", observation(policy), session=session)["ok"] for session in sessions]
        assert outcomes == [False] * 36 + [True] * 64
        assert good.ask("infer", observation(policy), session=standing)["ok"]


def test_a_full_table_makes_room_at_the_cost_of_who_filled_it(
    server: PolicyServer, policy: OnnxPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sacflow_robot.serve.session._MOST_SESSIONS", 40)
    with peers(server) as connect:
        good, bad, honest = connect(), [connect() for _ in range(2)], connect()
        standing = [good.ask("hello")["session"] for _ in range(3)]
        for session in standing:
            assert good.ask("infer", observation(policy), session=session)["ok"]
        for _ in range(60):
            for peer in bad:
                assert peer.ask("hello")["ok"]
        newcomer = honest.ask("hello")["session"]
        for peer in bad:
            assert peer.ask("hello")["ok"]
        assert honest.ask("infer", observation(policy), session=newcomer)["ok"]
        for session in standing:
            assert good.ask("infer", observation(policy), session=session)["ok"]
        assert len(server.sessions._sessions) <= 40


def test_a_table_full_of_standing_clients_refuses_one_more(
    server: PolicyServer, policy: OnnxPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sacflow_robot.serve.session._MOST_SESSIONS", 2)
    with peers(server) as connect:
        clients = [connect() for _ in range(3)]
        for client in clients[:2]:
            session = client.ask("hello")["session"]
            assert client.ask("infer", observation(policy), session=session)["ok"]
        assert clients[2].ask("hello")["error"]["kind"] == "limit"
        monkeypatch.setattr("sacflow_robot.serve.session._IDLE_NS", 0)
        assert clients[2].ask("hello")["ok"], "the one that was silent the longest is forgotten"


def test_a_session_goes_on_over_another_connection(server: PolicyServer, policy: OnnxPolicy) -> None:
    with peers(server) as connect:
        before, after = connect(), connect()
        session = before.ask("hello", seed=3)["session"]
        assert after.ask("hello", session=session)["session"] == session
        for _ in range(70):
            before.ask("hello")
        after._ids = itertools.count(100)
        assert after.ask("infer", observation(policy), session=session)["ok"], (
            "not one of those of the first connection"
        )


def test_a_header_is_refused_by_its_size_before_it_is_read(server: PolicyServer) -> None:
    with peers(server) as connect:
        peer = connect()
        for header in (TOO_LARGE, TOO_MANY, b"\x91" * 60_000, msgpack.packb({"v": 2, "a": [0] * 5000})):
            answers, until = len(peer.answers), time.monotonic() + 10
            peer.socket.send(header)
            while len(peer.answers) == answers and time.monotonic() < until:  # it takes its time to arrive
                began = time.thread_time()
                server._round()
                assert time.thread_time() - began < 0.02
                peer.look()
            assert peer.answers[-1]["error"]["kind"] == "malformed"
        robot = {"robot": "Panda" * 1000, "action_names": ["x"] * 500, "task": "物" * 2000}
        assert peer.ask("hello", expect={"arm": robot})["error"]["kind"] == "mismatch", "large, and plain"


def test_frames_beyond_those_of_a_message_are_not_kept(server: PolicyServer) -> None:
    with peers(server) as connect:
        peer = connect()
        peer.socket.send_multipart([msgpack.packb({"v": 2, "op": "infer", "id": 1}), *[b""] * 20_000])
        peer.send("ping")
        for _ in range(20):
            server._round()
            if peer.look() == 2:
                break
        assert [answer["ok"] for answer in peer.answers] == [False, True]


def test_the_backlog_takes_turns_and_is_bounded() -> None:
    backlog = Backlog()
    for i in range(300):
        assert backlog.put([b"a", b"%d" % i]) == (i < 256)
    assert backlog.put([b"b", b"0"]) and len(backlog) == 2 and b"a" in backlog and b"c" not in backlog
    large = bytes(wire.MAX_MESSAGE_BYTES)
    assert backlog.put([b"c", large]) and not backlog.put([b"c", b"0"]), "one message fits, whatever its size"
    taken = [backlog.take() for _ in range(4)]
    assert taken == [[b"a", b"0"], [b"b", b"0"], [b"c", large], [b"a", b"1"]]
    assert backlog.put([b"c", b"0"])
    while backlog:
        backlog.take()
    assert not backlog._bytes and not backlog._waiting


def test_a_connection_that_had_more_than_its_share_has_it_again_in_time() -> None:
    budget, second = TimeBudget(), 1_000_000_000
    budget.charge(b"a", 9_000_000, 0)
    assert not budget.exceeded(b"a", 0)
    budget.charge(b"a", 21_000_000, 0)
    assert budget.exceeded(b"a", 0) and not budget.exceeded(b"b", 0)
    assert budget.exceeded(b"a", second // 2) and not budget.exceeded(b"a", 2 * second)
    for i in range(10_000):
        budget.charge(b"%d" % i, 1, 0)
    assert len(budget._spent_ns) <= 4096
