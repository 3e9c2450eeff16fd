"""Lift policies on twins that they have never seen: trained nominal, wide, by each twin's measured profile, and fine-tuned.

    python benchmarks/transfer.py train --policy nominal      # and wide; sacflow-robot train does it
    python benchmarks/transfer.py measure                     # a profile of each twin, from 60 s of its motion
    python benchmarks/transfer.py fit                         # train --resume run-wide --profile, for each twin
    python benchmarks/transfer.py longer                      # run-wide goes on for as many steps, as wide as before
    python benchmarks/transfer.py tune                        # 30 logged episodes of each twin, then train --resume --replay
    python benchmarks/transfer.py evaluate --policy nominal   # and the others, on 20 twins, 50 episodes each
    python benchmarks/transfer.py report                      # table and figure

Everything lies in --out; what it holds already is kept, twin by twin. Policies are evaluated as `run` drives a robot: on the
virtual clock, through the safety filter, with streamed chunks. No training draws a twin's hidden values; what is known of a
twin is what the three calibrations say, which move it for a minute.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from delays import LocalClient

from sacflow_robot.bench.machine import stamp
from sacflow_robot.data.log.episode_writer import write_log
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.learn.run_folder import RunFolder
from sacflow_robot.robot.control.action_queue import ActionQueue
from sacflow_robot.robot.control.run_config import RunConfig
from sacflow_robot.robot.control.session import run_episode
from sacflow_robot.robot.drivers.registry import make_robot
from sacflow_robot.robot.safety.filter import SafetyFilter
from sacflow_robot.robot.safety.safety_limits import SafetyLimits
from sacflow_robot.utils.intervals import wilson_interval
from sacflow_robot.utils.plot_style import BLUE, GRAY, new_figure, save, tidy

POLICIES = "nominal", "wide", "longer", "profile", "tuned"
LABELS = (
    "nominal\nsimulator",
    "wide",
    "wide,\n8,000 steps more",
    "the robot's profile,\n8,000 steps",
    "profile and\n30 episodes",
)
HISTORY, UNSEEN, FITTING_STEPS = 6, range(100, 120), 8000
INFERENCE_MS = 20.0
LIMITS = SafetyLimits(max_observation_age_s=1, max_action_age_s=1, patience_s=1, max_command_delay_s=0.2)
ROOT = Path(__file__).parents[1]


def drive(policy_file: Path, twin: int | None, seeds: range) -> list[Any]:
    """Episodes of a policy on a twin, or on the nominal arm."""
    policy = OnnxPolicy(policy_file)
    history = next((a.shape[0] for a in policy.spec.robot.observations if a.key == "action_history"), 0)
    which = "" if twin is None else f"&twin={twin}"
    robot: Any = make_robot(f"rtsim:lift?clock=virtual&tick_ms=10&history={history}{which}")
    robot.connect()
    safety, found = SafetyFilter(robot.spec, LIMITS), []
    client = LocalClient(policy, robot.clock, INFERENCE_MS, prefix=False)
    chooser = ActionQueue(client, clock_ns=robot.clock.now_ns)
    for seed in seeds:
        about = {"twin": twin}
        run = run_episode(
            robot, policy, seed, RunConfig(policy_version=policy_file.name, safety=safety, actions=chooser, info=about)
        )
        found.append(run.episode)
    robot.close()
    return found


def measure(out: Path, twins: range) -> None:
    """Profiles of the twins, as a lab makes them."""
    for twin in twins:
        profile, recording = out / f"arm-{twin}.yaml", out / f"arm-{twin}.npz"
        if profile.exists():
            continue
        part = profile.with_suffix(".part.yaml")
        robot = ["--robot", f"rtsim:lift?twin={twin}&joints=1", "--clock", "virtual", "--save", str(recording)]
        known = ["--recording", str(recording), "--profile", str(part)]
        first = [*robot, "--profile", str(ROOT / "calibration" / "franka_twin.yaml")]
        for what, words in {"latency": first, "noise": known, "dynamics": known}.items():
            plot = str(out / f"arm-{twin}-{what}.png")
            sacflow_robot("calibrate", what, *words, "--out", str(part), "--plot", plot)
        part.rename(profile)


def train(name: str, out: Path, extra: list[str]) -> None:
    words = [] if name == "nominal" else ["--randomize", "wide", "--action-history", str(HISTORY)]
    sacflow_robot("train", "--env", "lift", "--out", str(out / f"run-{name}"), *words, *extra)


def fit(out: Path, twins: range) -> None:
    """A run of its own for each twin: the wide run gone on with around what was measured of that twin."""
    for twin in twins:
        run, profile = out / f"fitted-{twin}", out / f"arm-{twin}.yaml"
        if (run / "lift.onnx").exists():
            continue
        new = ["--profile", str(profile), "--online-steps", str(FITTING_STEPS), "--out", str(run)]
        how = [str(run)] if run.exists() else [str(out / "run-wide"), *new]
        sacflow_robot("train", "--resume", *how)


def longer(out: Path) -> None:
    """As many steps more without measuring: what fitting is to be compared with."""
    run = out / "run-longer"
    if not run.exists():
        wide, config = RunFolder.open(out / "run-wide")
        with wide.copied(run) as folder:
            folder.write_config(replace(config, online_steps=config.online_steps + FITTING_STEPS))
    sacflow_robot("train", "--resume", str(run))


def tune(out: Path, twins: range, episodes: int) -> None:
    """The fitted policy of each twin, after episodes logged on that twin with the filter on."""
    for twin in twins:
        run, fitted, log = out / f"tuned-{twin}", out / f"fitted-{twin}", out / f"real-{twin}.zarr"
        if run.exists():
            continue
        if not log.exists():
            found = drive(fitted / "lift.onnx", twin, range(40_000, 40_000 + episodes))
            write_log(log, OnnxPolicy(fitted / "lift.onnx").spec.robot, found)
        sacflow_robot("train", "--resume", str(fitted), "--replay", str(log), "--out", str(run))


def sacflow_robot(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "sacflow_robot", *words], check=True)


def evaluate(name: str, out: Path, twins: list[int | None], episodes: int) -> None:
    kept = out / f"success-{name}.jsonl"
    done = {json.loads(line)["twin"] for line in kept.read_text().splitlines()} if kept.exists() else set()
    for twin in twins:
        if twin in done:
            continue
        folder = {"profile": f"fitted-{twin}", "tuned": f"tuned-{twin}"}.get(name, f"run-{name}")
        found = drive(out / folder / "lift.onnx", twin, range(30_000, 30_000 + episodes))
        row = {"twin": twin, "episodes": len(found), "successes": sum(e.success for e in found)}
        with kept.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(name, row, flush=True)


def over_twins(values: np.ndarray) -> list[float]:  # type: ignore[type-arg]
    """95 % interval of the mean, by drawing twins anew: episodes on one twin are alike."""
    drawn = values[np.random.default_rng(0).integers(len(values), size=(4000, len(values)))]
    return [float(q) for q in np.percentile(drawn.mean(axis=1), [2.5, 97.5])]


def report(out: Path, results: Path) -> None:
    rows, figure = [], new_figure(7, 3.6)
    axes = figure.subplots()
    nominal = 0.0
    for place, name in enumerate(POLICIES):
        kept = out / f"success-{name}.jsonl"
        twins = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
        unseen = [r for r in twins if r["twin"] is not None]
        for r in twins:
            if r["twin"] is None:
                nominal = r["successes"] / r["episodes"]
                axes.axhline(100 * nominal, color="#222222", lw=0.8, ls=(0, (4, 3)), zorder=1)
        if not unseen:
            continue
        solved, tried = sum(r["successes"] for r in unseen), sum(r["episodes"] for r in unseen)
        rate = solved / tried
        low, high = wilson_interval(solved, tried)
        shares = np.array([r["successes"] / r["episodes"] for r in unseen])
        rows.append({"policy": name, "twins": len(unseen), "episodes": tried, "success_rate": rate, "wilson": [low, high],
                     "over_twins": over_twins(shares),
                     "successes_per_twin": [r["successes"] for r in unseen]})  # fmt: skip
        rng = np.random.default_rng(0)
        axes.plot(
            np.full(len(shares), place) + rng.uniform(-0.12, 0.12, len(shares)), 100 * shares, "o", ms=4, color=GRAY
        )
        ends = np.array(rows[-1]["over_twins"])
        axes.errorbar(place, 100 * rate, 100 * np.abs(ends - rate)[:, None], color=BLUE, marker="s", capsize=4, lw=2)
        axes.annotate(f"{100 * rate:.1f}", (place, 100 * rate), (10, -12), textcoords="offset points", color=BLUE)
    axes.set_xticks(range(len(POLICIES)), LABELS)
    axes.set_xlim(-0.5, len(POLICIES) - 0.5)
    axes.set_ylabel("success (%), 95 % over twins")
    tidy(axes, "Lift on 20 unseen twins (gray: each twin; dashed: the nominal policy on the nominal robot)")
    save(figure, results.with_suffix(".png"))
    per_twin = {row["policy"]: np.array(row["successes_per_twin"]) / (row["episodes"] / row["twins"]) for row in rows}
    pairs = [
        (a, b) for a, b in (("profile", "wide"), ("profile", "longer"), ("tuned", "profile")) if {a, b} <= {*per_twin}
    ]
    differences = {
        f"{a} - {b}": [float((per_twin[a] - per_twin[b]).mean()), *over_twins(per_twin[a] - per_twin[b])]
        for a, b in pairs
    }
    found = {
        **stamp(),
        "nominal_on_nominal": nominal,
        "differences": differences,
        "rows": rows,
    }
    results.write_text(json.dumps(found) + "\n")
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "measure", "fit", "longer", "tune", "evaluate", "report"])
    parser.add_argument("--policy", choices=POLICIES, default="nominal")
    parser.add_argument("--twins", type=int, default=len(UNSEEN))
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/transfer.json"))
    given, extra = parser.parse_known_args()
    given.out.mkdir(parents=True, exist_ok=True)
    twins = UNSEEN[: given.twins]
    if given.what == "train":
        train(given.policy, given.out, extra)
    elif given.what == "measure":
        measure(given.out, twins)
    elif given.what == "fit":
        fit(given.out, twins)
    elif given.what == "longer":
        longer(given.out)
    elif given.what == "tune":
        tune(given.out, twins, 30)
    elif given.what == "evaluate":
        # Nominal on nominal is what the others are measured by.
        own: list[int | None] = [None] if given.policy == "nominal" else []
        evaluate(given.policy, given.out, [*own, *twins], given.episodes)
    else:
        report(given.out, given.results)


if __name__ == "__main__":
    main()
