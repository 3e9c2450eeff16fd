"""Who can do the gantry's task already, and who cannot: writes two policy files that ``sacflow-robot serve`` takes.

    python examples/my_robot/demonstrator.py

expert.onnx is a steady hand with a tremor, chance.onnx has no idea at all. On a robot of your own the expert is you: with a
gamepad (``run --teleop``), the keyboard (``run --keyboard``), or a program that you have.
"""

from pathlib import Path

import torch
from driver import BIN, REACH_M, SPEC
from torch import Tensor, nn

from sacflow_robot.export.to_onnx import export_policy
from sacflow_robot.spec import PolicySpec


class Expert(nn.Module):
    """Go to the part, hold it, go to the bin, let go. Observations (B, 5) as in SPEC's order, noise (B, 3)."""

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        axes, part, vacuum = observation.split([2, 2, 1], 1)
        bin_at = torch.tensor(BIN, dtype=torch.float32)
        goal = torch.where(vacuum > 0.5, bin_at, part)
        arrived = (axes - bin_at).norm(dim=1, keepdim=True) < REACH_M
        suction = torch.where((vacuum > 0.5) & arrived, -1.0, 1.0)
        return torch.cat([(goal - axes) / 0.03 + 0.2 * noise[:, :2], suction], 1).clamp(-1, 1)


class Chance(nn.Module):
    """Any action is as likely as any other."""

    def forward(self, observation: Tensor, noise: Tensor) -> Tensor:
        return torch.erf(noise / 2**0.5) + 0 * observation.sum(1, keepdim=True)


def main() -> None:
    size = SPEC.observation_dim
    spec = PolicySpec(SPEC, 1, 1, "scripted", (0.0,) * size, (1.0,) * size)
    for path, policy in (Path("expert.onnx"), Expert()), (Path("chance.onnx"), Chance()):
        export_policy(policy, spec, path)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
