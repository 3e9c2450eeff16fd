"""Server and clients over real sockets on free ports: everybody gets the answer to his own question."""

import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import zmq

from sacflow_robot.errors import RefusedError
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve.client import PolicyClient
from sacflow_robot.serve.server import PolicyServer
from sacflow_robot.utils.seeding import chunk_noise
from tests.serve.raw_client import ANY_PORT, RawClient, observation

pytestmark = pytest.mark.realtime


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


def test_the_minimal_client_of_the_examples(server: PolicyServer) -> None:
    example = Path(__file__).parents[2] / "examples" / "minimal_client.py"
    source = example.read_text()
    assert len(source.splitlines()) < 100 and "numpy" not in source and "sacflow_robot" not in source
    command = [sys.executable, str(example), server.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    assert "5 x 7 actions" in done.stdout and "late: the answer would have come after" in done.stdout
