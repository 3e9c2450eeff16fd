"""The control loop: observe, infer, command, record."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sacflow_robot.episode import Episode, EpisodeBuilder, Step, StepFlag
from sacflow_robot.errors import DataError, SpecMismatchError
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
    info: Mapping[str, Any] | None = None,
    clock_ns: Callable[[], int] = time.monotonic_ns,
) -> EpisodeRun:
    """Run one episode, chunk by chunk, each chunk executed open loop.

    The noise of the chunk chosen at step t is ``chunk_noise((H, A), seed, t)``, so that the episode can be repeated.

    Args:
        robot: The arm.
        policy: Local or remote policy.
        seed: Decides the noise, and the start on a simulated arm.
        policy_version: Recorded with the episode.
        recorder: Gets every step as it is taken; when something goes wrong on the way, the episode is ended there and
            marked interrupted.
        limits: Lower and upper bound (A,) of the commanded action, within the arm's own.
        info: What else to record about the episode; JSON values.
        clock_ns: Clock of the recorded times.

    Raises:
        InvalidValueError: An observation or an action holds NaN or infinity; nothing was sent on it.
        LogWriteError: The recorder cannot keep the steps; the arm gets no further command.
    """
    arm, limit = robot.spec, ActionLimits(robot.spec, limits)
    start = robot.begin(seed)
    received = clock_ns()
    observation = arm.check_observation(start.observation)
    captured = received if start.time_ns is None else start.time_ns
    builder = EpisodeBuilder(start, captured)
    about = {
        "seed": seed,
        "task": arm.task,
        "robot": arm.robot,
        "policy_version": policy_version,
        "spec_fingerprint": policy.spec.fingerprint,
        "clock": "monotonic of the robot's computer",
        **(info or {}),
    }
    overruns, result = 0, start
    if recorder is not None:
        recorder.begin(start, captured, about)
    try:
        while not result.ended:
            noise = chunk_noise(policy.spec.noise_shape, seed, len(builder))
            chunk = policy.infer({key: array[None] for key, array in observation.items()}, noise[None])[0]
            inferred = clock_ns()
            for i, proposed in enumerate(chunk):
                commanded = limit(proposed)
                sent = clock_ns()
                late = sent - captured > arm.period_ns
                robot.command(commanded, sent + arm.period_ns)
                result = robot.observe()
                before, received = received, clock_ns()
                captured = received if result.time_ns is None else result.time_ns
                observation = arm.check_observation(result.observation)
                clipped = not np.array_equal(commanded, proposed)
                flags = StepFlag.LATE * late | StepFlag.CLIPPED * clipped | StepFlag.CHUNK_START * (i == 0)
                step = Step(
                    *(result, commanded, captured, proposed),
                    flags=flags,
                    received_ns=before,
                    inferred_ns=inferred,
                    sent_ns=sent,
                )
                builder.append(step)
                if recorder is not None:
                    recorder.append(step)
                overruns += late
                if result.ended:
                    break
    except BaseException:
        if recorder is not None:
            with contextlib.suppress(DataError):  # what went wrong first is what the user must hear
                recorder.end({"interrupted": True})
        raise
    if recorder is not None:
        recorder.end({})
    return EpisodeRun(builder.build(**about), overruns)
