"""The control loop: observe, infer, command, record."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sacflow_robot.episode import Episode, EpisodeBuilder
from sacflow_robot.errors import SpecMismatchError
from sacflow_robot.spec import ArmSpec, FloatArray, Policy, Robot, chunk_noise


@dataclass(frozen=True)
class EpisodeRun:
    """One episode and how well the loop kept time.

    Attributes:
        episode: The episode.
        overruns: Steps whose action was not ready within one control period of its observation.
    """

    episode: Episode
    overruns: int


def check_fit(policy: Policy, robot: ArmSpec) -> None:
    """Refuse a policy that was made for another arm.

    Raises:
        SpecMismatchError: Names every field that differs.
    """
    different = robot.differences(policy.spec.arm)
    if different:
        raise SpecMismatchError(f"the policy does not fit the robot (robot, policy): {'; '.join(different)}")


def run_episode(
    robot: Robot,
    policy: Policy,
    seed: int,
    *,
    policy_version: str,
    limits: tuple[FloatArray, FloatArray] | None = None,
    clock_ns: Callable[[], int] = time.monotonic_ns,
) -> EpisodeRun:
    """Run one episode, chunk by chunk, each chunk executed open loop.

    The noise of the chunk chosen at step t is ``chunk_noise((H, A), seed, t)``, so that the episode can be repeated.

    Args:
        robot: The arm.
        policy: Local or remote policy.
        seed: Decides the noise, and the start on a simulated arm.
        policy_version: Recorded with the episode.
        limits: Lower and upper bound (A,) of the commanded action, within the arm's own.
        clock_ns: Clock of the recorded times.

    Raises:
        InvalidValueError: The policy's action holds NaN or infinity; it was not sent.
    """
    arm, shape = robot.spec, policy.spec.noise_shape
    period_ns = 1e9 / arm.control_rate_hz
    result = robot.begin(seed)
    captured = clock_ns()
    builder = EpisodeBuilder(result, captured)
    overruns = 0
    while not result.ended:
        observation = {key: array[None] for key, array in arm.check_observation(result.observation).items()}
        noise = chunk_noise(shape, seed, len(builder))[None]
        for proposed in policy.infer(observation, noise)[0]:
            commanded = arm.check_action(proposed)
            if limits is not None:
                commanded = np.clip(commanded, *limits)
            overruns += clock_ns() - captured > period_ns
            result = robot.command(commanded)
            captured = clock_ns()
            builder.add(result, commanded, proposed=np.asarray(proposed, np.float32), time_ns=captured)
            if result.ended:
                break
    episode = builder.build(
        seed=seed,
        task=arm.task,
        robot=arm.robot,
        policy_version=policy_version,
        spec_fingerprint=policy.spec.fingerprint,
        clock="monotonic of the robot's computer",
    )
    return EpisodeRun(episode, overruns)
