"""Building blocks of a network folded for inference: linear maps in succession become one, in as few operations as possible.

A graph of one row spends more time between its nodes than in them, so nodes are saved first, then multiplications. The
networks that are folded are in ``learn/networks/folded.py``.
"""

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import Any, cast

import torch
from torch import Tensor, nn


class Affine:
    """x W + b in float64, W (in, out) and b (out,): a linear layer while it is being folded."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight.detach().double()
        self.bias = self.weight.new_zeros(weight.shape[1]) if bias is None else bias.detach().double()

    def then(self, after: "Affine") -> "Affine":
        return Affine(self.weight @ after.weight, self.bias @ after.weight + after.bias)

    def scaled(self, factor: float) -> "Affine":
        return Affine(factor * self.weight, factor * self.bias)


def linear(layer: Any) -> Affine:
    return Affine(layer.weight.T, layer.bias)


def after_norm(norm: Any) -> Affine:
    """Scale and shift of a layer norm."""
    return Affine(torch.diag(norm.weight), norm.bias)


def beside(*parts: Affine) -> Affine:
    """Several of one input, their outputs in succession."""
    return Affine(torch.cat([p.weight for p in parts], 1), torch.cat([p.bias for p in parts]))


class Product(nn.Module):
    """x W + b, or x W + C with C (B, out) given and b left out: one node either way."""

    def __init__(self, affine: Affine) -> None:
        super().__init__()
        self.weight = constant(affine.weight)
        self.bias = constant(affine.bias)

    def forward(self, x: Tensor, added: Tensor | None = None, alpha: float = 1, beta: float = 1) -> Tensor:
        return torch.addmm(self.bias if added is None else added, x, self.weight, beta=beta, alpha=alpha)


def constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.float().contiguous(), requires_grad=False)


class Features(nn.Module):
    """Normalized observation entries and, of each quaternion, the products q_i q_j / |q|^2.

    The rotation matrices that the networks see are linear in these: ``read``, which is folded into the layers after it.

    Args:
        mean: Of the observation (O,).
        std: Of the observation (O,).
        limit: Largest size of a normalized entry.
        quaternions: Indices of the four entries x y z w of each quaternion.
    """

    def __init__(self, mean: Tensor, std: Tensor, limit: float, quaternions: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.mean = constant(mean)
        self.std = constant(std)
        self._limit = limit
        fours, pairs = quaternions, list(combinations_with_replacement(range(4), 2))
        self.left: Tensor
        self.right: Tensor
        for name, which in ("left", 0), ("right", 1):
            self.register_buffer(
                name, torch.tensor([q[pair[which]] for q in fours for pair in pairs], dtype=torch.long)
            )
        square = torch.tensor([[float(i == j)] for i, j in pairs]).expand(-1, len(pairs))
        self.norm = constant(_block_diagonal(*[square] * len(fours)))
        others = [i for i in range(len(mean)) if not any(i in four for four in fours)]
        kept = torch.eye(len(mean), dtype=torch.float64)[:, others]
        rotations = [_rotation(pairs)] * len(fours)
        bias = torch.cat([kept.new_zeros(kept.shape[1]), *[torch.eye(3).flatten()] * len(fours)])
        self.read = Affine(_block_diagonal(kept, *rotations) if fours else kept, bias)
        self.read_out = Product(self.read)

    def forward(self, observation: Tensor) -> Tensor:
        scaled = ((observation - self.mean) / self.std).clamp(-self._limit, self._limit)
        if not len(self.left):
            return scaled
        products = observation.index_select(1, self.left) * observation.index_select(1, self.right)
        return torch.cat([scaled, products / (products @ self.norm).clamp_min(1e-12)], -1)


class FoldedVelocity(nn.Module):
    """A velocity with its K steps unrolled.

    Latents omit a constant offset to save one addition per step: ``begin`` subtracts it where it is there from the start,
    ``end`` adds it back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.short: nn.Parameter | None = None
        self.added: nn.Parameter | None = None

    def begin(self, noise: Tensor) -> Tensor:
        return noise if self.short is None else noise - self.short

    def end(self, latent: Tensor) -> Tensor:
        return latent if self.added is None else latent + self.added

    def encode(self, features: Tensor) -> Sequence[Tensor]:
        """All that depends on the features alone."""
        raise NotImplementedError

    def change(self, i: int, latent: Tensor, context: Sequence[Tensor]) -> Tensor:
        """v / K of step i (B, D)."""
        raise NotImplementedError

    def step(self, i: int, latent: Tensor, context: Sequence[Tensor]) -> Tensor:
        """Latent (B, D) after step i."""
        return latent + self.change(i, latent, context)


def _block_diagonal(*blocks: Tensor) -> Tensor:
    return cast(Tensor, torch.block_diag(*blocks))  # type: ignore[no-untyped-call]


def _rotation(pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Rotation matrix less the identity (9, row by row) as a linear map of the products q_i q_j / |q|^2, q = x y z w."""
    x, y, z, w = range(4)
    entries: list[dict[tuple[int, int], float]] = [
        {(y, y): -2, (z, z): -2},
        {(x, y): 2, (z, w): -2},
        {(x, z): 2, (y, w): 2},
        {(x, y): 2, (z, w): 2},
        {(x, x): -2, (z, z): -2},
        {(y, z): 2, (x, w): -2},
        {(x, z): 2, (y, w): -2},
        {(y, z): 2, (x, w): 2},
        {(x, x): -2, (y, y): -2},
    ]
    return torch.tensor([[entry.get(pair, 0.0) for entry in entries] for pair in pairs], dtype=torch.float64)
