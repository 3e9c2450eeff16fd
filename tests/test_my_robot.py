"""A robot of one's own goes round the circle by command line alone: the commands of examples/my_robot/README.md."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "my_robot"
DRIVER = f"{EXAMPLE}/driver.py:make_robot"
# Few and small, so that it takes seconds; as in the README.
TRAINING = [
    "--algo",
    "bc",
    "--chunk-length",
    "2",
    "--flow.width",
    "64",
    "--offline-steps",
    "1000",
    "--learner.policy-lr",
    "2e-3",
]


def test_the_driver_is_short_and_the_readme_names_what_is_run_here() -> None:
    assert len((EXAMPLE / "driver.py").read_text().splitlines()) <= 60
    assert " ".join(TRAINING) in " ".join((EXAMPLE / "README.md").read_text().split())


@pytest.mark.timeout(240)
def test_a_robot_of_ones_own_learns_from_its_log_and_does_better_than_chance(tmp_path: Path) -> None:
    said = ""

    def program(*words: object) -> dict[str, Any]:
        nonlocal said
        command = [sys.executable, "-m", "sacflow_robot", *map(str, words), "--json"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        said = done.stderr
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    @contextmanager
    def serving(policy: str) -> Iterator[str]:
        command = [sys.executable, "-m", "sacflow_robot", "serve", "--policy", policy, "--bind", "tcp://127.0.0.1:*"]
        server = subprocess.Popen([*command, "--threads", "1"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        try:
            assert server.stderr is not None
            yield server.stderr.readline().split(" at ")[-1].strip()
        finally:
            server.terminate()
            assert "run --robot DRIVER:..." in server.communicate()[1]

    def run(policy: str, episodes: int, seed: int, log: str) -> dict[str, Any]:
        with serving(policy) as address:
            options = "--episodes", episodes, "--seed", seed, "--log", log, "--timeout", 60
            return program("run", "--robot", DRIVER, "--server", address, *options)

    made = subprocess.run([sys.executable, EXAMPLE / "demonstrator.py"], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert run("expert.onnx", 60, 1, "demos.zarr")["successes"] == 60
    assert f"replay demos.zarr --episode 0 --robot {DRIVER}" in said
    assert re.search(r"sacflow-robot train --replay demos.zarr$", said, re.MULTILINE), "no --env lift for a gantry"

    trained = program("train", "--replay", "demos.zarr", "--out", "run", *TRAINING)
    assert "robot: Gantry, part into bin; no environment of it is known here, so that nothing is evaluated" in said
    assert trained["success_rate"] is None and trained["bc_success_rate"] is None and trained["env_steps"] == 0
    assert "offline" in said and "online " not in said, "no bar of steps that are not taken"
    policy = trained["policy"]
    assert policy == "run/part-into-bin.onnx", "named by the robot's task"

    learned = run(policy, 30, 1000, "policy.zarr")
    chance = run("chance.onnx", 15, 1000, "chance.zarr")
    assert chance["success_rate"] <= 0.1 and learned["success_rate"] >= 0.7

    again = program("replay", "policy.zarr", "--episode", 0, "--robot", DRIVER)
    assert again["success"] and set(again["max_observation_deviation"].values()) == {0.0}
    assert program("demos", "info", "demos.zarr", "--plots", "none")["episodes"] == 60
    assert program("log", "info", "policy.zarr")["successes"] == learned["successes"]
