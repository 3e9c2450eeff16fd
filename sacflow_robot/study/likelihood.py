"""The path density, the drift and the exact density, against targets that are known in closed form.

The flow's velocity is the target's own (study/targets.py), so that every difference from the target is the K steps', the
noise's or the code's, and none the network's. Everything is in the latent space before squashing, in D = 2 dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sacflow_robot.learn.density import exact_log_density
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.networks.policy import squash_log_det
from sacflow_robot.study.likelihood_figure import EXACT, FROM_TARGET, MASS, OF_PATHS, OFF, PATH, SHOWN, draw, pick
from sacflow_robot.study.options import LikelihoodOptions
from sacflow_robot.study.paths import follow, path_log_density
from sacflow_robot.study.report import Report
from sacflow_robot.study.runs import RunAll
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
_EULER_STEPS = (4, 16, 64)
_NOISE_SCALES = (0.05, 0.1, 0.2, 0.34, 0.5, 0.7, 1.0)
_WIDER = 1.2  # the proposal's noise beside the rollout's, for importance sampling
_STDS = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0)


def study(options: LikelihoodOptions, run_all: RunAll) -> Report:
    """Check normalization, marginals, divergences and entropies."""
    rows = [row for part in run_all(_rows, _parts(options)) for row in part]
    steps, sigma = SHOWN
    shown = {
        "no noise": _ends(MIXTURE, steps, sigma, drift=False, options=options, noiseless=True),
        "noise, drift corrected": _ends(MIXTURE, steps, sigma, drift=True, options=options),
        "noise, not corrected": _ends(MIXTURE, steps, sigma, drift=False, options=options),
    }
    figure = draw(rows, {label: ends.numpy() for label, ends in shown.items()})
    return Report("likelihood", rows, figure, _read(rows))


def _parts(options: LikelihoodOptions) -> list[Callable[[], list[dict[str, Any]]]]:
    marginals = [partial(_marginals, options, target, steps) for target in _TARGETS for steps in _EULER_STEPS]
    return [partial(_normalization, options), *marginals, partial(_divergences, options), partial(_entropies, options)]


def _rows(part: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return part()


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
    ends = _ends(target, steps, 1.0, drift=False, options=options, noiseless=True)
    rows.append(_row(OFF, target.name, steps, 0.0, "no noise", wasserstein(ends, target)))
    for sigma in _NOISE_SCALES:
        for drift in (True, False):
            ends = _ends(target, steps, sigma, drift=drift, options=options)
            rows.append(_row(OFF, target.name, steps, sigma, drift, wasserstein(ends, target)))
    return rows


def _ends(
    target: Mixture, steps: int, sigma: float, *, drift: bool, options: LikelihoodOptions, noiseless: bool = False
) -> Tensor:
    """Latents (N * D,) at the end of rollouts."""
    policy = exact_policy(target, DIM, steps, sigma, drift=drift)
    noise = _noise(policy, options.sample_count, options.seed)
    if noiseless:
        noise[1:] = 0
    return policy.rollout(noise.new_zeros(options.sample_count, 1), noise).latent.flatten()


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
            value, error = _mean(gain / DIM)
            expected = divergence_of_steps(target, steps)
            more = {"standard_error": error, "expected": expected}
            rows.append(_row(FROM_TARGET, target.name, steps, 0.0, "no noise", value, **more))
    for steps in _EULER_STEPS:
        for sigma in _NOISE_SCALES:
            policy, other = (exact_policy(t, DIM, steps, sigma) for t in (GAUSSIAN, _OTHER))
            path, rollout = follow(policy, _noise(policy, count, options.seed))
            own = rollout.log_prob
            theirs = path_log_density(other, path)
            value, error = _mean((own - theirs) / DIM)
            more = {"standard_error": error, "expected": path_divergence(GAUSSIAN, _OTHER, steps, sigma)}
            rows.append(_row(OF_PATHS, GAUSSIAN.name, steps, sigma, True, value, **more))
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
            value, error = _mean(-(log_prob + squash_log_det(latent)) / DIM)
            expected = 0.5 * math.log(2 * math.pi * math.e) + math.log(gaussian_steps(target, steps, 0.0).stds[-1])
            more = {"standard_error": error, "expected": expected, "std": std}
            rows.append(_row(EXACT, target.name, steps, 0.0, "no noise", value, **more))
            rollout = policy.rollout(noise.new_zeros(count, 1), noise)
            excess = -(rollout.log_prob + squash_log_det(rollout.latent)) - policy.reference_entropy
            value, error = _mean(excess / DIM)
            more = {"standard_error": error, "expected": 0.0, "std": std}
            rows.append(_row(PATH, target.name, steps, 0.1, True, value, **more))
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
