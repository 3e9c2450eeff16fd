"""Gate initialization, heads, width and number of steps: gradient norms, success, and what an action costs.

Success is that of offline-to-online runs on the task of two ways (study/trial.py), small enough to train dozens of them;
it says whether an architecture learns, and nothing about a robot. Costs are measured at the sizes of a real robot's policy.
Heads need no run: with one action token and one state token each softmax is over a single key, so attention with any
number of heads is the same linear map. That is checked against ``torch.nn.MultiheadAttention``.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
import torch
from torch import nn

from sacflow_robot.envs.registry import get_robot
from sacflow_robot.export import metadata as policyfile
from sacflow_robot.export.to_onnx import export_policy
from sacflow_robot.learn.algorithms.sac_flow import SacFlow
from sacflow_robot.learn.config import FlowConfig, VelocityName
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.networks.velocity import FlowG, FlowL
from sacflow_robot.spec import RobotSpec
from sacflow_robot.study.architecture_figure import BIAS, RATE, VELOCITIES, WIDTH, K, by, draw, factors
from sacflow_robot.study.gradients import gradient_norms
from sacflow_robot.study.options import ArchitectureOptions, Budget
from sacflow_robot.study.report import Report, geometric_mean, listed
from sacflow_robot.study.runs import RunAll
from sacflow_robot.study.trial import run_trial, trial_config

_CHUNK_LENGTH = 5  # H at which an action's cost is measured
GATE_BIASES = (-2.0, 0.0, 2.0, 5.0)
"""Of flow-g's gate at the start; 5 is published. A gate of sigmoid(bias) moves that share of the way in a step of K = 1."""

LIGHT_RATES = (0.07, 0.4, 1.5)
"""Rate of flow-l at the start; 0.07 is its own."""

HEADS = (1, 2, 4, 8)
_CALLS, _TURNS = 50, 7  # of one action, and repeats of which the median counts


@dataclass(frozen=True)
class _Case:
    velocity: VelocityName
    width: int = WIDTH
    euler_steps: int = K
    gate: float | None = None  # flow-g: the gate's bias; flow-l: its rate

    @property
    def flow(self) -> FlowConfig:
        gate = max(8, self.width // 2)
        return FlowConfig(width=self.width, depth=2, gate_width=gate, euler_steps=self.euler_steps)


def _cases(options: ArchitectureOptions) -> list[_Case]:
    """Each case once."""
    cases = [_Case(cast(VelocityName, v), width=w) for v in VELOCITIES for w in options.widths]
    cases += [_Case(cast(VelocityName, v), euler_steps=k) for v in VELOCITIES for k in options.euler_steps]
    cases += [_Case("flow-g", gate=bias) for bias in GATE_BIASES if bias != BIAS]
    cases += [_Case("flow-l", gate=rate) for rate in LIGHT_RATES if rate != RATE]
    cases += [_Case(cast(VelocityName, v)) for v in VELOCITIES]  # what the others are held against
    return list(dict.fromkeys(cases))


def study(options: ArchitectureOptions, run_all: RunAll) -> Report:
    """Train every case, then measure costs one after the other, with nothing else running."""
    cases = _cases(options)
    runs = [(case, seed) for case in cases for seed in options.all_seeds]
    trained = run_all(partial(_train, options.budget), runs)
    costs: dict[_Case, tuple[float, float]] = {}
    for case in cases:
        plain = replace(case, gate=None)  # costs what it costs whatever its gate starts at
        if plain not in costs:
            costs[plain] = action_cost(plain.velocity, plain.flow, get_robot(options.task), _CHUNK_LENGTH)
    rows = []
    for (case, seed), figures in zip(runs, trained, strict=True):
        torch_us, onnx_us = costs[replace(case, gate=None)]
        rows.append(_row(case, seed, figures, torch_us, onnx_us))
    rows += [
        {
            **_row(_Case("flow-t"), 0, {}, float("nan"), float("nan")),
            "heads": h,
            "heads_difference": heads_difference(h),
        }
        for h in HEADS
    ]
    return Report("architecture", rows, draw(rows), _read(rows, options))


def _row(case: _Case, seed: int, figures: dict[str, float], torch_us: float, onnx_us: float) -> dict[str, Any]:
    names = ("success_rate", "mean_steps", "gradient_ratio", "finished")
    start = {"flow-g": BIAS, "flow-l": RATE}.get(case.velocity, float("nan")) if case.gate is None else case.gate
    return {
        "velocity": case.velocity,
        "width": case.width,
        "euler_steps": case.euler_steps,
        "gate_start": start,
        "heads": 1,
        "seed": seed,
        **{name: figures.get(name, float("nan")) for name in names},
        "torch_us": torch_us,
        "onnx_us": onnx_us,
        "heads_difference": float("nan"),
    }


def _train(budget: Budget, run: tuple[_Case, int]) -> dict[str, float]:
    case, seed = run
    learner = {"bc_loss": "same-noise", "bc_coef": 1.0, "bc_schedule": "adaptive"}
    config = replace(trial_config(budget, seed, case.flow, **learner), velocity=case.velocity)
    outcome = run_trial(config, budget, prepare=lambda agent: start_gate(cast(SacFlow, agent), case.gate))
    generator = outcome.agent.generator
    chosen = torch.from_numpy(outcome.observations[:: max(1, len(outcome.observations) // 512)]).to(
        outcome.agent.device
    )
    norms, _ = gradient_norms(outcome.agent, chosen, generator)
    return {**outcome.figures, "gradient_ratio": float(norms[0] / norms[-1]), "finished": int(outcome.finished)}


@torch.no_grad()
def start_gate(agent: SacFlow, start: float | None) -> None:
    """Have an agent's policies begin with another gate: flow-g's bias, or flow-l's rate; None leaves them."""
    if start is None:
        return
    for policy in (agent.policy, agent.average_policy, agent.reference):
        velocity = cast(FlowPolicy, policy).velocity
        if isinstance(velocity, FlowG):
            velocity.gate.head.bias.fill_(start)
        elif isinstance(velocity, FlowL):
            velocity.start_at(start)


def heads_difference(heads: int, width: int = 128, batch: int = 64) -> float:
    """Largest difference between attention of that many heads to one token and the linear map W_o W_v, outputs of size 1."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(width, heads, batch_first=True).double()
        query, token = (torch.randn(batch, 1, width, dtype=torch.float64) for _ in range(2))
        value = token @ attention.in_proj_weight[2 * width :].T + attention.in_proj_bias[2 * width :]
        linear = attention.out_proj(value)
        return float((attention(query, token, token, need_weights=False)[0] - linear).abs().max())


def action_cost(velocity: str, flow: FlowConfig, robot: RobotSpec, chunk_length: int) -> tuple[float, float]:
    """Microseconds for one chunk on one thread: torch, and the exported graph under ONNX Runtime."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        policy = FlowPolicy(
            velocity, robot.observation_dim, chunk_length * robot.action_dim, flow, robot.quaternions
        ).eval()
        observation, noise = torch.zeros(1, robot.observation_dim), torch.randn(1, policy.action_dim)
        with torch.no_grad():
            by_torch = _microseconds(lambda: policy(observation, noise))
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "policy.onnx"
            export_policy(policy, policy.make_spec(robot), path)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = 1, 1, 4
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {a.key: np.zeros((1, *a.shape), np.float32) for a in robot.observations}
        feed[policyfile.NOISE] = noise.numpy().reshape(1, chunk_length, robot.action_dim)
        by_onnx = _microseconds(lambda: session.run(None, feed))
    finally:
        torch.set_num_threads(threads)
    return by_torch, by_onnx


def _microseconds(call: Callable[[], object]) -> float:
    """Median over turns of the mean time of a call (us)."""
    for _ in range(_CALLS):
        call()
    turns = []
    for _ in range(_TURNS):
        began = time.perf_counter()
        for _ in range(_CALLS):
            call()
        turns.append((time.perf_counter() - began) / _CALLS * 1e6)
    return statistics.median(turns)


def _read(rows: list[dict[str, Any]], options: ArchitectureOptions) -> str:
    parts = []
    for column, label, velocities, held in factors():
        told = []
        for velocity in velocities:
            groups = by(rows, column, velocity=velocity, **held[velocity])
            success = {x: float(np.mean([r["success_rate"] for r in g])) for x, g in groups.items()}
            ratio = {x: geometric_mean([r["gradient_ratio"] for r in g]) for x, g in groups.items()}
            x = list(groups)
            told.append(
                f"{velocity} {' / '.join(f'{success[v]:.0%}' for v in x)} with gradient ratios "
                f"{' / '.join(f'{ratio[v]:.2g}' for v in x)}"
            )
        values = " / ".join(f"{v:g}" for v in x)
        parts.append(f"over {label} = {values}, success is {listed(told)}")
    base = {v: next(iter(by(rows, "width", velocity=v, width=WIDTH, euler_steps=K).values()))[0] for v in VELOCITIES}
    costs = listed([f"{base[v]['torch_us']:.0f} / {base[v]['onnx_us']:.0f} us ({v})" for v in VELOCITIES])
    heads = max(row["heads_difference"] for row in rows if not np.isnan(row["heads_difference"]))
    return (
        f"Offline to online on the task of two ways, {len(options.all_seeds)} seeds a case: {'; '.join(parts)}. At width {WIDTH} and "
        f"K = {K}, a chunk for {options.task} costs, in torch / ONNX Runtime, {costs}. The number of heads is no "
        f"choice: with one key attention is a linear map, within {heads:.1g} for any number."
    )
