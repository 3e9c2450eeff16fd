"""The whole circle with tiny budgets, through the command line alone: demonstrations, training, evaluation, serving,
running, logging, replaying, training on what was logged."""

from pathlib import Path

import numpy as np

from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.utils.seeding import chunk_noise
from tests.conftest import Program

TINY = [
    "--offline-steps",
    "20",
    "--online-steps",
    "60",
    "--eval-every",
    "60",
    "--eval-episodes",
    "1",
    "--final-eval-episodes",
    "1",
    "--flow.width",
    "32",
    "--flow.depth",
    "2",
    "--learner.critic-width",
    "32",
    "--learner.batch-size",
    "32",
]


def test_the_whole_circle(program: Program, tmp_path: Path) -> None:
    collected = program("demos", "collect", "--env", "lift", "--episodes", 4, "--out", "d.zarr")
    assert collected["episodes"] == 4

    trained = program("train", "--env", "lift", "--demos", "d.zarr", "--out", "run", *TINY)
    assert trained["env_steps"] >= 60 and 0 <= trained["success_rate"] <= 1
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "metrics.csv", "checkpoint.pt", "curve.png", "lift.onnx"} <= made

    evaluated = program("eval", "--policy", "run/lift.onnx", "--env", "lift", "--episodes", 2, "--seed", 30_000)
    assert evaluated["episodes"] == 2 and len(evaluated["ci95"]) == 2

    with program.serving("run/lift.onnx") as address:
        ran = program("run", "--robot", "sim:lift", "--server", address, "--episodes", 2, "--log", "episodes.zarr")
    assert ran["episodes"] == 2
    # The same seeds and the same noise: served over the network, the policy does what it does in this process.
    assert ran["successes"] == evaluated["successes"]
    policy, log = OnnxPolicy(tmp_path / "run" / "lift.onnx"), EpisodeLog.open(tmp_path / "episodes.zarr")
    episode = log.read(1)
    assert episode.info["seed"] == 30_001 and episode.info["policy_version"] == policy.version
    for step in range(0, len(episode) - 5, 5):
        observation = {key: rows[step][None] for key, rows in episode.observations.items()}
        chunk = policy.infer(observation, chunk_noise((1, 5, 7), 30_001, step))[0]
        assert np.array_equal(episode.policy_action[step : step + 5], chunk)

    replayed = program("replay", "episodes.zarr", "--episode", 1)
    assert replayed["max_state_deviation"] <= 1e-9
    assert replayed["steps"] > 0

    again = program(
        *("train", "--env", "lift", "--demos", "none", "--replay", "episodes.zarr", "--out", "again", *TINY),
        *("--online-steps", 0),
    )
    assert again["env_steps"] == 0 and (tmp_path / "again" / "lift.onnx").exists()
