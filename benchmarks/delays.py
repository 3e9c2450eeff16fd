"""Success of a policy on ``rtsim`` against delay, jitter, loss and noise, with and without prefix-completing chunks.

    python benchmarks/delays.py --policy policies/lift.onnx --episodes 50 --out benchmarks/results/delays

Writes OUT.csv and OUT.png; points that OUT.csv holds already are kept. Everything happens on the virtual clock. The policy
runs in this process, and its answer to what was asked is there ``--inference-ms`` later by that clock, in every study but
the one that varies it. Chunks are streamed as ``sacflow-robot run`` does for a robot that moves on its own; with a prefix,
each is completed from the actions that are played before it can be there, without one it is blended in.
"""

import argparse
import csv
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sacflow_robot.episode import StepFlag
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.interfaces import Clock
from sacflow_robot.robot.control.action_queue import ActionQueue
from sacflow_robot.robot.control.run_config import RunConfig
from sacflow_robot.robot.control.session import run_episode
from sacflow_robot.robot.drivers.rtsim import VirtualRobot
from sacflow_robot.robot.drivers.rtsim_options import RtsimOptions
from sacflow_robot.robot.safety.filter import SafetyFilter
from sacflow_robot.robot.safety.safety_limits import SafetyLimits
from sacflow_robot.spec import FloatArray, Observation
from sacflow_robot.utils.intervals import wilson_interval

INFERENCE = "inference_ms"
STUDIES = {
    "inference (ms)": (INFERENCE, (0, 50, 100, 150, 200)),
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
    """A policy in this process, asked as a server is; its answer is there after a fixed time of a clock.

    Args:
        policy: The policy.
        clock: The clock.
        inference_ms: How long an answer takes.
        prefix: Whether to complete what is being played, where the policy can.
    """

    def __init__(self, policy: OnnxPolicy, clock: Clock, inference_ms: float, prefix: bool) -> None:
        self.spec, self.takes_prefix = policy.spec, prefix and policy.takes_prefix
        self._policy, self._clock, self._takes_ns = policy, clock, round(inference_ms * 1e6)
        self._number, self._ready_ns, self._answer = 0, 0, np.zeros(0, np.float32)

    def ask(
        self,
        observation: Observation,
        noise: FloatArray | None = None,
        deadline_s: float | None = None,
        *,
        prefix: FloatArray | None = None,
        prefix_mask: FloatArray | None = None,
    ) -> int:
        assert noise is not None
        self._answer = self._policy.infer(observation, noise, prefix, prefix_mask)
        self._number, self._ready_ns = self._number + 1, self._clock.now_ns() + self._takes_ns
        return self._number

    def keep_alive(self) -> None:
        """Nothing to keep: the policy is in this process."""

    def collect(self, number: int, wait_s: float | None = None) -> FloatArray:
        if self._clock.now_ns() < self._ready_ns:
            if wait_s is not None:
                raise TimeoutError
            self._clock.sleep_until(self._ready_ns)
        return self._answer


def measure(
    robot: VirtualRobot,
    policy: OnnxPolicy,
    options: RtsimOptions,
    inference_ms: float,
    prefix: bool,
    seeds: Sequence[int],
) -> dict[str, float]:
    """Episodes solved, steps of an episode, and how much the commanded motion changes where a chunk begins to be played."""
    robot.options = robot.plant.options = options
    client = LocalClient(policy, robot.clock, inference_ms, prefix)
    safety, chooser = SafetyFilter(robot.spec, LIMITS), ActionQueue(client, clock_ns=robot.clock.now_ns)
    solved, steps, jumps = 0, 0, []
    for seed in seeds:
        run = run_episode(robot, policy, seed, RunConfig(policy_version="local", safety=safety, actions=chooser))
        episode = run.episode
        solved, steps = solved + episode.success, steps + len(episode)
        assert episode.flags is not None
        joined = (episode.flags[1:] & StepFlag.CHUNK_START) != 0
        jumps.append(np.abs(np.diff(episode.policy_action[:, :6], axis=0))[joined].mean(axis=1))
    low, high = wilson_interval(solved, len(seeds))
    return {
        "episodes": len(seeds), "successes": solved, "success_rate": solved / len(seeds), "ci95_low": round(low, 4),
        "ci95_high": round(high, 4), "mean_steps": round(steps / len(seeds), 1),
        "mean_jump": round(float(np.concatenate(jumps).mean()), 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=Path("policies/lift.onnx"))
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=10_000)
    parser.add_argument("--inference-ms", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/delays"))
    options = [option for option, _ in STUDIES.values()]
    parser.add_argument("--only", nargs="+", choices=options, default=options, help="studies of these options")
    given = parser.parse_args()
    policy, path = OnnxPolicy(given.policy), given.out.with_suffix(".csv")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows = read(path)
    robot = VirtualRobot(policy.spec.robot.task)
    robot.connect()
    seeds = range(given.seed, given.seed + given.episodes)
    studies = [study for study in STUDIES.items() if study[1][0] in given.only]
    for (study, (option, values)), prefix in itertools.product(studies, (False, True)):
        for value in values:
            point = {"study": study, "option": option, "value": value, "prefix": int(prefix)}
            if any(all(str(row[key]) == str(point[key]) for key in point) for row in rows):
                continue  # from a run that was interrupted
            inference_ms = value if option == INFERENCE else given.inference_ms
            options = RtsimOptions() if option == INFERENCE else RtsimOptions(**{option: value})
            point |= {"inference_ms": inference_ms, **measure(robot, policy, options, inference_ms, prefix, seeds)}
            rows.append(point)
            print(json.dumps(point), flush=True)
            write(path, rows)
    rows.sort(key=lambda row: (list(STUDIES).index(row["study"]), int(row["prefix"]), float(row["value"])))
    write(path, rows)
    draw(rows, given.out.with_suffix(".png"), f"{given.policy.name} on rtsim:{policy.spec.robot.task}")


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

    measures = (("success (%)", "success_rate", 100), ("steps per episode", "mean_steps", 1))
    figure, axes = plt.subplots(len(measures) * 2, 4, figsize=(13, 10), layout="constrained")
    for place, study in enumerate(STUDIES):
        for row, (label, key, scale) in enumerate(measures):
            axis = axes[place // 4 * len(measures) + row, place % 4]
            for prefix, name, style in ((0, "blended chunks", "o-"), (1, "prefix-completing chunks", "s--")):
                part = [r for r in rows if r["study"] == study and int(r["prefix"]) == prefix]
                x, y = [float(r["value"]) for r in part], [scale * float(r[key]) for r in part]
                (line,) = axis.plot(x, y, style, markersize=4, label=name)
                if key == "success_rate":
                    low, high = ([scale * float(r[k]) for r in part] for k in ("ci95_low", "ci95_high"))
                    axis.fill_between(x, low, high, alpha=0.15, linewidth=0, color=line.get_color())
            axis.set(xlabel=study, ylim=(0, 103) if row == 0 else (0, 310))
            axis.grid(alpha=0.3)
            if place % 4 == 0:
                axis.set_ylabel(label)
    axes[0, 0].legend(loc="lower left")
    figure.suptitle(f"{title}: success with its 95 % Wilson interval, {rows[0]['episodes']} episodes a point")
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
