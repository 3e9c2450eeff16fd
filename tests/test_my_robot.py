"""A robot of one's own goes round the circle by command line alone: the commands of examples/my_robot/README.md."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import Program

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


def test_a_robot_of_ones_own_learns_from_its_log_and_does_better_than_chance(program: Program, tmp_path: Path) -> None:
    def run(policy: str, episodes: int, seed: int, log: str) -> dict[str, Any]:
        with program.serving(policy, "--threads", "1") as address:
            options = "--episodes", episodes, "--seed", seed, "--log", log, "--timeout", 60
            result = program("run", "--robot", DRIVER, "--server", address, *options)
        assert "run --robot DRIVER:..." in program.served
        return result

    made = subprocess.run([sys.executable, EXAMPLE / "demonstrator.py"], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert run("expert.onnx", 60, 1, "demos.zarr")["successes"] == 60
    assert f"replay demos.zarr --episode 0 --robot {DRIVER}" in program.said
    assert re.search(r"sacflow-robot train --replay demos.zarr$", program.said, re.MULTILINE), (
        "no --env lift for a gantry"
    )

    trained = program("train", "--replay", "demos.zarr", "--out", "run", *TRAINING)
    assert (
        "robot: Gantry, part into bin; no environment of it is known here, so that nothing is evaluated" in program.said
    )
    assert trained["success_rate"] is None and trained["bc_success_rate"] is None and trained["env_steps"] == 0
    assert "offline" in program.said and "online " not in program.said, "no bar of steps that are not taken"
    policy = trained["policy"]
    assert policy == "run/part-into-bin.onnx", "named by the robot's task"

    learned = run(policy, 30, 1000, "policy.zarr")
    chance = run("chance.onnx", 15, 1000, "chance.zarr")
    assert chance["success_rate"] <= 0.1 and learned["success_rate"] >= 0.7

    again = program("replay", "policy.zarr", "--episode", 0, "--robot", DRIVER)
    assert again["success"] and set(again["max_observation_deviation"].values()) == {0.0}
    assert program("demos", "info", "demos.zarr", "--plots", "none")["episodes"] == 60
    assert program("log", "info", "policy.zarr")["successes"] == learned["successes"]
