"""Twins with hidden parameters, measured: latency, dynamics, held-out prediction; and which cause the gap report names.

    python benchmarks/twins.py recover --seeds 20 --out benchmarks/results/twins
    python benchmarks/twins.py causes --seeds 20 --out benchmarks/results/twin_causes

On the virtual clock. Writes OUT.jsonl, a line per twin; twins that it holds already are kept. OUT.json is the score, which is
printed too. Hidden values are looked at only to score what was measured.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from sacflow_robot.bench.machine import stamp
from sacflow_robot.calibrate.dynamics import Fit, from_excitation, identify
from sacflow_robot.calibrate.excitation import Excitation, record
from sacflow_robot.calibrate.gap import measure_gap
from sacflow_robot.calibrate.latency import measure_latency
from sacflow_robot.calibrate.predict import Predictors, Window
from sacflow_robot.calibrate.problem import DELAY, MOMENT
from sacflow_robot.calibrate.recording import Recording
from sacflow_robot.envs.randomization import FRANKA, TWIN_PARTS, draw_twin
from sacflow_robot.envs.robot_parameters import RobotParameters
from sacflow_robot.robot.drivers.registry import make_robot
from sacflow_robot.robot.drivers.rtsim import VirtualRobot
from sacflow_robot.robot.safety.filter import SafetyFilter
from sacflow_robot.robot.safety.safety_limits import SafetyLimits

LIMITS = SafetyLimits(max_observation_age_s=0.5, max_action_age_s=0.5, patience_s=0.2, max_command_delay_s=0.4)


def recorded(name: str, seed: int, seconds: float) -> Recording:
    """An excitation run of a twin."""
    robot = make_robot(name)
    assert isinstance(robot, VirtualRobot)
    robot.connect()
    try:
        return record(robot, SafetyFilter(robot.spec, LIMITS), Excitation(robot.spec, seconds, seed), seed)
    finally:
        robot.close()


def recover(seed: int, predictors: Predictors, seconds: float) -> dict[str, Any]:
    """What is measured of a twin, and how far it is from the truth."""
    began = time.monotonic()
    recording = recorded(f"rtsim:lift?clock=virtual&joints=1&twin={seed}", seed, seconds)
    latency = measure_latency(recording)
    data = from_excitation(recording, predictors.first, RobotParameters())
    fit = identify(predictors, data.windows, data.start, data.sigma)
    hidden = draw_twin(seed)
    truth = predictors.first.nominal.having(hidden.values)
    rows = []
    for label, value, spread, told, blind in zip(
        fit.labels, fit.values, fit.spread, fit.identified, fit.hidden, strict=True
    ):
        row = {"name": label, "value": float(value), "spread": float(spread), "true": true_value(truth, label)}
        rows.append({**row, "identified": bool(told), "hidden": bool(blind)})
    for row, ratio in zip(rows, moved_ratios(fit, rows, predictors, data.windows[3::4]), strict=True):
        row["error_ratio_when_moved"] = ratio
    return {
        "seed": seed,
        "observation_error_ms": 1e3 * latency.observation_median_s - hidden.number("transport.observation_delay_ms"),
        "command_error_ms": 1e3 * latency.command_mean_s - hidden.number(DELAY),
        "command_error_after_dynamics_ms": fit.delay_ms - hidden.number(DELAY),
        "parameters": rows,
        "held_out_before_mm": 1e3 * fit.held_out_before_m,
        "held_out_after_mm": 1e3 * fit.held_out_rmse_m,
        "robot_s": float(np.ptp(recording.time_ns)) / 1e9,
        "wall_s": time.monotonic() - began,
    }


def moved_ratios(fit: Fit, rows: list[dict[str, Any]], predictors: Predictors, held: list[Window]) -> list[float]:
    """By how much held-out windows are predicted worse with a parameter moved by 30 % of its true value, the others making up
    for it: root mean square error of the joints per window, as the geometric mean of the windows' ratios. In full simulation;
    what the identification believes of itself decides only how the others are moved."""
    steps = [
        np.log(1.3) if p.logarithmic else 0.3 * max(abs(row["true"]), least(row["name"], 0.1))
        for p, row in zip(fit.problem.parameters, rows, strict=True)
    ]
    ways = [(fit.model, fit.delay_ms / 1e3), *(fit.moved(i, step) for i, step in enumerate(steps))]
    errors = np.array([
        [np.mean((p.joints - w.joints) ** 2) for p, w in zip(made, held, strict=True)]
        for made in predictors.predict(ways, held)
    ])  # fmt: skip
    return [float(r) for r in np.exp(np.mean(np.log(errors[1:] / errors[0]), axis=1) / 2)]


def true_value(truth: RobotParameters, label: str) -> float:
    name, _, index = label.partition("[")
    place = int(index[:-1]) if index else 0
    if name == MOMENT:
        return float(truth.number("payload.mass_kg") * truth.values["payload.center_m"][place])
    if not index and name.startswith("joints."):
        return 1.0  # a common factor; twins keep the nominal armature
    return truth.values[name][place]


def within(row: dict[str, Any], share: float) -> bool:
    return bool(abs(row["value"] - row["true"]) <= share * max(abs(row["true"]), least(row["name"], share)))


def least(label: str, share: float) -> float:
    """Loads count by the smallest that is told apart, delays by what is promised of them."""
    name = label.partition("[")[0]
    known = {"payload.mass_kg": 0.05, DELAY: 5.0 / share, "controller.actuator_delay_ms": 2.0 / share}
    return 0.005 / share if name == MOMENT else known.get(name, 0.0)


def score_recover(rows: list[dict[str, Any]]) -> dict[str, Any]:
    told = [(r["seed"], p) for r in rows for p in r["parameters"] if p["identified"]]
    rough = [p for r in rows for p in r["parameters"] if not p["identified"] and not p["hidden"]]
    hidden = [p for r in rows for p in r["parameters"] if p["hidden"]]
    ratios = [r["held_out_before_mm"] / r["held_out_after_mm"] for r in rows]
    late = [max(abs(r["observation_error_ms"]), abs(r["command_error_ms"])) for r in rows]
    return {
        "twins": len(rows),
        "latency_within_5_ms": sum(error <= 5 for error in late),
        "largest_latency_error_ms": max(late),
        "largest_command_error_after_dynamics_ms": max(abs(r["command_error_after_dynamics_ms"]) for r in rows),
        "identified": len(told),
        "identified_within_10_percent": sum(within(p, 0.1) for _, p in told),
        "beyond": [f"{s}: {p['name']} {p['value']:.3g} for {p['true']:.3g}" for s, p in told if not within(p, 0.1)],
        "told_but_not_to_10_percent": len(rough),
        "of_them_beyond_10_percent": sum(not within(p, 0.1) for p in rough),
        "not_identifiable": len(hidden),
        "of_them_within_10_percent": sum(within(p, 0.1) for p in hidden),
        "held_out_error_ratio_when_moved_by_30_percent_p5_p50_p95": {
            name: [round(float(v), 3) for v in np.percentile([p["error_ratio_when_moved"] for p in group], [5, 50, 95])]
            for name, group in (("identified", [p for _, p in told]), ("rough", rough), ("not_identifiable", hidden))
            if group
        },
        "held_out_ratio_min_median": [min(ratios), float(np.median(ratios))],
        "held_out_5_times_lower": sum(ratio >= 5 for ratio in ratios),
        "longest_robot_s": max(r["robot_s"] for r in rows),
        "longest_wall_s": max(r["wall_s"] for r in rows),
    }


def cause(seed: int, predictors: Predictors, seconds: float) -> dict[str, Any]:
    """Which cause the report names for a twin that differs in one."""
    part = TWIN_PARTS[seed % len(TWIN_PARTS)]
    recording = recorded(f"rtsim:lift?clock=virtual&joints=1&twin={seed}&differs={part}", seed, seconds)
    gap = measure_gap([recording], predictors, FRANKA)
    shares = {c.name: round(c.explains, 3) for c in gap.causes}
    return {"seed": seed, "differs": part, "named": gap.causes[0].name, "rmse_mm": 1e3 * gap.rmse_m, "explains": shares}


def score_causes(rows: list[dict[str, Any]]) -> dict[str, Any]:
    wrong = [f"{r['seed']}: {r['named']} for {r['differs']}" for r in rows if r["named"] != r["differs"]]
    return {"twins": len(rows), "named_right": len(rows) - len(wrong), "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["recover", "causes"])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/twins"))
    given = parser.parse_args()
    path = given.out.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    predictors = Predictors("lift", 2)
    work = recover if given.what == "recover" else cause
    for seed in range(given.first, given.first + given.seeds):
        if any(row["seed"] == seed for row in rows):
            continue
        rows.append(work(seed, predictors, given.seconds))
        with path.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print({k: v for k, v in rows[-1].items() if k != "parameters"}, flush=True)
    score = score_recover(rows) if given.what == "recover" else score_causes(rows)
    given.out.with_suffix(".json").write_text(json.dumps({**score, **stamp()}, indent=1) + "\n")
    print(json.dumps(score))


if __name__ == "__main__":
    main()
