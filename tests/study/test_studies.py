"""Each study at a tiny budget: what it writes, and the numbers it is made of."""

import csv
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sacflow_robot.cli import main
from sacflow_robot.envs.registry import get_robot
from sacflow_robot.learn.algorithms.registry import make_agent
from sacflow_robot.learn.config import FlowConfig
from sacflow_robot.learn.networks.policy import Rollout
from sacflow_robot.study import architecture, gradients, likelihood, two_ways
from sacflow_robot.study.options import GradientsOptions, TrialOptions
from sacflow_robot.study.report import geometric_mean, listed
from sacflow_robot.study.targets import (
    GAUSSIAN,
    MIXTURE,
    divergence_of_steps,
    exact_policy,
    gaussian_divergence,
    gaussian_steps,
)
from sacflow_robot.study.two_ways import action_distance, rarer_way, trial_config

TINY = ["--seeds", "1", "--offline-steps", "3", "--online-steps", "60", "--episodes", "4", "--workers", "1"]


def study(
    capsys: pytest.CaptureFixture[str], folder: Path, name: str, *options: str
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Result of a study, and the rows of its table; its three files are checked for what every study's have."""
    assert main(["study", name, "--out", str(folder), "--json", *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {path.name for path in folder.iterdir()} == {f"{name}.{kind}" for kind in ("png", "csv", "md")}
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / f"{name}.md").read_text()
    assert text.startswith(result["reading"]) and f"`sacflow-robot study {name} --seed 0" in text
    with (folder / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result["rows"]) and list(rows[0]) == list(result["rows"][0])
    return result, rows


def test_gradients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--updates", "3", "--seeds", "1", "--workers", "1", "--euler-steps", "2", "--env", "Hopper-v5")
    result, rows = study(capsys, tmp_path, "gradients", *options)
    expected = ["updates", "euler_steps", "variant", "seed", "k", "action_gradient", "of_last", "parameter_gradient"]
    assert list(rows[0]) == expected
    assert len(rows) == 2 * len(gradients.VARIANTS) * 3  # before and after; k = 0, 1, 2
    assert {row["variant"] for row in rows} == set(gradients.VARIANTS)
    last = [float(row["of_last"]) for row in rows if row["k"] == "2"]
    assert set(last) == {1.0}
    assert all(name in result["reading"] for name in gradients.VARIANTS)
    # Clipping does not touch the network before training, and weight norm does not change what it computes.
    start = {(r["variant"], r["k"]): float(r["action_gradient"]) for r in rows if r["updates"] == "0"}
    for k in "012":
        for same in ("mlp + clipping", "mlp + weight norm"):
            assert start["mlp", k] == pytest.approx(start[same, k], rel=0.5)
    assert "study gradients --seed 0 --seeds 1 --updates 3 --euler-steps 2 --env Hopper-v5" in (
        Path(result["files"]["md"]).read_text()
    )


def test_gradient_norms_are_autograds(tmp_path: Path) -> None:
    options = GradientsOptions(updates=1, env="Hopper-v5")
    config = gradients._config(options, gradients._Case("mlp", 3, 0))
    agent: Any = make_agent(get_robot("Hopper-v5"), config, torch.device("cpu"))
    observation = torch.randn(1, 11, generator=torch.Generator().manual_seed(0))
    norms, total = gradients.gradient_norms(agent, observation, torch.Generator().manual_seed(1))
    assert norms.shape == (4,) and total > 0
    # At k = 0 by finite differences: the loss as a function of the noise A_0 alone.
    noise = agent.policy.draw(1, torch.Generator().manual_seed(1)).double()
    policy, critic = agent.policy.double(), agent.critic.double()

    def loss(start: torch.Tensor) -> float:
        with torch.no_grad():
            moved = torch.cat([start[None, None], noise[1:]])
            rollout = policy.rollout(observation.double(), moved)
            value = critic(policy.normalize(observation.double()), rollout.action).amin(0)
            return -float(value)

    steps = 1e-5 * torch.eye(3, dtype=torch.float64)
    slope = [(loss(noise[0, 0] + step) - loss(noise[0, 0] - step)) / 2e-5 for step in steps]
    assert norms[0].item() == pytest.approx(np.linalg.norm(slope), rel=1e-3)


@pytest.mark.slow
def test_likelihood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, rows = study(capsys, tmp_path, "likelihood", "--samples", "2000")
    expected = ["part", "target", "euler_steps", "noise_scale", "drift", "std", "value", "standard_error", "expected"]
    assert list(rows[0]) == expected
    for row in rows:
        if row["expected"] != "nan":
            off = abs(float(row["value"]) - float(row["expected"]))
            assert off < 5 * float(row["standard_error"]) + 1e-3 or row["part"] == "entropy, path"
    drifts = {"true", "false", "no noise", "samples of the target"}
    assert {row["drift"] for row in rows if row["part"] == "marginal off the target"} == drifts
    assert "integrates to 1" in result["reading"]


def test_a_density_without_its_log_sigma_does_not_integrate_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = exact_policy(MIXTURE, 2, 4, 0.8)
    mass, error = likelihood.total_mass(policy, 4000, 0)
    assert mass == pytest.approx(1, abs=5 * error)
    rollout = policy.rollout

    def forgetful(observation: torch.Tensor, noise: torch.Tensor) -> Rollout:
        made = rollout(observation, noise)
        return replace(made, log_prob=made.log_prob + 8 * math.log(0.8))  # K D log sigma

    monkeypatch.setattr(policy, "rollout", forgetful)
    mass, error = likelihood.total_mass(policy, 4000, 0)
    assert mass == pytest.approx(0.8**8, abs=5 * error)


def test_the_distance_to_a_target_by_hand() -> None:
    shares = np.linspace(0.0005, 0.9995, 1000)
    moved = torch.from_numpy(MIXTURE.quantiles(shares) + 0.25)
    assert likelihood.wasserstein(moved, MIXTURE) == pytest.approx(0.25, abs=1e-6)


def test_the_divergence_of_euler_steps_is_the_same_by_quadrature_and_in_closed_form() -> None:
    ends = gaussian_steps(GAUSSIAN, 4, 0.0)
    closed = gaussian_divergence(ends.means[-1], ends.stds[-1], GAUSSIAN.means[0], GAUSSIAN.stds[0])
    assert divergence_of_steps(GAUSSIAN, 4) == pytest.approx(closed)
    twice = type(GAUSSIAN)("split", (0.5, 0.5), GAUSSIAN.means * 2, GAUSSIAN.stds * 2)  # the same, by the other way
    assert divergence_of_steps(twice, 4) == pytest.approx(closed, rel=1e-4)


@pytest.mark.slow
def test_regularization(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, rows = study(capsys, tmp_path, "regularization", *TINY)
    measures = ["success_rate", "rarer_way", "mean_steps", "action_distance", "last_weight", "finished"]
    assert list(rows[0]) == ["bc_loss", "schedule", "seed", *measures]
    pairs = {(row["bc_loss"], row["schedule"]) for row in rows}
    regularizers, schedules = ("action", "flow-matching", "same-noise"), ("constant", "linear", "adaptive")
    assert pairs == {("cloning", "-"), *((r, s) for r in regularizers for s in schedules)}
    assert "cloning" in result["reading"] and "constant" in result["reading"]


@pytest.mark.slow
def test_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, rows = study(capsys, tmp_path, "architecture", *TINY, "--widths", "128", "--euler-steps", "4")
    measures = ["success_rate", "mean_steps", "gradient_ratio", "finished", "torch_us", "onnx_us", "heads_difference"]
    assert list(rows[0]) == ["velocity", "width", "euler_steps", "gate_start", "heads", "seed", *measures]
    starts = [float(row["gate_start"]) for row in rows if row["velocity"] == "flow-g"]
    assert sorted(starts) == [-2, 0, 2, 5]
    assert all(float(row["torch_us"]) > 0 < float(row["onnx_us"]) for row in rows if row["heads_difference"] == "nan")
    assert [int(row["heads"]) for row in rows if row["heads_difference"] != "nan"] == [1, 2, 4, 8]


def test_heads_are_no_choice() -> None:
    assert max(map(architecture.heads_difference, (1, 4))) < 1e-12


def test_a_gate_starts_as_told() -> None:
    options, robot = TrialOptions(), two_ways.TwoWays().robot
    for velocity, start, share in (("flow-g", 0.0, 0.5), ("flow-l", 1.0, 0.5)):
        config = trial_config(options, 0, FlowConfig(width=16, depth=1, gate_width=8))
        agent: Any = make_agent(robot, type(config)(**{**vars(config), "velocity": velocity}), torch.device("cpu"))
        architecture.start_gate(agent, start)
        net = agent.policy.velocity
        bias = net.gate.head.bias if velocity == "flow-g" else net.head.bias[: agent.action_dim]
        assert torch.allclose(bias.sigmoid(), torch.full_like(bias, share))
        assert torch.equal(next(agent.average_policy.parameters()), next(agent.policy.parameters()))


def test_the_task_has_two_ways_and_an_obstacle_between() -> None:
    env = two_ways.TwoWays()
    result = env.begin(3)
    while not result.ended:
        result = env.command(np.array([0, 1], np.float32))  # straight up: into the disc
    assert result.terminated and not result.success and result.reward == 0
    episodes = two_ways.demonstrate(range(40))
    paths = [e.observations["position"] for e in episodes if e.success]
    assert len(paths) > 30 and 0.25 < rarer_way(paths) <= 0.5
    assert all(np.linalg.norm(path, axis=-1).min() > two_ways.OBSTACLE for path in paths)
    assert env.begin(3).observation["position"] == pytest.approx(env.begin(3).observation["position"])


def test_measures_by_hand() -> None:
    left, right = (np.array([[0, -1], [x, 0.1], [0, 1]], np.float32) for x in (-0.6, 0.6))
    assert rarer_way([left, left, left, right]) == 0.25 and rarer_way([left]) == 0 and rarer_way([]) == 0
    assert two_ways.distance_to_segment(np.array([-1.0, 0.5]), np.array([1.0, 0.5])) == 0.5
    assert two_ways.distance_to_segment(np.array([1.0, 1.0]), np.array([2.0, 2.0])) == pytest.approx(math.sqrt(2))
    at, data = np.zeros((1, 2), np.float32), np.array([[0, 0], [0, 0.1]], np.float32)
    actions = np.array([[1, 0], [0, 1]], np.float32)
    assert action_distance(at, np.array([[1, 0.5]], np.float32), data, actions) == 0.5
    assert geometric_mean([1, 100]) == pytest.approx(10) and listed(["a", "b", "c"]) == "a, b and c"


_STUDY = """
import os, sys, time
from pathlib import Path
from sacflow_robot.study.runs import in_parallel

def note_and_wait(folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    in_parallel(note_and_wait, sys.argv[1:] * 2, 2, print)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc which processes live")
def test_workers_end_with_a_study_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "study.py").write_text(_STUDY)
    notes = tmp_path / "notes"
    notes.mkdir()
    with subprocess.Popen([sys.executable, tmp_path / "study.py", notes]) as study:
        try:
            _until(lambda: len(list(notes.iterdir())) == 2)
            workers = [int(path.name) for path in notes.iterdir()]
        finally:
            study.kill()
    _until(lambda: all(map(_is_dead, workers)))


def _is_dead(pid: int) -> bool:
    """Whether nothing but an entry is left that nobody has collected."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def _until(done: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_bad_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "everything"]) == 2
    known = "study architecture, study gradients, study likelihood, study regularization"
    assert f"unknown command 'study everything'; valid names: {known}" in capsys.readouterr().err
    assert main(["study", "gradients", "--out", str(tmp_path), "--variants", "lstm"]) == 2
    assert "unknown variant 'lstm'; valid names: flow-g" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["study", "likelihood", "--out", str(tmp_path / "file")]) == 2
    assert "cannot make the folder" in capsys.readouterr().err
    assert main(["study", "regularization", "--seeds", "0"]) == 2
    assert "--seeds is 0; it must be at least 1" in capsys.readouterr().err
