"""Style of a demonstrator in one attempt, drawn by quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Quality = Literal["proficient", "mixed", "poor"]
QUALITIES: tuple[Quality, ...] = get_args(Quality)


@dataclass(frozen=True)
class Style:
    """Parameters of one attempt of a demonstrator; drawn anew for each."""

    gain: float  # share of the remaining distance commanded per step; small is slow
    top_speed: float  # largest translation command, in action units
    hover: float  # height above the object from which to descend (m)
    detour: npt.NDArray[np.float64]  # sideways offset of the hover point (m), x and y
    diagonal: bool  # descend while still moving sideways
    aligns: bool  # turn the gripper to the object
    carelessness: float  # 1 misses often, 0 never; scales the aim errors of scripts
    close_steps: int  # steps to wait for the fingers
    tremor: float  # standard deviation of the slowly varying command noise, in action units
    jitter: float  # standard deviation of the white command noise, in action units
    pause_rate: float  # probability per step of stopping for a moment
    persistence: float  # probability of trying again after a failed attempt


def draw_style(quality: Quality, rng: np.random.Generator) -> Style:
    """Draw a style: ``mixed`` ranges from slow and shaky to quick and sure."""
    if quality == "proficient":
        return Style(
            gain=rng.uniform(0.6, 0.85),
            top_speed=rng.uniform(0.8, 1.0),
            hover=rng.uniform(0.04, 0.07),
            detour=rng.normal(0.0, 0.005, 2),
            diagonal=False,
            aligns=True,
            carelessness=0.0,
            close_steps=int(rng.integers(5, 8)),
            tremor=0.08,
            jitter=0.05,
            pause_rate=0.0,
            persistence=1.0,
        )
    skill = rng.uniform() if quality == "mixed" else rng.uniform(0.0, 0.3)
    return Style(
        gain=0.45 + 0.35 * skill + rng.uniform(-0.1, 0.1),
        top_speed=rng.uniform(0.6, 1.0),
        hover=rng.uniform(0.04, 0.12),
        detour=rng.normal(0.0, 0.025, 2),
        diagonal=bool(rng.uniform() < 0.3),
        aligns=bool(rng.uniform() < 0.4 + 0.5 * skill),
        carelessness=(1.25 - skill) * (1.0 if quality == "mixed" else 1.4),
        close_steps=int(rng.integers(4, 12)),
        tremor=0.30 - 0.2 * skill,
        jitter=0.20 - 0.1 * skill,
        pause_rate=0.03 * (1.2 - skill),
        persistence=0.5 if quality == "mixed" else 0.2,
    )
