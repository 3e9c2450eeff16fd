"""``sacflow-robot eval --robustness``: success against what may be different on a real arm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sacflow_robot.cli import common
from sacflow_robot.utils.intervals import wilson_interval

if TYPE_CHECKING:
    from sacflow_robot.envs.robot_parameters import RobotParameters
    from sacflow_robot.interfaces import Policy

# Perturbation: unit, values; each value is what is set on the nominal robot.
LEVELS: dict[str, tuple[str, tuple[float, ...]]] = {
    "delay": ("ms, of observations and of commands", (0, 25, 50, 100, 150)),
    "noise": ("mm on all positions", (0, 2, 5, 10, 20)),
    "mass": ("kg in the hand, not compensated", (0, 0.25, 0.5, 1.0)),
    "friction": ("times a Franka's damping and dry friction", (0, 1, 2, 3)),
    "gain": ("times the nominal stiffness", (0.4, 0.6, 1.0, 1.4, 2.0)),
    "drop": ("share of messages lost, each way", (0, 0.1, 0.3, 0.5)),
}


def perturbed(name: str, value: float) -> RobotParameters:
    """The robot of one level."""
    from sacflow_robot.envs.randomization import FRANKA_DAMPING_NM_S_PER_RAD, FRANKA_FRICTION_NM, STIFFNESS_PER_S2
    from sacflow_robot.envs.robot_parameters import RobotParameters

    if name == "delay":
        return RobotParameters({f"transport.{way}_delay_ms": (value,) for way in ("observation", "command")})
    if name == "noise":
        return RobotParameters({f"sensors.{key}.noise_m": (value / 1e3,) for key in ("robot0_eef_pos", "object")})
    if name == "mass":
        return RobotParameters({"payload.mass_kg": (value,)})
    if name == "friction":
        if value == 0:
            return RobotParameters()
        damping, dry = (
            tuple(value * v for v in nominal) for nominal in (FRANKA_DAMPING_NM_S_PER_RAD, FRANKA_FRICTION_NM)
        )
        return RobotParameters({"joints.damping_nm_s_per_rad": damping, "joints.friction_loss_nm": dry})
    if name == "gain":
        return RobotParameters(
            {f"controller.{k}_stiffness_per_s2": (value * STIFFNESS_PER_S2,) for k in ("translation", "rotation")}
        )
    return RobotParameters({f"transport.{way}_drop_ratio": (value,) for way in ("observation", "command")})


def robustness(policy: Policy, task: str, history: int, seeds: Sequence[int], figure: Path) -> list[dict[str, Any]]:
    """A row per perturbation and level, and the figure."""
    from sacflow_robot.calibrate.figures import draw_perturbations
    from sacflow_robot.envs.collector import rollout
    from sacflow_robot.envs.randomization import Draws
    from sacflow_robot.envs.vector import make_vector_env

    rows: list[dict[str, Any]] = []
    with common.progress_bar("levels") as bar:
        row = bar.add_task("perturbing", total=sum(len(v) for _, v in LEVELS.values()), success="")
        for name, (unit, values) in LEVELS.items():
            for value in values:
                draws = Draws(model=perturbed(name, value))
                with make_vector_env(task, 2, history=history, draws=draws) as envs:
                    episodes = list(rollout(envs, policy.spec.noise_shape, policy.infer, seeds))
                solved = sum(e.success for e in episodes)
                low, high = wilson_interval(solved, len(episodes))
                rows.append(
                    {"perturbation": name, "value": value, "unit": unit, "episodes": len(episodes), "successes": solved,
                     "success_rate": solved / len(episodes), "ci_low": low, "ci_high": high}
                )  # fmt: skip
                bar.update(row, advance=1, success=f"{name} {value:g}: {solved}/{len(episodes)}")
    draw_perturbations(rows, figure)
    return rows
