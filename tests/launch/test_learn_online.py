"""Learning while the robot runs, with real processes: what is published is served and logged, what is corrupted is not."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.export.metadata import file_version

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PROGRAM = [sys.executable, "-m", "sacflow_robot"]
FOLLOW = ["--utd-ratio", "0.25", "--warmup-steps", "0", "--publish-every", "40", "--gate-episodes", "12"]


def call(*words: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*PROGRAM, *map(str, words)], capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stderr
    return done


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that cloning alone has made: a policy that solves many of its episodes."""
    out = tmp_path_factory.mktemp("learn") / "run"
    call(
        *[
            "train",
            "--env",
            "lift",
            "--demo-quality",
            "proficient",
            "--demo-episodes",
            "40",
            "--offline-steps",
            "700",
            "--online-steps",
            "0",
        ],
        *("--eval-episodes", 10, "--final-eval-episodes", 0, "--out", out),
    )
    return out


@pytest.fixture
def served(run_dir: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Address of a server of that run's policy, and what it says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    said = tmp_path / "server.log"
    command = [*PROGRAM, "serve", "--policy", str(run_dir / "lift.onnx"), "--reload", "--bind", address]
    with said.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out)
    yield address, said
    server.terminate()
    server.wait(30)


def versions(log: Path) -> list[str]:
    opened = EpisodeLog.open(log)
    return [str(opened.read(i).info["policy_version"]) for i in range(len(opened))]


def wait_for(text: str, path: Path) -> None:
    until = time.monotonic() + 60
    while text not in path.read_text():
        assert time.monotonic() < until, path.read_text()
        time.sleep(0.1)


def test_a_better_policy_is_served_and_a_corrupted_one_is_refused(run_dir: Path, served: tuple[str, Path]) -> None:
    address, said = served
    policy, log = run_dir / "lift.onnx", run_dir / "robot.zarr"
    run = "run", "--robot", "sim:lift", "--server", address, "--timeout", 60, "--log", log, "--episodes"
    first = file_version(policy)
    call(*run, 3)
    steps = EpisodeLog.open(log).steps

    # The first candidate's weights are corrupted on purpose. The gate sees it; the next one is published.
    follow = "follow", run_dir, "--log", log, *FOLLOW, "--json"
    done = call(*follow, "--inject-bad-candidate", 1, "--stop-after", steps)
    result = json.loads(done.stdout)
    assert result["refused"] == 1 and result["published"] >= 1
    assert "refused after" in done.stderr and "worse than success" in done.stderr
    second = file_version(policy)
    assert second != first and f"published version {second}" in done.stderr
    told = (run_dir / "candidates.csv").read_text().splitlines()
    assert "refused" in told[1] and "published" in told[-1] and second in told[-1]
    wait_for(second, said)
    call(*run, 2)
    assert versions(log) == [first] * 3 + [second] * 2, "the log says who chose"

    # Somebody puts a corrupted file in its place: the server keeps what it has.
    whole = policy.read_bytes()
    model = onnx.load(policy)
    weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weights.raw_data = np.frombuffer(weights.raw_data, np.float32)[::-1].tobytes()
    partial = policy.with_suffix(".partial")
    onnx.save(model, partial)
    partial.replace(policy)
    wait_for("new policy file refused", said)
    call(*run, 1)
    assert versions(log)[-1] == second
    policy.write_bytes(whole)

    # The learner's own weights are corrupted: none of its candidates comes through, and it ends with an error.
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    for name, weight in state["agent"]["average_policy"].items():
        if weight.is_floating_point() and weight.ndim == 2:
            state["agent"]["average_policy"][name] = weight.flip(0, 1)
    torch.save(state, run_dir / "checkpoint.pt")
    call(*run, 3)
    done = call(*follow, status=1)
    assert "3 candidates in a row were refused" in done.stderr
    assert file_version(policy) == second
