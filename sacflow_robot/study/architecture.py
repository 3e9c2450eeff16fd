"""Gate initialization, heads, width and number of steps: gradient norms, success, and what an action costs.

Success is that of offline-to-online runs on the task of two ways (study/two_ways.py), small enough to train dozens of them;
it says whether an architecture learns, and nothing about a robot. Costs are measured at the sizes of a real robot's policy.
Heads need no run: with one action token and one state token each softmax is over a single key, so attention with any
number of heads is the same linear map. That is checked against ``torch.nn.MultiheadAttention``.
"""

import math
import statistics
import tempfile
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from sacflow_robot.envs.registry import get_robot
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.export.to_onnx import export_policy
from sacflow_robot.learn.algorithms.sac_flow import SacFlow
from sacflow_robot.learn.config import FlowConfig, VelocityName
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.networks.velocity import FlowG, FlowL
from sacflow_robot.spec import RobotSpec
from sacflow_robot.study.gradients import gradient_norms
from sacflow_robot.study.options import ArchitectureOptions
from sacflow_robot.study.report import Report, geometric_mean, listed
from sacflow_robot.study.runs import RunAll
from sacflow_robot.study.two_ways import run_trial, trial_config
from sacflow_robot.utils.plot_style import BLUE, GRAY, GREEN, MARKERS, ORANGE, VERMILION, new_figure, tidy

VELOCITIES: tuple[VelocityName, ...] = ("mlp", "flow-g", "flow-t", "flow-l")
WIDTH, K, BIAS, RATE = 128, 4, 5.0, 0.07
"""Values of the factors that are not varied: width, steps, bias of flow-g's gate, rate of flow-l at the start."""

GATE_STARTS = {"flow-g": (-2.0, 0.0, 2.0, BIAS), "flow-l": (RATE, 0.4, 1.5)}
"""Bias of flow-g's gate at the start; 5 is published. A gate of sigmoid(bias) moves that share of the way in a step of K = 1.
Rate of flow-l at the start; 0.07 is its own."""

# Column, what it is called, the velocities that have it.
_FACTORS: tuple[tuple[str, str, tuple[VelocityName, ...]], ...] = (
    ("width", "width", VELOCITIES),
    ("euler_steps", "rollout steps K", VELOCITIES),
    ("gate_start", "gate's bias at the start (flow-g)", ("flow-g",)),
    ("gate_start", "rate at the start (flow-l)", ("flow-l",)),
)
HEADS = (1, 2, 4, 8)
_CHUNK_LENGTH = 5  # H at which an action's cost is measured
_CALLS, _TURNS = 50, 7  # of one action, and repeats of which the median counts
_COLORS = dict(zip(VELOCITIES, (VERMILION, BLUE, GREEN, ORANGE), strict=True))


@dataclass(frozen=True)
class _Case:
    velocity: VelocityName
    width: int = WIDTH
    euler_steps: int = K
    gate: float = math.nan  # flow-g: the gate's bias; flow-l: its rate

    @property
    def flow(self) -> FlowConfig:
        gate = max(8, self.width // 2)
        return FlowConfig(width=self.width, depth=2, gate_width=gate, euler_steps=self.euler_steps)


def _cases(options: ArchitectureOptions) -> list[_Case]:
    """Each case once."""
    own = {v: _Case(v, gate=BIAS if v == "flow-g" else RATE if v == "flow-l" else math.nan) for v in VELOCITIES}
    cases = [replace(own[v], width=w) for v in VELOCITIES for w in options.widths]
    cases += [replace(own[v], euler_steps=k) for v in VELOCITIES for k in options.euler_steps]
    cases += [replace(own[v], gate=start) for v in VELOCITIES for start in GATE_STARTS.get(v, ())]
    return list(dict.fromkeys([*cases, *own.values()]))  # the last are what the others are held against


def study(options: ArchitectureOptions, run_all: RunAll) -> Report:
    """Train every case, then measure costs one after the other, with nothing else running."""
    cases = _cases(options)
    runs = [(case, seed) for case in cases for seed in options.all_seeds]
    trained = run_all(partial(_train, options), runs)
    robot = get_robot(options.task)
    plain = {(c.velocity, c.width, c.euler_steps): c for c in cases}  # costs what it costs whatever its gate starts at
    costs = {key: action_cost(c.velocity, c.flow, robot, _CHUNK_LENGTH) for key, c in plain.items()}
    rows = []
    for (case, seed), figures in zip(runs, trained, strict=True):
        torch_us, onnx_us = costs[case.velocity, case.width, case.euler_steps]
        rows.append(_row(case, {**figures, "torch_us": torch_us, "onnx_us": onnx_us}, seed=seed))
    rows += [_row(_Case("flow-t"), {"heads_difference": heads_difference(h)}, heads=h) for h in HEADS]
    return Report("architecture", rows, draw(rows), _read(rows, options))


def _row(case: _Case, figures: Mapping[str, float], *, heads: int = 1, seed: int = 0) -> dict[str, Any]:
    names = "success_rate", "mean_steps", "gradient_ratio", "finished", "torch_us", "onnx_us", "heads_difference"
    return {
        "velocity": case.velocity,
        "width": case.width,
        "euler_steps": case.euler_steps,
        "gate_start": case.gate,
        "heads": heads,
        "seed": seed,
        **{name: figures.get(name, math.nan) for name in names},
    }


def _train(options: ArchitectureOptions, run: tuple[_Case, int]) -> dict[str, float]:
    case, seed = run
    learner = {"bc_loss": "same-noise", "bc_coef": 1.0, "bc_schedule": "adaptive"}
    config = replace(trial_config(options, seed, case.flow, **learner), velocity=case.velocity)
    outcome = run_trial(config, options.episodes, prepare=lambda agent: start_gate(cast(SacFlow, agent), case.gate))
    chosen = torch.from_numpy(outcome.observations[:: max(1, len(outcome.observations) // 512)])
    norms, _ = gradient_norms(outcome.agent, chosen.to(outcome.agent.device), outcome.agent.generator)
    return {**outcome.figures, "gradient_ratio": float(norms[0] / norms[-1]), "finished": int(outcome.finished)}


@torch.no_grad()
def start_gate(agent: SacFlow, start: float) -> None:
    """Have an agent's policies begin with this gate: flow-g's bias, or flow-l's rate."""
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
            graph = OnnxPolicy(path)
        inputs = graph.blank_inputs(1)
        by_onnx = _microseconds(lambda: graph.run(inputs))
    finally:
        torch.set_num_threads(threads)
    return by_torch, by_onnx


def _microseconds(call: Callable[[], object]) -> float:
    """Median over turns of the mean time of a call (us)."""
    turns = timeit.repeat(call, number=_CALLS, repeat=_TURNS + 1)
    return statistics.median(turns[1:]) / _CALLS * 1e6


def by(rows: Sequence[dict[str, Any]], column: str, velocity: str) -> dict[float, list[dict[str, Any]]]:
    """Trained rows of a velocity by the value of a factor, in order, where the others are not varied."""
    held = {"width": WIDTH, "euler_steps": K, "gate_start": {"flow-g": BIAS, "flow-l": RATE}.get(velocity)}
    found: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        fits = all(name == column or value is None or row[name] == value for name, value in held.items())
        if fits and row["velocity"] == velocity and np.isnan(row["heads_difference"]):
            found.setdefault(float(row[column]), []).append(row)
    return dict(sorted(found.items()))


def _read(rows: list[dict[str, Any]], options: ArchitectureOptions) -> str:
    parts = []
    for column, label, velocities in _FACTORS:
        told = []
        for velocity in velocities:
            groups = by(rows, column, velocity)
            success, ratio = _means(groups)
            ratios = " / ".join(f"{value:.2g}" for value in ratio)
            told.append(f"{velocity} {' / '.join(f'{s:.0%}' for s in success)} with gradient ratios {ratios}")
        parts.append(f"over {label} = {' / '.join(f'{x:g}' for x in groups)}, success is {listed(told)}")
    base = {v: by(rows, "width", v)[WIDTH][0] for v in VELOCITIES}
    costs = listed([f"{base[v]['torch_us']:.0f} / {base[v]['onnx_us']:.0f} us ({v})" for v in VELOCITIES])
    heads = max(row["heads_difference"] for row in rows if not np.isnan(row["heads_difference"]))
    return (
        f"Offline to online on the task of two ways, {len(options.all_seeds)} seeds a case: {'; '.join(parts)}. At width {WIDTH} and "
        f"K = {K}, a chunk for {options.task} costs, in torch / ONNX Runtime, {costs}. The number of heads is no "
        f"choice: with one key attention is a linear map, within {heads:.1g} for any number."
    )


def _means(groups: dict[float, list[dict[str, Any]]]) -> tuple[list[float], list[float]]:
    """Mean success and geometric mean gradient ratio of each group."""
    success = [float(np.mean([r["success_rate"] for r in group])) for group in groups.values()]
    return success, [geometric_mean([r["gradient_ratio"] for r in group]) for group in groups.values()]


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """The figure of the study, from its rows."""
    figure = new_figure(13.2, 9.0)
    grid = figure.subplots(3, 4)
    labels = "success", r"$\|\partial L/\partial A_0\|\ /\ \|\partial L/\partial A_K\|$", "microseconds an action"
    for j, (column, label, velocities) in enumerate(_FACTORS):
        panels = grid[: 3 if j < 2 else 2, j]
        for velocity in velocities:
            groups, color = by(rows, column, velocity), _COLORS[velocity]
            style = {"color": color, "marker": MARKERS[VELOCITIES.index(velocity)], "ms": 4.5, "lw": 1.5}
            for axes, name, means in zip(panels, ("success_rate", "gradient_ratio"), _means(groups), strict=False):
                for x, group in groups.items():
                    axes.plot([x] * len(group), [r[name] for r in group], "o", color=color, ms=3, alpha=0.35, mew=0)
                axes.plot(list(groups), means, label=velocity, **style)
            for axes in panels[2:]:
                for name, ls in (("torch_us", ":"), ("onnx_us", "-")):
                    axes.plot(list(groups), [group[0][name] for group in groups.values()], ls=ls, **style)
        for axes, y in zip(panels, labels, strict=False):
            tidy(axes)
            axes.set_xlabel(label)
            axes.set_ylabel(y, fontsize=9)
            if velocities != ("flow-g",):
                axes.set_xscale("log", base=10 if column == "gate_start" else 2)
                axes.xaxis.set_major_formatter("{x:g}")
        grid[0, j].set_ylim(0, 1.04)
        for axes in panels[1:]:
            axes.set_yscale("log")
        for axes in panels[2:]:
            axes.yaxis.set_major_formatter("{x:g}")
    limits = [axes.get_ylim() for axes in grid[1]]
    for axes in grid[1]:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    _draw_heads(grid[2][2], rows)
    _explain(grid[2][3])
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def _draw_heads(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    chosen = [row for row in rows if not np.isnan(row["heads_difference"])]
    values = [max(row["heads_difference"], 1e-18) for row in chosen]
    axes.bar([str(row["heads"]) for row in chosen], values, width=0.55, color=GREEN)
    axes.set(yscale="log", ylim=(1e-18, 1), xlabel="attention heads (flow-t)")
    axes.set_ylabel("difference from a linear map", fontsize=9)
    tidy(axes)


def _explain(axes: Axes) -> None:
    axes.axis("off")
    text = (
        "Costs: dotted torch, solid ONNX Runtime,\none thread, one chunk of 5 actions.\n\n"
        f"Where a panel does not vary it:\nwidth {WIDTH}, K = {K}, gate bias {BIAS:g},\nrate {RATE:g}.\n\n"
        "Faint dots: single seeds."
    )
    axes.text(0.02, 0.95, text, va="top", fontsize=9, color=GRAY)
