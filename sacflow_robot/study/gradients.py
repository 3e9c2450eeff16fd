"""Size of the actor loss's gradient at each step of the rollout, by velocity network and number of steps.

The rollout is a recurrent network whose hidden state is the action: A_{k+1} = A_k + v(t_k, A_k, s) / K + noise. What is
measured is ||dL/dA_k||, k = 0 (the noise) to K (the action before squashing), of the actor loss's value term L = -Q: the norm
per row of the batch, averaged over rows. Backpropagation through time multiplies it by a step's Jacobian from k + 1 to k
(arXiv 2509.25756, section 4.1, calls this the cause of the instability), so that ||dL/dA_0|| / ||dL/dA_K|| is what the K
steps make of it. The entropy term is trained with but not measured: it enters at every step by itself, through log sigma.
The drift's correction is left out of the rollout: it adds (1 - t)^-1 times the noise's variance to every Jacobian, whatever the
velocity. What is found so holds for that setting; with the correction, or with sigma fixed, velocities may rank otherwise.
Gradient clipping does not enter the numbers themselves; it changes which networks training arrives at.
"""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from sacflow_robot.envs.gymnasium_env import GymnasiumEnv
from sacflow_robot.envs.vector import ThreadVectorEnv
from sacflow_robot.errors import UnknownNameError
from sacflow_robot.learn.algorithms.registry import make_agent
from sacflow_robot.learn.algorithms.sac_flow import SacFlow
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.networks.critic import aggregate
from sacflow_robot.learn.presets import preset
from sacflow_robot.study.options import GradientsOptions
from sacflow_robot.study.report import Report, geometric_mean, listed
from sacflow_robot.study.runs import RunAll, train
from sacflow_robot.study.targets import latents_of
from sacflow_robot.utils.plot_style import COLORS, MARKERS, new_figure, tidy

# name: velocity, largest norm of the policy's gradient, weight norm
VARIANTS: dict[str, tuple[str, float | None, bool]] = {
    "mlp": ("mlp", None, False),
    "mlp + clipping": ("mlp", 1.0, False),
    "mlp + weight norm": ("mlp", None, True),
    "flow-g": ("flow-g", None, False),
    "flow-t": ("flow-t", None, False),
    "flow-l": ("flow-l", None, False),
}
_ROWS, _DRAWS = 256, 4  # rows of a batch that gradients are averaged over, and batches
_RANDOM_STEPS = 1000  # before the first update; an episode of HalfCheetah


def study(options: GradientsOptions, run_all: RunAll) -> Report:
    """Measure at initialization and after updates of SAC from scratch."""
    for name in options.variants:
        if name not in VARIANTS:
            raise UnknownNameError("variant", name, VARIANTS)
    options = replace(options, variants=options.variants or tuple(VARIANTS))
    cases = [_Case(v, k, s) for k in options.euler_steps for v in options.variants for s in options.all_seeds]
    cases.sort(key=lambda case: -case.euler_steps)  # the slowest first, so that none is left alone at the end
    rows = [row for part in run_all(partial(_measure, options), cases) for row in part]
    order = {name: i for i, name in enumerate(options.variants)}
    rows.sort(key=lambda r: (r["updates"], r["euler_steps"], order[r["variant"]], r["seed"], r["k"]))
    return Report("gradients", rows, _draw(rows, options), _read(rows, options))


def gradient_norms(agent: SacFlow, observation: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """Gradient of the actor loss's value term at raw observations (B, O): mean over the batch of ||dL_b/dA_k|| (K + 1,), L_b
    being -Q of a row; and the norm of the loss's gradient in all parameters of the velocity network."""
    policy: FlowPolicy = agent.policy
    noise = policy.draw(len(observation), generator).requires_grad_()
    latents, rollout = latents_of(policy, observation, noise)
    members = agent.critic(policy.normalize(observation), rollout.action)
    loss = -aggregate(members, agent.config.learner.critic_aggregate).mean()
    grads = torch.autograd.grad(loss, [*latents, *policy.velocity.parameters()], allow_unused=True)
    norms = torch.stack([len(observation) * grad.norm(dim=-1).mean() for grad in grads[: len(latents)]])
    total = torch.stack([grad.norm() for grad in grads[len(latents) :] if grad is not None]).norm()
    return norms, float(total)


class _Case(NamedTuple):
    variant: str
    euler_steps: int
    seed: int


def _config(options: GradientsOptions, case: _Case) -> TrainConfig:
    velocity, clip, weight_norm = VARIANTS[case.variant]
    base = preset(options.env, velocity, from_scratch=True, full=options.full)
    learner = replace(base.learner, max_grad_norm=clip, policy_delay=1, warmup_steps=_RANDOM_STEPS)
    if not options.full:
        learner = replace(learner, batch_size=64, critic_width=128)
    return replace(
        base,
        seed=case.seed,
        device=options.device,
        compile="off",
        precision="float32",
        online_steps=_RANDOM_STEPS + options.update_count,
        eval_episodes=0,
        flow=replace(base.flow, euler_steps=case.euler_steps, weight_norm=weight_norm, drift=False),
        learner=learner,
    )


def _measure(options: GradientsOptions, case: _Case) -> list[dict[str, Any]]:
    config = _config(options, case)
    envs = ThreadVectorEnv([GymnasiumEnv(options.env)], background=False)
    trainer, finished = train(config, envs)
    observations = torch.from_numpy(trainer.buffer.observations())
    device = trainer.agent.device
    fresh = make_agent(envs.spec, config, device)
    fresh.fit_normalizer(observations[:_RANDOM_STEPS].numpy())
    agents = [(0, fresh), (options.update_count, trainer.agent)] if finished else [(0, fresh)]
    rows: list[dict[str, Any]] = []
    for updates, agent in agents:
        generator = torch.Generator().manual_seed(case.seed)
        measured = []
        for _ in range(_DRAWS):
            chosen = torch.randint(len(observations), (_ROWS,), generator=generator)
            measured.append(gradient_norms(agent, observations[chosen].to(device), agent.generator))  # type: ignore[arg-type]
        norms = torch.stack([m[0] for m in measured]).mean(0).tolist()
        about = {"updates": updates, "euler_steps": case.euler_steps, "variant": case.variant, "seed": case.seed}
        total = float(np.mean([m[1] for m in measured]))
        for k, norm in enumerate(norms):
            ratios = {"action_gradient": norm, "of_last": norm / norms[-1], "parameter_gradient": total}
            rows.append({**about, "k": k, **ratios})
    return rows


def _draw(rows: list[dict[str, Any]], options: GradientsOptions) -> Figure:
    stages = sorted({row["updates"] for row in rows})
    figure = new_figure(2.9 * len(options.euler_steps) + 0.6, 2.7 * len(stages) + 0.5)
    grid: Any = figure.subplots(len(stages), len(options.euler_steps), squeeze=False, sharey=True)
    for axes, (updates, steps) in zip(grid.flat, itertools.product(stages, options.euler_steps), strict=True):
        for n, variant in enumerate(options.variants):
            of_last = _by_step(rows, updates, steps, variant)
            if not len(of_last):
                continue
            middle = np.exp(np.log(of_last).mean(0))
            x, color = np.arange(steps + 1), COLORS[n % len(COLORS)]
            axes.fill_between(x, of_last.min(0), of_last.max(0), color=color, alpha=0.13, lw=0)
            axes.plot(x, middle, f"{MARKERS[n % len(MARKERS)]}-", color=color, ms=4, lw=1.5, label=variant)
        tidy(axes, f"K = {steps}, {f'after {updates:,} updates' if updates else 'at initialization'}")
        axes.axhline(1, color="#222222", lw=0.8, ls=(0, (4, 3)), zorder=1)
        axes.set(yscale="log", xlim=(-0.15, steps + 0.15), xlabel="rollout step k  (0: noise, K: action)")
        axes.set_ylabel(r"$\|\partial L/\partial A_k\|\ /\ \|\partial L/\partial A_K\|$")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.label_outer()
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def _by_step(rows: list[dict[str, Any]], updates: int, steps: int, variant: str) -> Any:
    """Ratios (seeds, K + 1)."""
    chosen = [r for r in rows if (r["updates"], r["euler_steps"], r["variant"]) == (updates, steps, variant)]
    seeds = sorted({r["seed"] for r in chosen})
    return np.array([[r["of_last"] for r in chosen if r["seed"] == seed] for seed in seeds])


def _read(rows: list[dict[str, Any]], options: GradientsOptions) -> str:
    most, last = max(options.euler_steps), max(row["updates"] for row in rows)
    spread: dict[str, float] = {}
    parts = []
    for variant in options.variants:
        ratios = _by_step(rows, last, most, variant)
        if not len(ratios):
            parts.append(f"no number for {variant}, which diverged")
            continue
        curve = np.exp(np.log(ratios).mean(0))
        spread[variant] = float(curve.max() / curve.min())
        parts.append(f"{geometric_mean(ratios[:, 0]):.2g} for {variant}")
    runs = {(r["variant"], r["euler_steps"], r["seed"]) for r in rows if r["updates"] == last}
    cases = len(options.variants) * len(options.euler_steps) * len(options.all_seeds)
    lost = cases - len(runs)
    order = sorted(spread, key=lambda name: spread[name])
    text = (
        f"On {options.env}, after {last:,} updates of SAC from scratch at K = {most}, with sigma learned and the drift not "
        f"corrected, the gradient of the value term that arrives at the noise "
        f"is, in terms of that at the action, {listed(parts)} (geometric mean over {len(options.all_seeds)} seeds). From the "
        f"smallest to the largest of the {most + 1} norms it is a factor of "
        f"{listed([f'{spread[name]:.3g} ({name})' for name in order])}: {order[0]} is the flattest."
    )
    if {"flow-l", "flow-t", "flow-g"} <= spread.keys():
        light, token, gated = (spread[name] for name in ("flow-l", "flow-t", "flow-g"))
        how = "as flat as" if light <= token else "less flat than"
        beside = "flatter than" if light < gated else "not flatter than"
        text += f" Flow-L is {how} Flow-T ({light:.3g} against {token:.3g}) and {beside} Flow-G ({gated:.3g})."
    if lost:
        text += f" {lost} of {cases} runs diverged."
    return text
