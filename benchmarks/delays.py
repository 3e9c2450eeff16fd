"""Success of a policy on ``rtsim`` against delay, jitter, loss and noise, on the virtual clock.

    python benchmarks/delays.py --policy policies/lift.onnx --episodes 50 --out benchmarks/results/delays

Writes OUT.csv and OUT.png; points that OUT.csv holds already are kept. The policy runs in this process, and its answers take as long as ``--inference-ms`` says,
in steps of the control period. Chunks are streamed as ``sacflow-robot run`` does for an arm that moves on its own.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sacflow_robot.robot.link import LinkOptions
from sacflow_robot.robot.loop import run_episode
from sacflow_robot.robot.rtsim import VirtualArm
from sacflow_robot.robot.safety import SafetyFilter
from sacflow_robot.safetylimits import SafetyLimits
from sacflow_robot.serve.policy import OnnxPolicy
from sacflow_robot.serve.stream import ChunkStream
from sacflow_robot.spec import FloatArray, Observation
from sacflow_robot.statistics import wilson_interval

STUDIES = {
    "observation delay (ms)": ("obs_delay_ms", (0, 50, 100, 150, 200)),
    "command delay (ms)": ("cmd_delay_ms", (0, 50, 100, 150, 200)),
    "jitter, up to (ms)": ("jitter_ms", (0, 50, 100, 200)),
    "observations lost": ("obs_drop", (0, 0.2, 0.5)),
    "commands lost": ("cmd_drop", (0, 0.2, 0.5)),
    "noise on lengths (m)": ("noise_m", (0, 0.002, 0.005, 0.01, 0.02)),
    "noise on rotations (rad)": ("noise_rad", (0, 0.02, 0.05, 0.1)),
}
# Patient: a study of delays is not one of holds.
LIMITS = SafetyLimits(max_observation_age_s=10, max_action_age_s=10, patience_s=10, max_command_delay_s=0.3)


class LocalClient:
    """A policy in this process, asked as a server is; its answer is there after some control periods."""

    def __init__(self, policy: OnnxPolicy) -> None:
        self.spec, self._policy, self._answer = policy.spec, policy, (0, np.zeros(0, np.float32))
        self.takes_prefix = False

    def ask(
        self, observation: Observation, noise: FloatArray | None = None, deadline_s: float | None = None, **_: object
    ) -> int:
        assert noise is not None
        self._answer = self._answer[0] + 1, self._policy.infer(observation, noise)
        return self._answer[0]

    def collect(self, number: int, wait_s: float | None = None) -> FloatArray:
        return self._answer[1]


def success(robot: VirtualArm, policy: OnnxPolicy, link: LinkOptions, seeds: Sequence[int]) -> tuple[int, float]:
    """Episodes solved, and steps that one takes on average."""
    robot.link = robot.world.link = link
    safety, chooser = SafetyFilter(robot.spec, LIMITS), ChunkStream(LocalClient(policy), clock_ns=robot.clock.now_ns)
    solved, steps = 0, 0
    for seed in seeds:
        run = run_episode(robot, policy, seed, policy_version="local", safety=safety, chooser=chooser)
        solved, steps = solved + run.episode.success, steps + len(run.episode)
    return solved, steps / len(seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=Path("policies/lift.onnx"))
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/delays"))
    given = parser.parse_args()
    policy, path = OnnxPolicy(given.policy), given.out.with_suffix(".csv")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows = read(path)
    robot = VirtualArm(policy.spec.arm.task)
    robot.connect()
    for study, (option, values) in STUDIES.items():
        for value in values:
            if any(row["option"] == option and float(row["value"]) == value for row in rows):
                continue  # from a run that was interrupted
            seeds = range(given.seed, given.seed + given.episodes)
            solved, steps = success(robot, policy, LinkOptions(**{option: value}), seeds)
            low, high = wilson_interval(solved, given.episodes)
            rows.append(
                {"study": study, "option": option, "value": value, "episodes": given.episodes, "successes": solved,
                 "success_rate": solved / given.episodes, "ci95_low": round(low, 4), "ci95_high": round(high, 4),
                 "mean_steps": round(steps, 1)}
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
            write(path, rows)
    draw(rows, given.out.with_suffix(".png"), f"{given.policy.name} on rtsim:{policy.spec.arm.task}")


def read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(13, 5.6), sharey=True, layout="constrained")
    for axis, study in zip(axes.flat, STUDIES, strict=False):
        part = [row for row in rows if row["study"] == study]
        x = [float(row["value"]) for row in part]
        y, low, high = ([100 * float(row[k]) for row in part] for k in ("success_rate", "ci95_low", "ci95_high"))
        axis.fill_between(x, low, high, alpha=0.2, linewidth=0)
        axis.plot(x, y, marker="o", markersize=4)
        axis.set(xlabel=study, ylim=(0, 103))
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("success (%)")
    axes.flat[-1].axis("off")
    figure.suptitle(f"{title}: success and 95 % Wilson interval, {rows[0]['episodes']} episodes a point")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
