"""Lift policies on twins that they have never seen: trained nominal, wide, by profile, and by profile with fine-tuning.

    python benchmarks/transfer.py profile                     # a fleet's profile from five other twins, measured
    python benchmarks/transfer.py train --policy nominal      # and wide, profile; sacflow-robot train does it
    python benchmarks/transfer.py evaluate --policy nominal   # on 20 unseen twins, 50 episodes each
    python benchmarks/transfer.py tune                        # 30 logged episodes of each twin, then train --resume --replay
    python benchmarks/transfer.py evaluate --policy tuned
    python benchmarks/transfer.py report                      # table and figure

Everything lies in --out; what it holds already is kept, twin by twin. Policies are evaluated as `run` drives an arm: on the
virtual clock, through the safety filter, with streamed chunks. Twins 100 to 119 are the unseen ones; the first five from 0
that can be measured make the profile.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from delays import LocalClient
from twins import recover

from sacflow_robot.armmodel import Measured, quantity
from sacflow_robot.bench.machine import machine
from sacflow_robot.calibrate.predict import Predictors
from sacflow_robot.calibrate.update import with_story, write_profile
from sacflow_robot.data.log import write_log
from sacflow_robot.envs.draws import draw_twin
from sacflow_robot.errors import DataError
from sacflow_robot.plotting import BLUE, GREY, new_figure, save, tidy
from sacflow_robot.robot.drivers import make_robot
from sacflow_robot.robot.loop import run_episode
from sacflow_robot.robot.safety import SafetyFilter
from sacflow_robot.safetylimits import SafetyLimits
from sacflow_robot.serve.policy import OnnxPolicy
from sacflow_robot.serve.stream import ChunkStream
from sacflow_robot.statistics import wilson_interval

POLICIES = "nominal", "wide", "profile", "tuned"
LABELS = "nominal\nsimulator", "wide\nrandomisation", "profile\nrandomisation", "profile and\nfine-tuning"
HISTORY, UNSEEN, FLEET = 6, range(100, 120), 5
INFERENCE_MS = 20.0
LIMITS = SafetyLimits(max_observation_age_s=1, max_action_age_s=1, patience_s=1, max_command_delay_s=0.2)
ROOT = Path(__file__).parents[1]


def drive(policy_file: Path, twin: int | None, seeds: range) -> list[Any]:
    """Episodes of a policy on a twin, or on the nominal arm."""
    policy = OnnxPolicy(policy_file)
    history = next((a.shape[0] for a in policy.spec.arm.observations if a.key == "action_history"), 0)
    which = "" if twin is None else f"&twin={twin}"
    robot: Any = make_robot(f"rtsim:lift?clock=virtual&tick_ms=10&history={history}{which}")
    robot.connect()
    safety, found = SafetyFilter(robot.spec, LIMITS), []
    client = LocalClient(policy, robot.clock, INFERENCE_MS, prefix=False)
    chooser = ChunkStream(client, clock_ns=robot.clock.now_ns)
    for seed in seeds:
        about = {"twin": twin}
        run = run_episode(
            robot, policy, seed, policy_version=policy_file.name, safety=safety, chooser=chooser, info=about
        )
        found.append(run.episode)
    robot.close()
    return found


def fleet_profile(out: Path) -> None:
    """Mean over measured twins; as uncertainty their spread and what each measurement left."""
    predictors, rows = Predictors("lift", 2), []
    for seed in itertools.count():
        kept = out / f"measured-{seed}.json"
        try:
            found = json.loads(kept.read_text()) if kept.exists() else recover(seed, predictors, 60.0)
        except DataError as error:
            print(f"twin {seed} is left out: {error}", flush=True)
            continue
        kept.write_text(json.dumps(found))
        rows.append(found)
        if len(rows) == FLEET:
            break
    measured: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # type: ignore[type-arg]
    names = {p["name"].partition("[")[0] for r in rows for p in r["parameters"]}
    for name in sorted(names):
        known = quantity(name)
        if known is None or name == "joints.armature_kg_m2":
            continue
        # What a twin's data do not tell is left out of the fleet's mean.
        values, spreads = np.full((len(rows), known.count), np.nan), np.full((len(rows), known.count), np.nan)
        for r, row in enumerate(rows):
            for p in row["parameters"]:
                label, _, index = p["name"].partition("[")
                if label == name and p["identified"]:
                    place = int(index[:-1]) if index else 0
                    values[r, place], spreads[r, place] = p["value"], p["spread"]
        if (np.isfinite(values).sum(axis=0) >= 2).all():
            spread = np.sqrt(np.nanvar(values, axis=0, ddof=1) + np.nanmean(spreads**2, axis=0))
            measured[name] = np.nanmean(values, axis=0), spread
    late = np.array(
        [r["observation_error_ms"] + draw_twin(r["seed"]).number("transport.observation_delay_ms") for r in rows]
    )
    measured["transport.observation_delay_ms"] = np.array([late.mean()]), np.array([late.std(ddof=1)])
    story: dict[str, Measured] = with_story(
        measured, f"calibrate latency and dynamics on {len(rows)} twins: mean, spread"
    )
    write_profile(out / "fleet.yaml", ROOT / "calibration" / "franka_twin.yaml", story)


def train(name: str, out: Path, extra: list[str]) -> None:
    words = ["train", "--env", "lift", "--out", str(out / f"run-{name}"), *extra]
    if name != "nominal":
        words += ["--randomise", name, "--action-history", str(HISTORY)]
    if name == "profile":
        words += ["--profile", str(out / "fleet.yaml")]
    subprocess.run([sys.executable, "-m", "sacflow_robot", *words], check=True)


def tune(out: Path, twins: range, episodes: int) -> None:
    """A run of its own for each twin: the profile's policy, after episodes logged on that twin with the filter on."""
    for twin in twins:
        run = out / f"tuned-{twin}"
        if run.exists():
            continue
        log = out / f"real-{twin}.zarr"
        if not log.exists():
            found = drive(out / "run-profile" / "lift.onnx", twin, range(40_000, 40_000 + episodes))
            arm = OnnxPolicy(out / "run-profile" / "lift.onnx").spec.arm
            write_log(log, arm, found)
        words = ["train", "--resume", str(out / "run-profile"), "--replay", str(log), "--out", str(run)]
        subprocess.run([sys.executable, "-m", "sacflow_robot", *words], check=True)


def evaluate(name: str, out: Path, twins: list[int | None], episodes: int) -> None:
    kept = out / f"success-{name}.jsonl"
    done = {json.loads(line)["twin"] for line in kept.read_text().splitlines()} if kept.exists() else set()
    for twin in twins:
        if twin in done:
            continue
        folder = f"tuned-{twin}" if name == "tuned" else f"run-{name}"
        found = drive(out / folder / "lift.onnx", twin, range(30_000, 30_000 + episodes))
        row = {"twin": twin, "episodes": len(found), "successes": sum(e.success for e in found)}
        with kept.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(name, row, flush=True)


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
        rng = np.random.default_rng(0)  # over twins: episodes on one twin are alike
        means = shares[rng.integers(len(shares), size=(4000, len(shares)))].mean(axis=1)
        rows.append({"policy": name, "twins": len(unseen), "episodes": tried, "success_rate": rate, "wilson": [low, high],
                     "over_twins": [float(q) for q in np.percentile(means, [2.5, 97.5])],
                     "successes_per_twin": [r["successes"] for r in unseen]})  # fmt: skip
        axes.plot(
            np.full(len(shares), place) + rng.uniform(-0.12, 0.12, len(shares)), 100 * shares, "o", ms=4, color=GREY
        )
        ends = np.array(rows[-1]["over_twins"])
        axes.errorbar(place, 100 * rate, 100 * np.abs(ends - rate)[:, None], color=BLUE, marker="s", capsize=4, lw=2)
    axes.set_xticks(range(len(POLICIES)), LABELS)
    axes.set_xlim(-0.5, len(POLICIES) - 0.5)
    axes.set_ylabel("success (%), 95 % over twins")
    tidy(axes, "Lift on 20 unseen twins (grey: each twin; dashed: the nominal policy on the nominal arm)")
    save(figure, results.with_suffix(".png"))
    found = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "nominal_on_nominal": nominal,
        "rows": rows,
    }
    results.write_text(json.dumps(found) + "\n")
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["profile", "train", "tune", "evaluate", "report"])
    parser.add_argument("--policy", choices=POLICIES, default="nominal")
    parser.add_argument("--twins", type=int, default=len(UNSEEN))
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/transfer.json"))
    given, extra = parser.parse_known_args()
    given.out.mkdir(parents=True, exist_ok=True)
    twins = UNSEEN[: given.twins]
    if given.what == "profile":
        fleet_profile(given.out)
    elif given.what == "train":
        train(given.policy, given.out, extra)
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
