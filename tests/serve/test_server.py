"""Server and client over real sockets on free ports."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import onnxruntime
import pytest
import zmq

from sacflow_robot.errors import (
    DeadlineExceeded,
    InvalidValueError,
    RefusedError,
    ServerError,
    SpecMismatchError,
    UsageError,
    WireError,
)
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve.auth import Security, new_keys
from sacflow_robot.serve.client import Keys, PolicyClient
from sacflow_robot.serve.gateways.groot import GrootGateway
from sacflow_robot.serve.server import PolicyServer
from sacflow_robot.utils.seeding import chunk_noise

pytestmark = pytest.mark.realtime

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
        assert 0 < timings["infer"] <= timings["total"] and 0 <= timings["queue"] <= timings["total"]


class RawClient:
    """What a client in another language does: frames over a socket, a session, rising ids."""

    def __init__(self, server: PolicyServer, **introduction: object) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.connect(server.address)
        self._ids = itertools.count(1)
        self.welcome = self.ask("hello", **introduction)

    def ask(self, op: str, arrays: dict[str, np.ndarray] | None = None, **fields: object) -> wire.Message:
        header = {"op": op, "id": next(self._ids), **fields}
        if op not in ("hello", "ping", "status"):
            header.setdefault("session", self.welcome.header["session"])
        return self.exchange(wire.encode(wire.Message(header, arrays or {})))

    def exchange(self, frames: list[bytes]) -> wire.Message:
        self.socket.send_multipart(frames)
        assert self.socket.poll(5000), "no answer"
        return wire.decode(self.socket.recv_multipart())

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)


def test_noise_of_a_session_of_a_seed_and_of_an_episode(server: PolicyServer, policy_file: Path) -> None:
    policy = OnnxPolicy(policy_file)

    def expected(seed: int, step: int) -> np.ndarray:
        return policy.infer(observation(), chunk_noise((1, 5, 7), seed, step))

    with RawClient(server, seed=7) as client, RawClient(server) as other:
        for step in range(3):
            reply = client.ask("infer", observation())
            assert (reply.header["seed"], reply.header["step"]) == (7, step)
            assert np.array_equal(reply.arrays["actions"], expected(7, step))
            other.ask("infer", observation())  # has a stream of its own, and takes nothing from this one
        given = client.ask("infer", observation(), seed=42, step=5)
        assert np.array_equal(given.arrays["actions"], expected(42, 5))
        assert client.ask("infer", observation()).header["step"] == 3
        assert client.ask("episode", seed=9).header["seed"] == 9
        again = client.ask("infer", observation())
        assert (again.header["seed"], again.header["step"]) == (9, 0)
        brought = client.ask("infer", {**observation(), "noise": chunk_noise((1, 5, 7), 9, 0)})
        assert brought.header["seed"] is None and np.array_equal(brought.arrays["actions"], again.arrays["actions"])
        for bad in (-1, "x", 1.5, True, 2**63):
            failure = client.ask("infer", observation(), seed=bad).header["error"]
            assert failure["kind"] == "invalid" and "non-negative integer" in failure["message"]


def test_a_client_that_expects_another_policy_is_refused_with_the_fields_named(server: PolicyServer) -> None:
    with PolicyClient(server.address) as client:
        robot, spec = client.spec.robot, client.spec
    with PolicyClient(server.address, expect=robot) as client:
        assert client.spec.robot == robot
    with pytest.raises(SpecMismatchError, match=r"differs .* in: robot\.robot, robot\.control_rate_hz$"):
        PolicyClient(server.address, expect=replace(robot, control_rate_hz=10.0, robot="UR5e"))
    fits = {"chunk_length": 5, "fingerprint": spec.fingerprint, "arm": {"control_rate_hz": 20, "robot": "Panda"}}
    PolicyClient(server.address, expect=fits).close()
    with pytest.raises(SpecMismatchError, match=r"in: chunk_length, fingerprint, robot\.action_names$"):
        bad = {"chunk_length": 8, "fingerprint": "0", "arm": {"action_names": ["x"]}}
        PolicyClient(server.address, expect=bad)
    for nonsense in ({"chunks": 5}, {"arm": {"color": 1}}, {"arm": 3}, [1]):
        with pytest.raises(RefusedError, match="expect"):
            PolicyClient(server.address, expect=nonsense)  # type: ignore[arg-type]


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


def test_a_policy_is_warm_before_anybody_is_answered(policy_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, other = OnnxPolicy(policy_file), OnnxPolicy(policy_file)
    sizes: dict[OnnxPolicy, list[int]] = {policy: [], other: []}
    run = OnnxPolicy.run

    def noted(self: OnnxPolicy, inputs: dict[str, np.ndarray]) -> np.ndarray:
        sizes[self].append(len(inputs["noise"]))
        return run(self, inputs)

    monkeypatch.setattr(OnnxPolicy, "run", noted)
    with PolicyServer(policy, ANY_PORT, max_batch=6) as server:
        assert sorted(sizes[policy]) == [1, 2, 3, 4, 5, 6], "before it runs"
        server.offer(other)
        assert server.policy is policy and sorted(sizes[other]) == [1, 2, 3, 4, 5, 6], "before it is served"


def test_repeated_and_reordered_requests_are_refused(server: PolicyServer) -> None:
    with RawClient(server) as client:
        session = client.welcome.header["session"]
        frames = wire.encode(wire.Message({"op": "infer", "id": 10, "session": session}, observation()))
        assert client.exchange(frames).header["ok"]
        for identifier in (10, 9, -1, None, "11", 1.5):
            header = {"op": "infer", "id": identifier, "session": session}
            reply = client.exchange(wire.encode(wire.Message(header, observation())))
            assert reply.header["error"]["kind"] == "replayed"
        assert server.requests == 1
        for unknown in ("0" * 16, None, 3, ["x"]):
            header = {"op": "infer", "id": 11, "session": unknown}
            reply = client.exchange(wire.encode(wire.Message(header, observation())))
            assert reply.header["error"]["kind"] == "session"


def test_bad_requests_are_answered_and_the_server_goes_on(server: PolicyServer) -> None:
    with PolicyClient(server.address) as client, RawClient(server) as raw:
        noise = chunk_noise((1, 5, 7), 0)
        bad = {**observation(), "object": np.full((1, 10), np.nan, np.float32)}
        with pytest.raises(RefusedError, match="refused the request: observation 'object' contains NaN"):
            client.infer(bad, noise)
        with pytest.raises(RefusedError, match="lacks 'robot0_eef_pos'"):
            client.infer({"object": bad["object"]}, noise)
        assert client.infer(observation(), noise).shape == (1, 5, 7)

        def kind(reply: wire.Message) -> str:
            assert reply.header["ok"] is False
            return str(reply.header["error"]["kind"])

        for frames in ([b"junk"], [b""], [b"\x80"], [b"\x81\xa1v\x02", b"extra"], [b"\x81\xa1v\x01"], [b"\x93" * 900]):
            assert kind(raw.exchange(frames)) == "malformed"
        for identifier, shape in enumerate(
            ([float("inf")], [2**62, 0], [1] * 70, [2**40, 0], [True], "x", [-1], [None])
        ):
            header = {"v": 2, "op": "infer", "id": 50 + identifier, "session": raw.welcome.header["session"]}
            layout = [["robot0_eef_pos", "<f4", shape]]
            assert kind(raw.exchange([msgpack.packb({**header, "arrays": layout}), b""])) == "malformed", shape
        raw._ids = itertools.count(100)
        assert "shape ()" in raw.ask("infer", {"robot0_eef_pos": np.float32(1)}).header["error"]["message"]
        assert kind(raw.ask("infer", {"robot0_eef_pos": np.zeros((65, 3), np.float32)})) == "limit"
        assert kind(raw.ask("infer")) == "invalid"
        unknown = raw.ask("kill")
        assert kind(unknown) == "malformed" and "valid: infer, hello" in unknown.header["error"]["message"]
        assert raw.ask("infer", observation(3)).arrays["actions"].shape == (3, 5, 7)


def test_errors_never_repeat_what_was_sent(server: PolicyServer) -> None:
    secret = "TOPSECRET"
    with RawClient(server, client=secret) as raw:
        messages = [
            {"op": secret},
            {"op": "infer", "session": secret},
            {"op": "hello", "expect": {secret: 1}},
            {"op": "hello", "expect": {"arm": {"robot": secret}}},
            {"op": "hello", "swap": secret},
            {"op": "infer", "session": raw.welcome.header["session"], "seed": secret},
            {"v": secret},
        ]
        for number, header in enumerate(messages, 10):
            frames = wire.encode(wire.Message({"id": number, **header}, {secret: np.zeros(1, np.float32)}))
            raw.socket.send_multipart(frames)
            assert secret.encode() not in b"".join(raw.socket.recv_multipart())


def test_a_frame_that_is_too_large_drops_its_sender_only(server: PolicyServer) -> None:
    with PolicyClient(server.address) as client, RawClient(server) as raw:
        raw.socket.send_multipart([b"x" * (wire.MAX_FRAME_BYTES + 1)])
        assert not raw.socket.poll(300)
        assert client.infer(observation()).shape == (1, 5, 7)


def test_requests_that_wait_are_evaluated_together_and_a_lone_one_alone(policy_file: Path) -> None:
    policy = OnnxPolicy(policy_file)
    with PolicyServer(policy, ANY_PORT, max_batch=6) as server, ExitStack() as stack:
        server.start()
        clients = [stack.enter_context(PolicyClient(server.address)) for _ in range(8)]
        clients[0].infer(observation())
        assert clients[0].last_header["batch"] == 1
        held = threading.Lock()
        run = policy.run

        def slow(inputs: dict[str, np.ndarray]) -> np.ndarray:
            with held:
                return run(inputs)

        policy.run = slow  # type: ignore[assignment, method-assign]
        with held:
            first = clients[0].ask(observation())
            time.sleep(0.3)  # the loop is inside that inference now
            numbers = [client.ask(observation(seed=i)) for i, client in enumerate(clients[1:], 1)]
            time.sleep(0.2)
        clients[0].collect(first)
        sizes = []
        for i, (client, number) in enumerate(zip(clients[1:], numbers, strict=True), 1):
            actions = client.collect(number)
            sizes.append(client.last_header["batch"])
            noise = chunk_noise((1, 5, 7), client.last_header["seed"], client.last_header["step"])
            alone = run(policy.check(observation(seed=i), noise))
            assert np.allclose(actions, alone, atol=1e-5), "everybody gets the answer to his own question"
        assert sorted(sizes) == [1, 6, 6, 6, 6, 6, 6]


def test_a_client_that_does_not_read_its_answers_holds_up_nobody(policy_file: Path) -> None:
    with PolicyServer(OnnxPolicy(policy_file), f"ipc://@sacflow-test-{os.getpid()}") as server:
        server.start()
        with RawClient(server) as glutton, PolicyClient(server.address) as client:
            session = glutton.welcome.header["session"]
            glutton.socket.setsockopt(zmq.SNDTIMEO, 2000)
            batch = observation(64)
            for identifier in range(10, 3000):
                header = {"op": "infer", "id": identifier, "session": session}
                with suppress(zmq.Again):
                    glutton.socket.send_multipart(wire.encode(wire.Message(header, batch)), zmq.NOBLOCK)
                if identifier % 300 == 0:
                    assert client.infer(observation()).shape == (1, 5, 7)
            deadline = time.monotonic() + 20
            while not server.meters.counts["dropped"] and time.monotonic() < deadline:
                client.infer(observation())
                with suppress(zmq.Again):
                    identifier += 1
                    header = {"op": "infer", "id": identifier, "session": session}
                    glutton.socket.send_multipart(wire.encode(wire.Message(header, batch)), zmq.NOBLOCK)
            assert server.meters.counts["dropped"], "its answers were dropped, not kept"
        with PolicyClient(server.address) as client:
            assert client.infer(observation()).shape == (1, 5, 7)


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
    with pytest.raises(UsageError, match="cannot connect to nonsense"):
        PolicyClient("nonsense")


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


class Unaware:
    """A policy exported without the inputs for a prefix."""

    takes_prefix = False

    def __init__(self, policy: OnnxPolicy) -> None:
        self._policy = policy

    def __getattr__(self, name: str) -> object:
        return getattr(self._policy, name)

    def check(self, observation, noise, prefix=None, prefix_mask=None):  # type: ignore[no-untyped-def]
        assert prefix is None and prefix_mask is None
        return self._policy.check(observation, noise)


def test_a_prefix_reaches_a_policy_that_takes_one_and_no_other(server: PolicyServer, policy_file: Path) -> None:
    rng, policy = np.random.default_rng(0), OnnxPolicy(policy_file)
    noise = chunk_noise((2, 5, 7), 0)
    prefix, mask = rng.uniform(-1, 1, (2, 5, 7)).astype(np.float32), np.zeros((2, 5), np.float32)
    mask[0, :2], mask[1, :3] = 1, 1
    free, completed = policy.infer(observation(2), noise), policy.infer(observation(2), noise, prefix, mask)
    assert np.array_equal(completed[mask > 0], prefix[mask > 0])
    with PolicyServer(Unaware(policy), ANY_PORT) as other, PolicyClient(other.start().address) as client:  # type: ignore[arg-type]
        assert not client.takes_prefix
        assert np.array_equal(client.infer(observation(2), noise, prefix, mask), free)
    with PolicyClient(server.address) as client:
        assert client.takes_prefix
        for _ in range(3):
            assert np.array_equal(client.infer(observation(2), noise, prefix, mask), completed)
        for _ in range(3):
            assert np.array_equal(client.infer(observation(2), noise), free)
        for wrong, reason in ((5.0, "prefix_mask must be 1"), (np.nan, "prefix_mask contains NaN")):
            with pytest.raises(RefusedError, match=reason):
                client.infer(observation(2), noise, prefix, np.where(mask > 0, np.float32(wrong), mask))
        with pytest.raises(RefusedError, match="prefix and prefix_mask come together"):
            client.infer({**observation(2), "prefix": prefix}, noise)


def test_half_a_prefix_is_refused_and_not_dropped(server: PolicyServer) -> None:
    prefix = np.zeros((1, 5, 7), np.float32)
    with PolicyClient(server.address) as client:
        for half in ({"prefix": prefix}, {"prefix_mask": prefix[..., 0]}):
            with pytest.raises(InvalidValueError, match="go together"):
                client.infer(observation(), **half)
        assert client.infer(observation()).shape == (1, 5, 7)


def test_what_is_too_large_is_not_sent(server: PolicyServer) -> None:
    with PolicyClient(server.address) as client:
        picture = np.zeros((1, wire.MAX_FRAME_BYTES), np.uint8)
        assert client.infer({**observation(), "picture": picture}).shape == (1, 5, 7)
        with pytest.raises(WireError, match="at most"):
            client.infer({**observation(), "picture": np.zeros((1, wire.MAX_FRAME_BYTES + 1), np.uint8)})
        assert client.connected


@pytest.mark.parametrize("time_s", [float("nan"), float("inf"), float("-inf")])
def test_times_that_are_none_are_refused(server: PolicyServer, time_s: float) -> None:
    with pytest.raises(UsageError, match="timeout_s"):
        PolicyClient(server.address, time_s)
    with pytest.raises(UsageError, match="deadline_s"):
        PolicyClient(server.address, deadline_s=time_s)
    with PolicyClient(server.address) as client, pytest.raises(UsageError, match="deadline_s"):
        client.ask(observation(), deadline_s=time_s)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("with_keys", [False, True])
def test_over_ipv6(policy_file: Path, tmp_path: Path, with_keys: bool) -> None:
    server_key, own_key = new_keys(tmp_path, "server")[1], new_keys(tmp_path / "clients", "arm")[1]
    security = Security(server_key, tmp_path / "clients") if with_keys else None
    keys = Keys(own_key, tmp_path / "server.key") if with_keys else None
    with (
        PolicyServer(OnnxPolicy(policy_file), "tcp://[::1]:*", security=security).start() as server,
        PolicyClient(server.address, keys=keys) as client,
    ):
        assert client.infer(observation()).shape == (1, 5, 7)


def test_the_minimal_client_of_the_examples(server: PolicyServer) -> None:
    example = Path(__file__).parents[2] / "examples" / "minimal_client.py"
    source = example.read_text()
    assert len(source.splitlines()) < 100 and "numpy" not in source and "sacflow_robot" not in source
    command = [sys.executable, str(example), server.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    assert "5 x 7 actions" in done.stdout and "late: the answer would have come after" in done.stdout


def test_a_port_in_use(server: PolicyServer, policy_file: Path) -> None:
    with pytest.raises(UsageError, match="it is in use; give another address with --bind"):
        PolicyServer(OnnxPolicy(policy_file), server.address)
    for port in ("99999", "-1", "5\n5", "x", ""):
        with pytest.raises(UsageError, match="is not a port"):
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
            with pytest.raises(UsageError, match="another process serves there"):
                PolicyServer(OnnxPolicy(policy_file), f"ipc://{tmp_path}/cell")


@pytest.mark.parametrize("door", ["native", "groot"])
def test_a_socket_left_by_a_killed_server_is_in_nobodys_way(policy_file: Path, tmp_path: Path, door: str) -> None:
    path, policy = tmp_path / "cell", OnnxPolicy(policy_file)

    def serve() -> PolicyServer | GrootGateway:
        address = f"ipc://{path}"
        return PolicyServer(policy, address) if door == "native" else GrootGateway(lambda: policy, address)

    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
        killed.listen()
        with pytest.raises(UsageError, match="another process serves there"):
            serve()
    assert path.exists(), "as after kill -9"
    with closing(serve()), pytest.raises(UsageError, match="another process serves there"):
        serve()
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(UsageError, match="cell exists and is not a socket"):
        serve()
    assert path.read_text() == "precious"
