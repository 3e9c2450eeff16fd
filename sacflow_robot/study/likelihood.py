"""The path density, the drift and the exact density, against targets that are known in closed form.

The flow's velocity is the target's own (study/targets.py), so that every difference from the target is the K steps', the
noise's or the code's, and none the network's. Everything is in the latent space before squashing, in D = 2 dimensions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from sacflow_robot.learn.density import exact_log_density
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.networks.policy import squash_log_det
from sacflow_robot.study.options import LikelihoodOptions
from sacflow_robot.study.report import Report
from sacflow_robot.study.runs import RunAll
from sacflow_robot.study.targets import (
    GAUSSIAN,
    MIXTURE,
    Array,
    Mixture,
    divergence_of_steps,
    exact_policy,
    follow,
    gaussian_steps,
    path_divergence,
    path_log_density,
)
from sacflow_robot.utils.plot_style import BLACK, BLUE, GRAY, GREEN, MARKERS, ORANGE, VERMILION, new_figure, tidy

DIM = 2
_TARGETS = (GAUSSIAN, MIXTURE)
_OTHER = Mixture("other Gaussian", (1.0,), (0.2,), (0.45,))  # whose paths are told from GAUSSIAN's
_EULER_STEPS = (4, 16, 64)
_NOISE_SCALES = (0.05, 0.1, 0.2, 0.34, 0.5, 0.7, 1.0)
_WIDER = 1.2  # the proposal's noise beside the rollout's, for importance sampling
_STDS = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
_SHOWN = 16, 0.5  # K and sigma of the figure's panel of densities

# Values of the column "part".
MASS, OFF = "integral of the path density", "marginal off the target"
OF_PATHS, FROM_TARGET = "divergence of paths", "divergence from target"
EXACT, PATH = "entropy, exact", "entropy, path"

_COLORS = dict(zip(_EULER_STEPS, (BLUE, GREEN, ORANGE), strict=True))
_MARKERS = dict(zip(_EULER_STEPS, MARKERS, strict=False))
_DASHED: Any = (0, (4, 3))

Rows = Sequence[dict[str, Any]]


def study(options: LikelihoodOptions, run_all: RunAll) -> Report:
    """Check normalization, marginals, divergences and entropies."""
    marginals = [partial(_marginals, options, target, steps) for target in _TARGETS for steps in _EULER_STEPS]
    last = partial(_divergences, options), partial(_entropies, options)
    rows = [row for part in run_all(_rows, [partial(_normalization, options), *marginals, *last]) for row in part]
    shown = {
        "no noise": _ends(options, MIXTURE, *_SHOWN, drift=False, noiseless=True),
        "noise, drift corrected": _ends(options, MIXTURE, *_SHOWN, drift=True),
        "noise, not corrected": _ends(options, MIXTURE, *_SHOWN, drift=False),
    }
    figure = draw(rows, {label: ends.numpy() for label, ends in shown.items()})
    return Report("likelihood", rows, figure, _read(rows))


def _rows(part: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return part()


def _row(
    part: str, target: str, steps: int, sigma: float, drift: bool | str, value: float | Tensor, **more: float
) -> dict[str, Any]:
    """A row; of a value given as a tensor of samples, the mean and its standard error."""
    row = {"part": part, "target": target, "euler_steps": steps, "noise_scale": sigma, "drift": str(drift).lower()}
    mean, error = _mean(value) if isinstance(value, Tensor) else (value, math.nan)
    return {**row, "std": math.nan, "value": mean, "standard_error": error, "expected": math.nan, **more}


def _noise(policy: FlowPolicy, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(policy.noise_count, count, policy.action_dim, generator=generator, dtype=torch.float64)


def total_mass(policy: FlowPolicy, samples: int, seed: int) -> tuple[float, float]:
    """Integral of the path density over all paths, by importance sampling: (estimate, standard error).

    Paths are proposed by the same rule with noise 1.2 times as wide. Density and proposal meet in the path alone: the
    density gets its noise back from it.
    """
    z = _noise(policy, samples, seed)
    path, rollout = follow(policy, _WIDER * z)
    scale = _WIDER * policy.noise_scale / math.sqrt(policy.euler_steps)
    proposal = -0.5 * (z.square() + math.log(2 * math.pi)).sum((0, -1))
    proposal = proposal - policy.action_dim * (math.log(_WIDER) + policy.euler_steps * math.log(scale))
    density = path_log_density(policy, path) + squash_log_det(rollout.latent)
    return _mean((density - proposal).exp())


def wasserstein(samples: Tensor, target: Mixture) -> float:
    """Mean distance, in latent units, that samples (N,) of one dimension have to be moved to become the target's."""
    ordered = np.sort(samples.numpy())
    shares = (np.arange(len(ordered)) + 0.5) / len(ordered)
    return float(np.abs(ordered - target.quantiles(shares)).mean())


def _normalization(options: LikelihoodOptions) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for target in _TARGETS:
        for steps in (1, *[k for k in _EULER_STEPS if k <= 16]):
            for sigma in (min(_NOISE_SCALES), max(_NOISE_SCALES)):
                policy = exact_policy(target, DIM, steps, sigma)
                mass, error = total_mass(policy, options.sample_count // 5, options.seed + len(rows))
                rows.append(_row(MASS, target.name, steps, sigma, True, mass, standard_error=error, expected=1.0))
    return rows


def _marginals(options: LikelihoodOptions, target: Mixture, steps: int) -> list[dict[str, Any]]:
    rows = []
    if steps == _EULER_STEPS[0]:  # once a target
        rng = np.random.default_rng(options.seed)
        own = torch.from_numpy(target.quantiles(rng.uniform(size=DIM * options.sample_count)))
        rows.append(_row(OFF, target.name, 0, 0.0, "samples of the target", wasserstein(own, target)))
    ends = _ends(options, target, steps, 1.0, drift=False, noiseless=True)
    rows.append(_row(OFF, target.name, steps, 0.0, "no noise", wasserstein(ends, target)))
    for sigma in _NOISE_SCALES:
        for drift in (True, False):
            ends = _ends(options, target, steps, sigma, drift=drift)
            rows.append(_row(OFF, target.name, steps, sigma, drift, wasserstein(ends, target)))
    return rows


def _ends(
    options: LikelihoodOptions, target: Mixture, steps: int, sigma: float, *, drift: bool, noiseless: bool = False
) -> Tensor:
    """Latents (N * D,) at the end of rollouts."""
    policy = exact_policy(target, DIM, steps, sigma, drift=drift)
    noise = _noise(policy, options.sample_count, options.seed)
    if noiseless:
        noise[1:] = 0
    return follow(policy, noise)[1].latent.flatten()


def _divergences(options: LikelihoodOptions) -> list[dict[str, Any]]:
    """KL, in nats a dimension: of the exact density from its target, and of the paths of two Gaussian flows."""
    rows = []
    count = options.sample_count // 5
    for target in _TARGETS:
        for steps in _EULER_STEPS:
            policy = exact_policy(target, DIM, steps, 1.0)
            start = _noise(policy, count, options.seed)[0]
            latent, log_prob = exact_log_density(policy, start.new_zeros(count, 1), start)
            gain = log_prob + squash_log_det(latent) - target.log_density(latent).sum(-1)
            expected = divergence_of_steps(target, steps)
            rows.append(_row(FROM_TARGET, target.name, steps, 0.0, "no noise", gain / DIM, expected=expected))
    for steps in _EULER_STEPS:
        for sigma in _NOISE_SCALES:
            policy, other = (exact_policy(t, DIM, steps, sigma) for t in (GAUSSIAN, _OTHER))
            path, rollout = follow(policy, _noise(policy, count, options.seed))
            gain = rollout.log_prob - path_log_density(other, path)
            expected = path_divergence(GAUSSIAN, _OTHER, steps, sigma)
            rows.append(_row(OF_PATHS, GAUSSIAN.name, steps, sigma, True, gain / DIM, expected=expected))
    return rows


def _entropies(options: LikelihoodOptions) -> list[dict[str, Any]]:
    """Entropy in nats a dimension of flows to Gaussians of several widths: exact, and that of the noisy path.

    The path's is measured from that of the noise alone (``path_entropy``), as the learner does.
    """
    rows = []
    count = options.sample_count // 5
    for std in _STDS:
        target = Mixture("Gaussian", (1.0,), (0.0,), (std,))
        for steps in _EULER_STEPS:
            policy = exact_policy(target, DIM, steps, 0.1)
            noise = _noise(policy, count, options.seed)
            latent, log_prob = exact_log_density(policy, noise.new_zeros(count, 1), noise[0])
            exact = -(log_prob + squash_log_det(latent)) / DIM
            expected = 0.5 * math.log(2 * math.pi * math.e) + math.log(gaussian_steps(target, steps, 0.0).stds[-1])
            rows.append(_row(EXACT, target.name, steps, 0.0, "no noise", exact, expected=expected, std=std))
            rollout = follow(policy, noise)[1]
            excess = (-(rollout.log_prob + squash_log_det(rollout.latent)) - policy.reference_entropy) / DIM
            rows.append(_row(PATH, target.name, steps, 0.1, True, excess, expected=0.0, std=std))
    return rows


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean, and its standard error."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def _read(rows: list[dict[str, Any]]) -> str:
    masses = pick(rows, MASS)
    off = max(abs(r["value"] - 1) / r["standard_error"] for r in masses)
    worst = max(abs(r["value"] - 1) for r in masses)
    few, most, sigma = min(_EULER_STEPS), max(_EULER_STEPS), max(_NOISE_SCALES)

    def distance(steps: int, scale: float, drift: str) -> float:
        where = {"target": MIXTURE.name, "euler_steps": steps, "noise_scale": scale, "drift": drift}
        return float(pick(rows, OFF, **where)[0]["value"])

    divergences = pick(rows, OF_PATHS) + pick(rows, FROM_TARGET)
    errors = [abs(r["value"] - r["expected"]) / max(r["standard_error"], 1e-12) for r in divergences]
    exact = pick(rows, EXACT, euler_steps=most)
    path = pick(rows, PATH)
    swing = max(r["value"] for r in exact) - min(r["value"] for r in exact)
    flat = max(abs(r["value"]) for r in path)
    return (
        f"The path density integrates to 1 within {worst:.2g} ({off:.1f} standard errors at most, {len(masses)} cases). "
        f"On the mixture with sigma = {sigma:g}, the corrected drift leaves the marginal {distance(most, sigma, 'true'):.2g} off "
        f"its target at K = {most} (without noise {distance(most, 0.0, 'no noise'):.2g}), the uncorrected one "
        f"{distance(most, sigma, 'false'):.2g}; at K = {few} it is {distance(few, sigma, 'true'):.2g} corrected, "
        f"{distance(few, sigma, 'false'):.2g} uncorrected and {distance(few, 0.0, 'no noise'):.2g} without noise: the "
        f"correction is a limit's, and needs steps enough for its noise. Monte Carlo meets the analytic KL divergence in "
        f"all {len(divergences)} cases within {max(errors):.1f} standard errors. From the narrowest target to the widest the "
        f"exact density's entropy moves by {swing:.2f} nats a dimension, that of the noisy path, with its fixed sigma, by "
        f"{flat:.2g}: a temperature on the path density weighs no entropy of the actions."
    )


def pick(rows: Rows, part: str, **where: Any) -> list[dict[str, Any]]:
    """Rows of a part of the study that fit."""
    return [r for r in rows if r["part"] == part and all(r[key] == value for key, value in where.items())]


def draw(rows: Rows, shown: Mapping[str, Array]) -> Figure:
    """The figure of the study, from its rows and, by label, samples (N,) of the marginals shown."""
    figure = new_figure(12.6, 7.4)
    grid = figure.subplots(2, 3)
    _draw_densities(grid[0][0], shown)
    for axes, target in zip(grid[0][1:], (MIXTURE, GAUSSIAN), strict=True):
        _draw_marginals(axes, rows, target)
    _draw_masses(grid[1][0], rows)
    _draw_divergences(grid[1][1], rows)
    _draw_entropies(grid[1][2], rows)
    return figure


def _line(axes: Axes, rows: Rows, x: str, style: str, **look: Any) -> None:
    axes.plot([r[x] for r in rows], [r["value"] for r in rows], style, **look)


def _bars(axes: Axes, x: Sequence[float], rows: Rows, **look: Any) -> None:
    """Values with bars of two standard errors."""
    axes.errorbar(x, [r["value"] for r in rows], [2 * r["standard_error"] for r in rows], **look)


def _draw_densities(axes: Axes, shown: Mapping[str, Array]) -> None:
    steps, sigma = _SHOWN
    x = np.linspace(-1.9, 1.9, 400)
    axes.fill_between(x, MIXTURE.density(x), color="#cccccc", lw=0, label="target")
    edges = np.linspace(-1.9, 1.9, 96)
    for (label, ends), color in zip(shown.items(), (BLACK, BLUE, VERMILION), strict=True):
        height, _ = np.histogram(ends, edges, density=True)
        axes.plot(0.5 * (edges[1:] + edges[:-1]), height, color=color, lw=1.5, label=label)
    tidy(axes, rf"mixture, K = {steps}, $\sigma$ = {sigma:g}")
    axes.set(xlabel="latent action", ylabel="density", ylim=(0, 1.55 * float(MIXTURE.density(x).max())))
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_marginals(axes: Axes, rows: Rows, target: Mixture) -> None:
    handles = []
    for steps, color in _COLORS.items():
        for drift, style in (("true", "-"), ("false", ":")):
            chosen = pick(rows, OFF, target=target.name, euler_steps=steps, drift=drift)
            _line(axes, chosen, "noise_scale", _MARKERS[steps] + style, color=color, ms=4, lw=1.5)
        handles.append(Line2D([], [], color=color, marker=_MARKERS[steps], ms=4, label=f"K = {steps}"))
    handles += [
        Line2D([], [], color=GRAY, ls=ls, label=f"drift {what}") for ls, what in (("-", "corrected"), (":", "as it is"))
    ]
    floor = pick(rows, OFF, target=target.name, euler_steps=0)[0]["value"]
    axes.axhline(floor, color=GRAY, lw=0.8, ls=_DASHED)
    place: dict[str, Any] = {"xytext": (-2, 3), "textcoords": "offset points", "xycoords": ("axes fraction", "data")}
    axes.annotate("the target's own samples", (1.0, floor), ha="right", fontsize=7, color=GRAY, **place)
    tidy(axes, f"{target.name}: marginal off its target")
    axes.set(xscale="log", yscale="log", xlabel=r"noise scale $\sigma$", ylabel="Wasserstein-1 distance (latent units)")
    axes.set_ylim(0.6 * floor, 8 * axes.dataLim.y1)
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="upper left", ncols=2)


def _draw_masses(axes: Axes, rows: Rows) -> None:
    chosen = pick(rows, MASS)
    for target, color in ((GAUSSIAN, ORANGE), (MIXTURE, BLUE)):
        x = [i for i, row in enumerate(chosen) if row["target"] == target.name]
        look = {"fmt": "o", "ms": 4, "color": color, "lw": 1.3, "capsize": 2, "label": target.name}
        _bars(axes, x, [chosen[i] for i in x], **look)
    axes.axhline(1, color=BLACK, lw=0.8, ls=_DASHED, zorder=1)
    labels = [f"{r['euler_steps']}\n{r['noise_scale']:g}" for r in chosen]
    tidy(axes, "integral of the path density (bars: 2 standard errors)")
    axes.set_xticks(range(len(chosen)), labels, fontsize=7)
    axes.set(xlabel=r"K, and below it $\sigma$", ylabel="integral over all paths")
    spread = max(abs(r["value"] - 1) + 2 * r["standard_error"] for r in chosen)
    axes.set_ylim(1 - 1.2 * spread, 1 + 1.7 * spread)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


def _draw_divergences(axes: Axes, rows: Rows) -> None:
    parts = (
        (OF_PATHS, GAUSSIAN.name, BLUE, "o", "paths of two Gaussian flows"),
        (FROM_TARGET, GAUSSIAN.name, ORANGE, "s", "exact density, Gaussian"),
        (FROM_TARGET, MIXTURE.name, VERMILION, "D", "exact density, mixture"),
    )
    for part, target, color, marker, label in parts:
        chosen = pick(rows, part, target=target)
        look = {"fmt": marker, "ms": 4.5, "color": color, "lw": 1.2, "label": label, "mfc": "white", "zorder": 3}
        _bars(axes, [r["expected"] for r in chosen], chosen, **look)
    values = [r["expected"] for part, target, *_ in parts for r in pick(rows, part, target=target)]
    ends = [0.5 * min(values), 2 * max(values)]
    axes.plot(ends, ends, color=BLACK, lw=0.8, ls=_DASHED, zorder=1)
    tidy(axes, "KL divergence, nats a dimension", grid="both")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="analytic", ylabel="Monte Carlo")
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_entropies(axes: Axes, rows: Rows) -> None:
    x = np.geomspace(min(_STDS), max(_STDS), 50)
    axes.plot(x, 0.5 * np.log(2 * np.pi * np.e * x**2), color=BLACK, lw=1.2, label="the Gaussian's own")
    for steps, color in _COLORS.items():
        look = {"color": color, "ms": 4.5, "mfc": "white", "lw": 1, "label": f"exact density, K = {steps}"}
        _line(axes, pick(rows, EXACT, euler_steps=steps), "std", f"{_MARKERS[steps]}--", **look)
    chosen = pick(rows, PATH, euler_steps=max(_EULER_STEPS))
    _line(axes, chosen, "std", "X-", color=VERMILION, ms=5, lw=1.2, label="noisy path less its noise, any K")
    tidy(axes, "what the two densities call entropy")
    axes.set(xscale="log", xlabel="standard deviation of the target", ylabel="entropy (nats a dimension)")
    axes.set_xticks(_STDS, [f"{std:g}" for std in _STDS])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, loc="lower right")
