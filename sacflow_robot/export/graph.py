"""The torch module that becomes an ONNX graph, and what it asks of a policy."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sacflow_robot.spec import RobotSpec


class ExportablePolicy(nn.Module):
    """Base of policies that supply their own export twin. Any other module with such a ``forward`` is exported as it is.

    ``forward`` turns raw observations (B, O) and noise (B, D) into actions (B, D); where it takes what is committed already,
    prefix and mask, each (B, D), follow.

    Attributes:
        takes_prefix: Whether ``forward`` can be given what is committed already.
        picks: Whether it picks the best of several candidates; it then has a :meth:`margin`.
    """

    takes_prefix = False
    picks = False

    def twin(self, *, prefix: bool) -> nn.Module:
        """The same function, made for inference; with ``prefix`` it may take one."""
        return self

    def margin(self, observation: Tensor, noise: Tensor, *committed: Tensor) -> Tensor:
        """Value of the candidate picked above that of the next (B,)."""
        raise NotImplementedError


class ExportedGraph(nn.Module):
    """A policy as its file sees it: observation arrays and noise in, prefix and mask where it takes them, chunks out.

    Args:
        policy: Flat observation (B, O), noise (B, D) and perhaps prefix and mask (B, D) to actions (B, D) in [-1, 1].
        robot: The robot whose observations come in, and in whose units actions go out.
    """

    over_steps: Tensor
    middle: Tensor
    half_range: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, policy: nn.Module, robot: RobotSpec, chunk_length: int) -> None:
        super().__init__()
        self.policy = policy
        self._keys = len(robot.observations)
        self._shape = -1, chunk_length, robot.action_dim
        over_steps = torch.eye(chunk_length).repeat_interleave(robot.action_dim, 1)
        self.register_buffer("over_steps", over_steps)  # (H, D): a product with it is cheaper than repeating entries
        self._scaled = not robot.has_unit_actions
        for name, values in zip(
            ("middle", "half_range", "low", "high"), (*robot.action_scale, *robot.action_bounds), strict=True
        ):
            self.register_buffer(name, torch.from_numpy(values) if self._scaled else None)

    @property
    def takes_prefix(self) -> bool:
        return isinstance(self.policy, ExportablePolicy) and self.policy.takes_prefix

    def forward(self, *arrays: Tensor) -> Tensor:
        """Actions (B, H, A) from one array (B, *shape) per observation key, noise (B, H, A), prefix and its mask (B, H)."""
        actions: Tensor = self.policy(*self._flat(arrays))
        actions = actions.reshape(self._shape)
        if not self._scaled:
            return actions
        actions = torch.minimum(torch.maximum(self.middle + self.half_range * actions, self.low), self.high)
        committed = arrays[self._keys + 1 :]
        if not committed:
            return actions
        prefix, mask = committed  # scaled there and back it would differ in its last bit
        return torch.where(mask.unsqueeze(-1) > 0, prefix, actions)

    def margin(self, *arrays: Tensor) -> Tensor | None:
        """:meth:`ExportablePolicy.margin` (B,); None of a policy that does not pick."""
        if isinstance(self.policy, ExportablePolicy) and self.policy.picks:
            return self.policy.margin(*self._flat(arrays))
        return None

    def _flat(self, arrays: Sequence[Tensor]) -> list[Tensor]:
        observation, (noise, *committed) = arrays[: self._keys], arrays[self._keys :]
        flat = [torch.cat([x.flatten(1) for x in observation], -1), noise.flatten(1)]
        if committed:
            prefix, mask = committed
            prefix = (prefix - self.middle) / self.half_range if self._scaled else prefix
            flat += [prefix.flatten(1), mask @ self.over_steps]
        return flat
