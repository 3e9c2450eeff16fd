"""Fixtures: small real things, made once per session."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from sacflow_robot.cli import main
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.tasks import get_task
from sacflow_robot.episode import Episode
from sacflow_robot.export.to_onnx import export_policy
from sacflow_robot.learn.config import FlowConfig
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.spec import RobotSpec

torch.set_num_threads(1)  # tests may share the cores with other work, which threads that wait for each other hate

# A machine that is busy with other things fails no test.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2**30:
    # tmp_path in memory: logs are flushed to disk step by step, and tests would wait for the disk most of the time.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

HUMAN_DEMOS = Path(__file__).parents[2] / "shared" / "data" / "lift_human" / "demo.hdf5"
TINY_FLOW = FlowConfig(width=32, depth=2, gate_width=16)


@pytest.fixture(scope="session")
def robot_spec() -> RobotSpec:
    return get_task("lift").robot


@pytest.fixture(scope="session")
def robot(robot_spec: RobotSpec) -> RobotSpec:
    """The same, where a module has no robot of its own."""
    return robot_spec


@pytest.fixture(scope="session")
def human_demos() -> Path:
    if not HUMAN_DEMOS.exists():
        pytest.skip(f"the human demonstrations are not at {HUMAN_DEMOS}")
    return HUMAN_DEMOS


@pytest.fixture(scope="session")
def env() -> Iterator[RobosuiteEnv]:
    made = RobosuiteEnv("lift")
    yield made
    made.close()


@pytest.fixture(scope="session")
def policy_file(robot_spec: RobotSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained flow-g policy."""
    torch.manual_seed(0)
    policy = FlowPolicy("flow-g", robot_spec.observation_dim, 5 * robot_spec.action_dim, TINY_FLOW)
    path = tmp_path_factory.mktemp("policy") / "lift.onnx"
    export_policy(policy, policy.make_spec(robot_spec, {"seed": 0}), path)
    return path


@pytest.fixture
def make_episode(robot_spec: RobotSpec) -> Callable[..., Episode]:
    """Episodes of made-up numbers; observation t starts with the number t, so that windows can be recognized."""

    def make(steps: int, *, success: bool = True, seed: int = 0, states: bool = True) -> Episode:
        rng = np.random.default_rng(seed)
        observations = {
            a.key: rng.standard_normal((steps + 1, *a.shape)).astype(np.float32) for a in robot_spec.observations
        }
        observations["robot0_eef_pos"][:, 0] = np.arange(steps + 1)
        observations["robot0_eef_pos"][:, 1] = seed
        actions = rng.uniform(-1, 1, (steps, robot_spec.action_dim)).astype(np.float32)
        last = np.arange(steps) == steps - 1
        return Episode(
            observations=observations,
            action=actions,
            policy_action=actions + 1,
            measured=np.full_like(actions, np.nan),
            source=np.zeros(steps, np.uint8),
            rewards=(last & success).astype(np.float32),
            terminated=last & success,
            truncated=last & (not success),
            time_ns=np.arange(steps + 1) * 50_000_000,
            states=rng.standard_normal((steps + 1, 32)) if states else None,
            info={"success": success, "seed": seed},
        )

    return make


class Program:
    """The command line in an empty folder; run in this process, which has imported already what takes seconds to import.

    Attributes:
        said: What the last command wrote to stderr.
        served: What the last server wrote to stderr.
    """

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._folder = folder
        self._capsys = capsys
        self.said = ""
        self.served = ""

    def __call__(self, *words: object) -> dict[str, Any]:
        """Run a command that must succeed; returns its JSON object."""
        status = main([*map(str, words), "--json"])
        captured = self._capsys.readouterr()
        self.said = captured.err
        assert status == 0, self.said
        result: dict[str, Any] = json.loads(captured.out.splitlines()[-1])
        return result

    @contextmanager
    def serving(self, policy: str, *options: str) -> Iterator[str]:
        """Serve a policy file in a process of its own; yields the address."""
        command = [sys.executable, "-m", "sacflow_robot", "serve", "--policy", policy, "--bind", "tcp://127.0.0.1:*"]
        server = subprocess.Popen([*command, *options], cwd=self._folder, stderr=subprocess.PIPE, text=True)
        try:
            assert server.stderr is not None
            yield server.stderr.readline().split(" at ")[-1].strip()
        finally:
            server.terminate()
            self.served = server.communicate()[1]


@pytest.fixture
def program(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SACFLOW_ROBOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    return Program(tmp_path, capsys)
