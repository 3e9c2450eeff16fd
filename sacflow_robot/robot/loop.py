"""The control loop: observe, infer, command, record."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from sacflow_robot.episode import Episode, EpisodeBuilder
from sacflow_robot.errors import LogWriteError, SpecMismatchError
from sacflow_robot.randomness import chunk_noise
from sacflow_robot.robot.limits import ActionLimits
from sacflow_robot.spec import ArmSpec, FloatArray, Policy, Recorder, Robot


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
    recorder: Recorder | None = None,
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
        recorder: Gets the episode; when something goes wrong on the way, the steps until then, marked interrupted.
        limits: Lower and upper bound (A,) of the commanded action, within the arm's own.
        clock_ns: Clock of the recorded times.

    Raises:
        InvalidValueError: An observation or an action holds NaN or infinity; nothing was sent on it.
    """
    arm, limit = robot.spec, ActionLimits(robot.spec, limits)
    result = robot.begin(seed)
    observation = arm.check_observation(result.observation)
    captured = clock_ns()
    builder = EpisodeBuilder(result, captured)
    info = {
        "seed": seed,
        "task": arm.task,
        "robot": arm.robot,
        "policy_version": policy_version,
        "spec_fingerprint": policy.spec.fingerprint,
        "clock": "monotonic of the robot's computer",
    }
    overruns = 0
    try:
        while not result.ended:
            noise = chunk_noise(policy.spec.noise_shape, seed, len(builder))
            chunk = policy.infer({key: array[None] for key, array in observation.items()}, noise[None])[0]
            for proposed in chunk:
                commanded = limit(proposed)
                overruns += clock_ns() - captured > arm.period_ns
                result = robot.command(commanded)
                captured = clock_ns()
                observation = arm.check_observation(result.observation)
                builder.add(result, commanded, proposed=proposed, time_ns=captured)
                if result.ended:
                    break
    except BaseException:
        if recorder is not None and len(builder):
            with contextlib.suppress(LogWriteError):  # what went wrong first is what the user must hear
                recorder.append(builder.build(**info, interrupted=True))
        raise
    episode = builder.build(**info)
    if recorder is not None:
        recorder.append(episode)
    return EpisodeRun(episode, overruns)
