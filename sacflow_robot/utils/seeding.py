"""Random numbers by purpose: one seed decides an episode, and each use of it draws from a stream of its own."""

from enum import IntEnum

import numpy as np

from sacflow_robot.spec import FloatArray

EVAL_SEED = 10_000  # first seed of ``eval`` and of a run's last evaluation
CURVE_SEED = 20_000  # first seed of the evaluations during training
RUN_SEED = 30_000  # first seed of ``run``, whose episodes are logged and learned from
TRAINING_SEED = 1_000_000  # training and demonstrations use seeds from here on only; evaluation uses seeds below


class Stream(IntEnum):
    """Purposes of random numbers. An episode's seed alone decides several things: each draws from a stream of its own,
    and Gymnasium's draw of the episode's start from the seed itself, so that none repeats another."""

    POLICY_NOISE = 1
    EXPERT = 2
    REPLAY = 3
    MESSAGES = 4
    TWIN = 5
    RANDOMIZATION = 6
    SENSORS = 7
    EXCITATION = 8


def random_stream(seed: int, *key: int) -> np.random.Generator:
    """The generator of a stream: ``key`` begins with a :class:`Stream`; the same on every machine."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def chunk_noise(noise_shape: tuple[int, ...], seed: int, step: int = 0) -> FloatArray:
    """Standard normal noise for one action chunk, the same on every machine.

    Args:
        noise_shape: (H, A), or (B, H, A).
        seed: The episode's seed, not negative.
        step: The step of the episode at which the chunk begins.
    """
    return random_stream(seed, Stream.POLICY_NOISE, step).standard_normal(noise_shape, dtype=np.float32)
