"""What can be seen of a running server from outside."""

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sacflow_robot.cli import main
from sacflow_robot.errors import DeadlineExceeded, RefusedError
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.serve.client import PolicyClient
from sacflow_robot.serve.server import PolicyServer
from tests.serve.test_crash import observation

DASHBOARD = Path(__file__).parents[2] / "launch" / "grafana.json"


@pytest.fixture
def server(policy_file: Path) -> Iterator[PolicyServer]:
    """After three answers, one late request and one refused one."""
    with PolicyServer(OnnxPolicy(policy_file), "tcp://127.0.0.1:*") as running:
        running.start()
        with PolicyClient(running.address, name="arm") as client:
            for _ in range(3):
                client.infer(observation())
            with pytest.raises(DeadlineExceeded):
                client.collect(client.ask(observation(), deadline_s=0.0))
            with pytest.raises(RefusedError):
                client.infer({})
            running.meters.clients(1)
            yield running


def scrape(server: PolicyServer) -> dict[tuple[str, ...], float]:
    port = server.meters.expose("127.0.0.1", 0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {
        (s.name, *(s.labels[label] for label in sorted(s.labels, reverse=True))): s.value
        for family in families
        for s in family.samples
    }


def test_prometheus_finds_what_happened(server: PolicyServer) -> None:
    found = scrape(server)
    assert found[("sacflow_requests_total",)] == 3 and found[("sacflow_late_total",)] == 1
    assert found[("sacflow_refused_total", "invalid")] == 1 and found[("sacflow_clients",)] == 1
    assert found[("sacflow_policy_info", server.policy.version, "flow-g")] == 1
    for phase in ("queue", "infer", "total"):
        assert found[("sacflow_latency_seconds_count", phase)] == 3
    assert found[("sacflow_latency_seconds_sum", "total")] >= found[("sacflow_latency_seconds_sum", "infer")] > 0
    assert found[("sacflow_batch_rows_sum",)] == 3


def test_the_dashboard_asks_for_metrics_that_there_are(server: PolicyServer) -> None:
    server.meters.dropped()
    server.meters.reloaded("taken", {})
    there = {name for name, *_ in scrape(server)}
    asked = set(re.findall(r"sacflow_[a-z_]+", DASHBOARD.read_text()))
    assert len(asked) >= 8 and asked <= there, asked - there
    json.loads(DASHBOARD.read_text())


def test_top_shows_counts_latencies_and_clients(server: PolicyServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--server", server.address, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["requests"], data["late"], data["refused"]) == (3, 1, 1)
    assert {"client": "arm", "requests": 3, "late": 1, "refused": 1} in data["clients"]
    assert 0 < data["latency_us"]["infer"]["p50"] <= data["latency_us"]["total"]["p99"]
    assert main(["top", "--server", server.address, "--once"]) == 0
    shown, remarks = capsys.readouterr()
    assert not remarks
    for word in ("answered", "infer", "arm", server.policy.version, "cpu, 1 thread"):
        assert word in shown


@pytest.mark.parametrize("asked", [0, 1, 5])
def test_a_client_that_says_goodbye_is_not_one_that_was_dropped(policy_file: Path, asked: int) -> None:
    with PolicyServer(OnnxPolicy(policy_file), "tcp://127.0.0.1:*") as server:
        server.start()
        for _ in range(5):
            with PolicyClient(server.address) as client:
                for _ in range(asked):  # answers that it does not stay for
                    client.ask(observation())
        with PolicyClient(server.address) as client:
            deadline = time.monotonic() + 2.5
            while time.monotonic() < deadline:
                assert client.status()["dropped"] == 0
                time.sleep(0.2)


def test_a_client_that_leaves_without_a_word_is_one_that_was_dropped(policy_file: Path) -> None:
    with PolicyServer(OnnxPolicy(policy_file), "tcp://127.0.0.1:*") as server:
        server.start()
        client = PolicyClient(server.address, name="rude")
        with patched_evaluation(0.3):
            client.ask(observation())
            time.sleep(0.1)
            client._linked = False  # says nothing
            client.close()
            deadline = time.monotonic() + 5
            while not server.meters.counts["dropped"] and time.monotonic() < deadline:
                time.sleep(0.05)
        assert server.meters.counts["dropped"] == 1


@contextmanager
def patched_evaluation(seconds: float) -> Iterator[None]:
    """Every evaluation takes so much longer."""

    run = OnnxPolicy.run

    def slow(self: OnnxPolicy, inputs: dict[str, np.ndarray]) -> np.ndarray:
        time.sleep(seconds)
        return run(self, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxPolicy, "run", slow)
        yield


def test_a_server_with_every_door_open_logs_json_and_stops(policy_file: Path, tmp_path: Path) -> None:
    served = tmp_path / "served.onnx"
    served.write_bytes(policy_file.read_bytes())
    doors = ["--openpi", "127.0.0.1:0", "--groot", f"ipc://{tmp_path}/groot", "--metrics", "127.0.0.1:0", "--reload"]
    words = ["serve", "--policy", served, "--bind", f"ipc://{tmp_path}/native", "--log-format", "json", *doors]
    command = [sys.executable, "-m", "sacflow_robot", *map(str, words)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        first = json.loads(server.stderr.readline())
        assert first["event"].startswith("serving ") and first["policy_version"] == OnnxPolicy(served).version
        with PolicyClient(f"ipc://{tmp_path}/native", name="arm\n1", timeout_s=10) as client:
            assert np.isfinite(client.infer(observation())).all()
            served.write_bytes(b"junk")
            lines = []
            while not lines or "refused" not in lines[-1]["event"]:
                lines.append(json.loads(server.stderr.readline()))
            server.send_signal(signal.SIGHUP)
            assert "refused" in json.loads(server.stderr.readline())["event"]
        events = {line["event"]: line for line in lines}
        assert events["client connected"]["client"] == "arm1" and lines[-1]["level"] == "warning"
        assert any("openpi clients are served at ws://127.0.0.1:" in event for event in events)
        assert any("metrics for Prometheus at http://127.0.0.1:" in event for event in events)
    finally:
        server.send_signal(signal.SIGTERM)
        _, rest = server.communicate(timeout=20)
    assert server.returncode == 0 and json.loads(rest.splitlines()[-1])["event"] == "stopped after 1 requests"
    assert not (tmp_path / "native").exists() and not (tmp_path / "groot").exists()
