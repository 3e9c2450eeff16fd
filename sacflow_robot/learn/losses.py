"""The losses of SAC Flow (arXiv 2509.25756, section 4.3), top to bottom as the paper has them.

Shapes: observation (B, O) normalized where a critic takes it, raw where the policy does; chunk (B, D), D = H * A;
mask (B, D), 1 where the chunk's row belongs to the episode.
"""

import torch
from torch import Tensor

from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.networks.policy import unsquash

_SMALLEST_VALUE = 1e-2


def flow_matching_loss(
    policy: FlowPolicy, observation: Tensor, chunk: Tensor, mask: Tensor, noise: Tensor, time: Tensor
) -> Tensor:
    """|| v(t, (1 - t) A_0 + t u) - (u - A_0) ||^2 with u the latent of the data, averaged over valid entries.

    A_0 is ``noise`` (B, D), t is ``time`` (B, 1); :func:`draw_flow_matching` draws both.
    """
    target = unsquash(chunk)
    velocity = policy.velocity(
        time, (1 - time) * noise + time * target, policy.velocity.encode(policy.normalize(observation))
    )
    return masked_mean((velocity - (target - noise)).square(), mask)


def draw_flow_matching(chunk: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise (B, D) and flow time (B, 1) for :func:`flow_matching_loss` on chunks (B, D)."""
    noise = torch.randn(chunk.shape, generator=generator, device=chunk.device)
    return noise, torch.rand(len(chunk), 1, generator=generator, device=chunk.device)


def td_target(reward: Tensor, discount: Tensor, next_q: Tensor, next_alpha_log_p: Tensor) -> Tensor:
    """y = sum_{j<H} gamma^j r_j + gamma^H mask (Q'(s', a') - alpha log p(a')), all (B,).

    ``reward`` already is the discounted sum and ``discount`` gamma^H times the mask; the discount is applied nowhere
    else. log p here means log p plus the path entropy, as in :func:`temperature_loss`.
    """
    return reward + discount * (next_q - next_alpha_log_p)


def critic_loss(q: Tensor, y: Tensor, valid: Tensor) -> Tensor:
    """(Q_e(s, a) - y)^2 of each critic (E, B) to the target (B,), averaged over windows that have a return."""
    error = (q - y).square() * valid
    return error.sum() / (valid.sum().clamp_min(1) * len(q))


def actor_loss(q: Tensor, alpha_log_p: Tensor, distance: Tensor, beta: float | Tensor) -> Tensor:
    """alpha log p - Q(s, a) + beta R, averaged over the batch; all arguments (B,), or () for an R that is a mean already.

    R is ||a - a_data||^2 in the paper.
    """
    return (alpha_log_p - q + beta * distance).mean()


def chunk_distance(chunk: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """||a - b||^2 (B,): a sum over the chunk's dimensions, as in the paper, of its valid rows only."""
    return ((chunk - other).square() * mask).sum(-1)


def normalize_q(q: Tensor) -> Tensor:
    """Q (B,) over their mean size, which gets no gradient (TD3+BC, arXiv 2106.06860, eq. 5)."""
    return q / q.detach().abs().mean().clamp_min(_SMALLEST_VALUE)


def temperature_loss(log_alpha: Tensor, excess_log_prob: Tensor, target_entropy: float) -> Tensor:
    """alpha (H - H_target) by its gradient: entropy below the target raises alpha.

    ``excess_log_prob`` (B,) is log p plus the path entropy, and ``target_entropy`` is measured from that too.
    """
    entropy = -excess_log_prob.detach().mean()
    return log_alpha.exp() * (entropy - target_entropy)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the entries where mask is 1."""
    return (x * mask).sum() / mask.sum().clamp_min(1)


def step(optimizer: torch.optim.Optimizer, loss: Tensor, max_grad_norm: float | None = None) -> None:
    """One step down the gradient of a loss, whose norm over all parameters is limited where ``max_grad_norm`` says so."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    if max_grad_norm is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
