"""The path density, the drift and the exact density, against targets that are known in closed form.

The flow's velocity is the target's own (study/targets.py), so that every difference from the target is the K steps', the
noise's or the code's, and none the network's. Everything is in the latent space before squashing, in D = 2 dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from sacflow_robot.learn.density import exact_log_density
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.policy import squash_log_det
from sacflow_robot.plotting import BLACK, BLUE, GREEN, GREY, MARKERS, ORANGE, VERMILION, new_figure, tidy
from sacflow_robot.study.paths import follow, path_log_density
from sacflow_robot.study.report import Report
from sacflow_robot.study.targets import (
    GAUSSIAN,
    MIXTURE,
    Mixture,
    exact_policy,
    gaussian_divergence,
    gaussian_steps,
    path_divergence,
)

DIM = 2
_TARGETS = (GAUSSIAN, MIXTURE)
_OTHER = Mixture("other Gaussian", (1.0,), (0.2,), (0.45,))  # whose paths are told from GAUSSIAN's
_WIDER = 1.2  # the proposal's noise beside the rollout's, for importance sampling
_STDS = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
_SHOWN = 16, 0.5  # K and sigma of the panel of densities


@dataclass(frozen=True)
class Setup:
    """What is measured.

    Attributes:
        euler_steps: Numbers of steps K.
        noise_scales: sigma of the noise-augmented rollout.
        samples: Samples of each Monte Carlo estimate of a marginal; expectations of densities take a fifth.
        seed: Seed of all samples.
    """

    euler_steps: Sequence[int] = (4, 16, 64)
    noise_scales: Sequence[float] = (0.05, 0.1, 0.2, 0.34, 0.5, 0.7, 1.0)
    samples: int = 100_000
    seed: int = 0


_PARTS = ("path density integrates to", "marginal off the target", "divergence", "entropy")


def case_count(setup: Setup) -> int:
    """How often ``advance`` will be called."""
    return len(_PARTS)


def study_likelihood(setup: Setup, advance: Callable[[], None]) -> Report:
    """Check normalisation, marginals, divergences and entropies."""
    rows: list[dict[str, Any]] = []
    for part in (_normalisation, _marginals, _divergences, _entropies):
        rows += part(setup)
        advance()
    return Report("likelihood", rows, _draw(rows, setup), _read(rows, setup))


def _row(
    part: str, target: str, steps: int, sigma: float, drift: bool | str, value: float, **more: Any
) -> dict[str, Any]:
    row = {"part": part, "target": target, "euler_steps": steps, "noise_scale": sigma, "drift": str(drift).lower()}
    return {**row, "std": math.nan, "value": value, "standard_error": math.nan, "expected": math.nan, **more}


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


def _normalisation(setup: Setup) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for target in _TARGETS:
        for steps in (1, *[k for k in setup.euler_steps if k <= 16]):
            for sigma in (min(setup.noise_scales), max(setup.noise_scales)):
                policy = exact_policy(target, DIM, steps, sigma)
                mass, error = total_mass(policy, setup.samples // 5, setup.seed + len(rows))
                rows.append(_row(_PARTS[0], target.name, steps, sigma, True, mass, standard_error=error, expected=1.0))
    return rows


def _marginals(setup: Setup) -> list[dict[str, Any]]:
    rows = []
    for target in _TARGETS:
        rng = np.random.default_rng(setup.seed)
        own = torch.from_numpy(target.quantiles(rng.uniform(size=DIM * setup.samples)))
        rows.append(_row(_PARTS[1], target.name, 0, 0.0, "samples of the target", wasserstein(own, target)))
        for steps in setup.euler_steps:
            ends = _ends(target, steps, 1.0, drift=False, setup=setup, noiseless=True)
            rows.append(_row(_PARTS[1], target.name, steps, 0.0, "no noise", wasserstein(ends, target)))
            for sigma in setup.noise_scales:
                for drift in (True, False):
                    ends = _ends(target, steps, sigma, drift=drift, setup=setup)
                    rows.append(_row(_PARTS[1], target.name, steps, sigma, drift, wasserstein(ends, target)))
    return rows


def _ends(target: Mixture, steps: int, sigma: float, *, drift: bool, setup: Setup, noiseless: bool = False) -> Tensor:
    """Latents (N * D,) at the end of rollouts."""
    policy = exact_policy(target, DIM, steps, sigma, drift=drift)
    noise = _noise(policy, setup.samples, setup.seed)
    if noiseless:
        noise[1:] = 0
    return policy.rollout(noise.new_zeros(setup.samples, 1), noise).latent.flatten()


def _divergences(setup: Setup) -> list[dict[str, Any]]:
    """KL, in nats a dimension: of the exact density from its target, and of the paths of two Gaussian flows."""
    rows = []
    count = setup.samples // 5
    for target in _TARGETS:
        for steps in setup.euler_steps:
            policy = exact_policy(target, DIM, steps, 1.0)
            start = _noise(policy, count, setup.seed)[0]
            latent, log_prob = exact_log_density(policy, start.new_zeros(count, 1), start)
            gain = log_prob + squash_log_det(latent) - target.log_density(latent).sum(-1)
            value, error = _mean(gain / DIM)
            expected = divergence_of_steps(target, steps)
            more = {"standard_error": error, "expected": expected}
            rows.append(_row("divergence from target", target.name, steps, 0.0, "no noise", value, **more))
    for steps in setup.euler_steps:
        for sigma in setup.noise_scales:
            policy, other = (exact_policy(t, DIM, steps, sigma) for t in (GAUSSIAN, _OTHER))
            path, rollout = follow(policy, _noise(policy, count, setup.seed))
            own = rollout.log_prob
            theirs = path_log_density(other, path)
            value, error = _mean((own - theirs) / DIM)
            more = {"standard_error": error, "expected": path_divergence(GAUSSIAN, _OTHER, steps, sigma)}
            rows.append(_row("divergence of paths", GAUSSIAN.name, steps, sigma, True, value, **more))
    return rows


def divergence_of_steps(target: Mixture, steps: int) -> float:
    """KL (nats a dimension) from the target of what K deterministic steps make of noise.

    In closed form for a Gaussian; else by quadrature over the noise, for the map of one dimension is increasing and its
    slope is known by differences.
    """
    if len(target.weights) == 1:
        ends = gaussian_steps(target, steps, 0.0)
        return gaussian_divergence(ends.means[-1], ends.stds[-1], target.means[0], target.stds[0])
    start = np.linspace(-7, 7, 200_001)
    policy = exact_policy(target, 1, steps, 1.0, drift=False)
    noise = torch.zeros(1 + steps, len(start), 1, dtype=torch.float64)
    noise[0, :, 0] = torch.from_numpy(start)
    latents = policy.rollout(noise.new_zeros(len(start), 1), noise).latent[:, 0]
    slope = np.gradient(latents.numpy(), start)
    mass = np.exp(-0.5 * start**2) / math.sqrt(2 * math.pi)
    own = -0.5 * start**2 - 0.5 * math.log(2 * math.pi) - np.log(np.abs(slope))
    total = np.sum(mass * (own - target.log_density(latents).numpy())) * (start[1] - start[0])
    return float(total)


def _entropies(setup: Setup) -> list[dict[str, Any]]:
    """Entropy in nats a dimension of flows to Gaussians of several widths: exact, and that of the noisy path.

    The path's is measured from that of the noise alone (``path_entropy``), as the learner does.
    """
    rows = []
    count = setup.samples // 5
    for std in _STDS:
        target = Mixture("Gaussian", (1.0,), (0.0,), (std,))
        for steps in setup.euler_steps:
            policy = exact_policy(target, DIM, steps, 0.1)
            noise = _noise(policy, count, setup.seed)
            latent, log_prob = exact_log_density(policy, noise.new_zeros(count, 1), noise[0])
            value, error = _mean(-(log_prob + squash_log_det(latent)) / DIM)
            expected = 0.5 * math.log(2 * math.pi * math.e) + math.log(gaussian_steps(target, steps, 0.0).stds[-1])
            more = {"standard_error": error, "expected": expected, "std": std}
            rows.append(_row("entropy, exact", target.name, steps, 0.0, "no noise", value, **more))
            rollout = policy.rollout(noise.new_zeros(count, 1), noise)
            excess = -(rollout.log_prob + squash_log_det(rollout.latent)) - policy.reference_entropy
            value, error = _mean(excess / DIM)
            more = {"standard_error": error, "expected": 0.0, "std": std}
            rows.append(_row("entropy, path", target.name, steps, 0.1, True, value, **more))
    return rows


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean, and its standard error."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def _pick(rows: Sequence[dict[str, Any]], part: str, **where: Any) -> list[dict[str, Any]]:
    return [r for r in rows if r["part"] == part and all(r[key] == value for key, value in where.items())]


def _draw(rows: list[dict[str, Any]], setup: Setup) -> Figure:
    figure = new_figure(12.6, 7.4)
    grid = figure.subplots(2, 3)
    _draw_densities(grid[0][0], setup)
    for axes, target in zip(grid[0][1:], (MIXTURE, GAUSSIAN), strict=True):
        _draw_marginals(axes, rows, setup, target)
    _draw_masses(grid[1][0], rows)
    _draw_divergences(grid[1][1], rows, setup)
    _draw_entropies(grid[1][2], rows, setup)
    return figure


def _colour(setup: Setup, steps: int) -> str:
    return (BLUE, GREEN, ORANGE, VERMILION)[list(setup.euler_steps).index(steps) % 4]


def _draw_densities(axes: Axes, setup: Setup) -> None:
    steps, sigma = _SHOWN
    x = np.linspace(-1.9, 1.9, 400)
    axes.fill_between(x, MIXTURE.density(x), color="#cccccc", lw=0, label="target")
    edges = np.linspace(-1.9, 1.9, 96)
    for label, colour, kind in (
        ("no noise", BLACK, {"drift": False, "noiseless": True}),
        ("noise, drift corrected", BLUE, {"drift": True}),
        ("noise, not corrected", VERMILION, {"drift": False}),
    ):
        ends = _ends(MIXTURE, steps, sigma, setup=setup, **kind)
        height, _ = np.histogram(ends.numpy(), edges, density=True)
        axes.plot(0.5 * (edges[1:] + edges[:-1]), height, color=colour, lw=1.5, label=label)
    tidy(axes, rf"mixture, K = {steps}, $\sigma$ = {sigma:g}")
    axes.set(xlabel="latent action", ylabel="density", ylim=(0, 1.55 * float(MIXTURE.density(x).max())))
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_marginals(axes: Axes, rows: list[dict[str, Any]], setup: Setup, target: Mixture) -> None:
    handles = []
    for n, steps in enumerate(setup.euler_steps):
        colour = _colour(setup, steps)
        for drift, style in (("true", "-"), ("false", ":")):
            chosen = _pick(rows, _PARTS[1], target=target.name, euler_steps=steps, drift=drift)
            axes.plot(
                [r["noise_scale"] for r in chosen],
                [r["value"] for r in chosen],
                f"{MARKERS[n]}{style}",
                color=colour,
                ms=4,
                lw=1.5,
            )
        handles.append(Line2D([], [], color=colour, marker=MARKERS[n], ms=4, label=f"K = {steps}"))
    handles += [
        Line2D([], [], color=GREY, ls=ls, label=f"drift {what}") for ls, what in (("-", "corrected"), (":", "as it is"))
    ]
    floor = _pick(rows, _PARTS[1], target=target.name, euler_steps=0)[0]["value"]
    axes.axhline(floor, color=GREY, lw=0.8, ls=(0, (4, 3)))
    axes.annotate(
        "the target's own samples",
        (1.0, floor),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        fontsize=7,
        color=GREY,
    )
    tidy(axes, f"{target.name}: marginal off its target")
    axes.set(xscale="log", yscale="log", xlabel=r"noise scale $\sigma$", ylabel="Wasserstein-1 distance (latent units)")
    axes.set_ylim(0.6 * floor, 8 * axes.dataLim.y1)
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="upper left", ncols=2)


def _draw_masses(axes: Axes, rows: list[dict[str, Any]]) -> None:
    chosen = _pick(rows, _PARTS[0])
    for i, row in enumerate(chosen):
        colour = BLUE if row["target"] == MIXTURE.name else ORANGE
        axes.errorbar(i, row["value"], 2 * row["standard_error"], fmt="o", ms=4, color=colour, lw=1.3, capsize=2)
    axes.axhline(1, color=BLACK, lw=0.8, ls=(0, (4, 3)), zorder=1)
    labels = [f"{r['euler_steps']}\n{r['noise_scale']:g}" for r in chosen]
    tidy(axes, "integral of the path density (bars: 2 standard errors)")
    axes.set_xticks(range(len(chosen)), labels, fontsize=7)
    axes.set(xlabel=r"K, and below it $\sigma$", ylabel="integral over all paths")
    spread = max(abs(r["value"] - 1) + 2 * r["standard_error"] for r in chosen)
    axes.set_ylim(1 - 1.2 * spread, 1 + 1.7 * spread)
    handles = [
        Line2D([], [], color=c, marker="o", ls="", ms=4, label=t.name) for t, c in ((GAUSSIAN, ORANGE), (MIXTURE, BLUE))
    ]
    axes.legend(handles=handles, frameon=False, fontsize=8, ncols=2, loc="upper left")


def _draw_divergences(axes: Axes, rows: list[dict[str, Any]], setup: Setup) -> None:
    parts = (
        ("divergence of paths", GAUSSIAN.name, BLUE, "o", "paths of two Gaussian flows"),
        ("divergence from target", GAUSSIAN.name, ORANGE, "s", "exact density, Gaussian"),
        ("divergence from target", MIXTURE.name, VERMILION, "D", "exact density, mixture"),
    )
    for part, target, colour, marker, label in parts:
        chosen = _pick(rows, part, target=target)
        axes.errorbar(
            [r["expected"] for r in chosen],
            [r["value"] for r in chosen],
            [2 * r["standard_error"] for r in chosen],
            fmt=marker,
            ms=4.5,
            color=colour,
            lw=1.2,
            label=label,
            mfc="white",
            zorder=3,
        )
    values = [r["expected"] for part, target, *_ in parts for r in _pick(rows, part, target=target)]
    ends = [0.5 * min(values), 2 * max(values)]
    axes.plot(ends, ends, color=BLACK, lw=0.8, ls=(0, (4, 3)), zorder=1)
    tidy(axes, "KL divergence, nats a dimension", grid="both")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="analytic", ylabel="Monte Carlo")
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_entropies(axes: Axes, rows: list[dict[str, Any]], setup: Setup) -> None:
    x = np.geomspace(min(_STDS), max(_STDS), 50)
    axes.plot(x, 0.5 * np.log(2 * np.pi * np.e * x**2), color=BLACK, lw=1.2, label="the Gaussian's own")
    for n, steps in enumerate(setup.euler_steps):
        chosen = _pick(rows, "entropy, exact", euler_steps=steps)
        axes.plot(
            [r["std"] for r in chosen],
            [r["value"] for r in chosen],
            f"{MARKERS[n]}--",
            color=_colour(setup, steps),
            ms=4.5,
            mfc="white",
            lw=1,
            label=f"exact density, K = {steps}",
        )
    chosen = _pick(rows, "entropy, path", euler_steps=max(setup.euler_steps))
    axes.plot(
        [r["std"] for r in chosen],
        [r["value"] for r in chosen],
        "X-",
        color=VERMILION,
        ms=5,
        lw=1.2,
        label=r"noisy path less its noise, any K",
    )
    tidy(axes, "what the two densities call entropy")
    axes.set(xscale="log", xlabel="standard deviation of the target", ylabel="entropy (nats a dimension)")
    axes.set_xticks(_STDS, [f"{std:g}" for std in _STDS])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _read(rows: list[dict[str, Any]], setup: Setup) -> str:
    masses = _pick(rows, _PARTS[0])
    off = max(abs(r["value"] - 1) / r["standard_error"] for r in masses)
    worst = max(abs(r["value"] - 1) for r in masses)
    few, most, sigma = min(setup.euler_steps), max(setup.euler_steps), max(setup.noise_scales)

    def distance(steps: int, scale: float, drift: str) -> float:
        where = {"target": MIXTURE.name, "euler_steps": steps, "noise_scale": scale, "drift": drift}
        return float(_pick(rows, _PARTS[1], **where)[0]["value"])

    divergences = _pick(rows, "divergence of paths") + _pick(rows, "divergence from target")
    errors = [abs(r["value"] - r["expected"]) / max(r["standard_error"], 1e-12) for r in divergences]
    exact = _pick(rows, "entropy, exact", euler_steps=most)
    path = _pick(rows, "entropy, path")
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
