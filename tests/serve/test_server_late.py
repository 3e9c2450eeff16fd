"""Answers that would come too late, and those that do."""

import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import zmq

from sacflow_robot.errors import DeadlineExceeded, UsageError
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve.client import PolicyClient
from sacflow_robot.serve.server import PolicyServer
from sacflow_robot.utils.seeding import chunk_noise
from tests.serve.raw_client import ANY_PORT, RawClient, observation

pytestmark = pytest.mark.realtime


def test_what_would_be_late_is_said_at_once_and_not_computed(server: PolicyServer) -> None:
    with PolicyClient(server.address) as client:
        for _ in range(3):
            client.infer(observation())
        with pytest.raises(DeadlineExceeded, match="after the request's deadline"):
            client.collect(client.ask(observation(), deadline_s=0.0))
        assert server.requests == 3 and server.meters.counts["late"] == 1
        assert client.collect(client.ask(observation(), deadline_s=10.0)).shape == (1, 5, 7)
    with RawClient(server) as raw:
        now = raw.welcome.header["server_ns"]
        assert raw.ask("infer", observation(), deadline_ns=now).header["error"]["kind"] == "late"
        assert raw.ask("infer", observation(), deadline_ns=now + 10**10).header["ok"]
        assert raw.ask("infer", observation(), deadline_ns="soon").header["error"]["kind"] == "invalid"


@pytest.mark.parametrize("quick_before", [0, 1, 50])
@pytest.mark.parametrize("slow", [1, 3])
def test_a_few_slow_evaluations_make_nothing_late(
    server: PolicyServer, monkeypatch: pytest.MonkeyPatch, quick_before: int, slow: int
) -> None:
    with PolicyClient(server.address) as client:
        for _ in range(quick_before):
            client.infer(observation())
        with monkeypatch.context() as patch:
            _slow_down(patch, 0.1)
            for _ in range(slow):
                client.infer(observation())
        for _ in range(10):
            client.collect(client.ask(observation(), deadline_s=0.09))
        assert server.meters.counts["late"] == 0


def test_a_server_that_stays_slow_says_late_and_the_first_quick_evaluation_ends_it(
    server: PolicyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PolicyClient(server.address) as client:
        for _ in range(20):
            client.infer(observation())

        def outcomes(count: int) -> list[bool]:
            before = server.meters.counts["late"]
            late = []
            for _ in range(count):
                with suppress(DeadlineExceeded):
                    client.collect(client.ask(observation(), deadline_s=0.03))
                late.append(server.meters.counts["late"] > before)
                before = server.meters.counts["late"]
            return late

        with monkeypatch.context() as patch:
            _slow_down(patch, 0.05)
            assert outcomes(5 + 8 + 1 + 8) == [False] * 5 + [True] * 8 + [False] + [True] * 8
        assert outcomes(10) == [False] * 10, "tried once more, and found quick"


def _slow_down(patch: pytest.MonkeyPatch, seconds: float) -> None:
    """Make every evaluation take so much longer."""

    run = OnnxPolicy.run

    def slow(self: OnnxPolicy, inputs: dict[str, np.ndarray]) -> np.ndarray:
        time.sleep(seconds)
        return run(self, inputs)

    patch.setattr(OnnxPolicy, "run", slow)


def test_a_late_answer_is_not_taken_for_the_next_one(policy_file: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(ANY_PORT)
    address = router.getsockopt_string(zmq.LAST_ENDPOINT)
    spec = OnnxPolicy(policy_file).spec

    def slow_server() -> None:
        def reply(client: bytes, header: dict[str, object], value: float) -> None:
            arrays = {"actions": np.full((1, 5, 7), value, np.float32)}
            router.send_multipart([client, *wire.encode(wire.Message({"ok": True, **header}, arrays))])

        client, *frames = router.recv_multipart()
        hello = {"spec": spec.to_json(), "policy_version": "1", "session": "s", "seed": 1, "heartbeat_s": 1.0}
        reply(client, {"id": wire.decode(frames).header["id"], **hello}, 0)
        _, *late = router.recv_multipart()
        _, *frames = router.recv_multipart()
        reply(client, {"id": wire.decode(late).header["id"], "policy_version": "1"}, 1)
        reply(client, {"id": wire.decode(frames).header["id"], "policy_version": "1"}, 2)

    thread = threading.Thread(target=slow_server)
    thread.start()
    try:
        with PolicyClient(address, timeout_s=2) as client:
            noise = chunk_noise((1, 5, 7), 0)
            with pytest.raises(TimeoutError):
                client.collect(client.ask(observation(), noise), wait_s=0.2)
            assert client.infer(observation(), noise)[0, 0, 0] == 2
    finally:
        thread.join()
        context.destroy(linger=0)


@pytest.mark.parametrize("time_s", [float("nan"), float("inf"), float("-inf")])
def test_times_that_are_none_are_refused(server: PolicyServer, time_s: float) -> None:
    with pytest.raises(UsageError, match="timeout_s"):
        PolicyClient(server.address, time_s)
    with pytest.raises(UsageError, match="deadline_s"):
        PolicyClient(server.address, deadline_s=time_s)
    with PolicyClient(server.address) as client, pytest.raises(UsageError, match="deadline_s"):
        client.ask(observation(), deadline_s=time_s)
