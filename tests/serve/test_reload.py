"""Policy files replaced under a running server."""

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from sacflow_robot.export import metadata as policyfile
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.export.to_onnx import export_policy
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.serve.client import PolicyClient
from sacflow_robot.serve.reload import Reloader
from sacflow_robot.serve.server import PolicyServer
from sacflow_robot.spec import RobotSpec
from sacflow_robot.utils.seeding import chunk_noise
from tests.conftest import TINY_FLOW
from tests.serve.test_crash import observation

Export = Callable[..., Path]


@pytest.fixture(scope="module")
def exported(robot: RobotSpec, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], bytes]:
    """Content of the file of an untrained policy, made once: it takes seconds."""
    folder = tmp_path_factory.mktemp("exported")

    @cache
    def exported(seed: int, length: int) -> bytes:
        torch.manual_seed(seed)
        policy = FlowPolicy("flow-g", robot.observation_dim, length * robot.action_dim, TINY_FLOW)
        path = folder / f"{seed}-{length}.onnx"
        export_policy(policy, policy.make_spec(robot, {"seed": seed}), path)
        return path.read_bytes()

    return exported


@pytest.fixture
def export(exported: Callable[[int, int], bytes], tmp_path: Path) -> Export:
    def export(seed: int, name: str = "new.onnx", length: int = 5) -> Path:
        (tmp_path / name).write_bytes(exported(seed, length))
        return tmp_path / name

    return export


@pytest.fixture
def served(export: Export) -> Path:
    return export(1, "served.onnx")


@pytest.fixture
def server(served: Path) -> Iterator[PolicyServer]:
    with PolicyServer(OnnxPolicy(served), "tcp://127.0.0.1:*") as running:
        yield running.start()


def soon(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_new_file_is_served_and_what_each_answer_came_from_is_known(
    server: PolicyServer, served: Path, export: Export
) -> None:
    policies = {policy.version: policy for policy in map(OnnxPolicy, (served, export(2)))}
    old, new = policies
    with closing(Reloader(server, served).start()), PolicyClient(server.address) as client:
        noise = chunk_noise((1, 5, 7), 0)
        client.infer(observation(), noise)
        assert client.policy_version == old
        export(2).replace(served)
        seen = []

        def swapped() -> bool:
            actions = client.infer(observation(), noise)
            seen.append(client.policy_version)
            assert np.array_equal(actions, policies[client.policy_version].infer(observation(), noise))
            return client.policy_version == new

        soon(swapped)
        assert seen == sorted(seen, key=[old, new].index), "no answer of the old one after the first of the new one"
        status = client.status()
        assert status["reloads_taken"] == 1
        last = status["last_reload"]
        assert last["result"] == "taken" and last["version"] == new and last["compared_share"] == 1
        change = np.abs(policies[new].infer(observation(), noise) - policies[old].infer(observation(), noise))
        assert last["compared_rows"] >= 1 and last["max_change"] == pytest.approx(change.max(), abs=1e-4)
        assert last["mean_change"] == pytest.approx(change.mean(), abs=1e-4)


def test_no_request_is_lost_or_wrong_while_files_come_and_go(
    server: PolicyServer, served: Path, export: Export
) -> None:
    contents = [served.read_bytes(), export(2).read_bytes()]
    policies = {policyfile.content_version(content): content for content in contents}
    noise, stop, problems, answers = chunk_noise((1, 5, 7), 0), threading.Event(), [], [0, 0]
    expected = {OnnxPolicy(path).version: OnnxPolicy(path).infer(observation(), noise) for path in (served, export(2))}

    def ask(index: int) -> None:
        with PolicyClient(server.address, name=str(index)) as client:
            while not stop.is_set():
                actions = client.infer(observation(), noise)
                answers[index] += 1
                if not np.allclose(actions, expected[client.policy_version], atol=1e-5):
                    problems.append(client.policy_version)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
    reloader = Reloader(server, served, watch=False)
    for thread in threads:
        thread.start()
    for turn in range(1, 8):
        served.write_bytes(contents[turn % 2])
        assert reloader.reload()
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems and min(answers) > 0 and len(policies) == 2
    assert server.meters.counts["reloads_taken"] == 7 and not server.meters.counts["refused"]


def test_what_is_not_fit_is_refused_and_the_old_one_goes_on(
    server: PolicyServer, served: Path, export: Export, caplog: pytest.LogCaptureFixture
) -> None:
    good = served.read_bytes()
    with PolicyClient(server.address) as client:
        client.infer(observation())
        version = client.policy_version

        def refused(content: bytes, reason: str, max_change: float | None = None) -> None:
            served.write_bytes(content)
            caplog.clear()
            assert not Reloader(server, served, max_change=max_change, watch=False).reload()
            assert reason in caplog.text and reason in client.status()["last_reload"]["reason"]
            client.infer(observation())
            assert client.policy_version == version

        refused(good[:1000], "not a readable ONNX file")
        model = onnx.load_from_string(good)
        for entry in model.metadata_props:
            if entry.key == policyfile.GOLDEN_KEY:
                golden = {k: v.copy() for k, v in policyfile.unpack_arrays(entry.value).items()}
                golden["actions"] += 0.01
                entry.value = policyfile.pack_arrays(golden)
        refused(model.SerializeToString(), "fails its self-test")
        refused(export(3, length=4).read_bytes(), "another robot (served, new): chunk_length: 5, 4")
        refused(export(3).read_bytes(), "changes a recent action by", max_change=1e-3)
        served.unlink()
        assert not Reloader(server, served, watch=False).reload() and "no policy file at" in caplog.text
        assert client.status()["reloads_refused"] == 5


def test_nobody_keeps_a_policy_that_was_replaced(server: PolicyServer, served: Path, export: Export) -> None:
    old, noise = weakref.ref(server.policy), chunk_noise((1, 5, 7), 0)
    with PolicyClient(server.address) as idle:
        for _ in range(2):
            idle.infer(observation(), noise)
        export(2).replace(served)
        assert Reloader(server, served, watch=False).reload()
        soon(lambda: old() is None)


def test_a_session_that_asked_for_it_changes_policy_between_episodes_only(
    server: PolicyServer, served: Path, export: Export
) -> None:
    old = server.policy.version
    with PolicyClient(server.address, swap="episode") as steady, PolicyClient(server.address) as eager:
        assert steady.begin_episode(0) == old
        export(2).replace(served)
        assert Reloader(server, served, watch=False).reload()
        soon(lambda: eager.infer(observation()) is not None and eager.policy_version != old)
        new = eager.policy_version
        noise = chunk_noise((1, 5, 7), 0)
        expected = OnnxPolicy(served).infer(observation(), noise)
        assert not np.allclose(steady.infer(observation(), noise), expected, atol=1e-3)
        assert steady.policy_version == old and steady.spec.notes["seed"] == 1
        assert steady.begin_episode(1) == new
        assert np.array_equal(steady.infer(observation(), noise), expected)
        assert steady.policy_version == new and steady.spec.notes["seed"] == 2
