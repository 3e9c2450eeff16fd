"""Run episodes: the control loop around a policy, a robot, a recorder and a person."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from sacflow_robot.episode import LOOP_CLOCK
from sacflow_robot.errors import SpecMismatchError
from sacflow_robot.interfaces import Policy, Recorder, Robot
from sacflow_robot.robot.control.action_sources import ActionSource, ActionStep, SyncChunking
from sacflow_robot.robot.control.episode_loop import VALID_PERIODS, EpisodeLoop, EpisodeRun
from sacflow_robot.robot.control.operator import Operator
from sacflow_robot.robot.control.operator_requests import OperatorRequests
from sacflow_robot.robot.control.timing import no_garbage_collection
from sacflow_robot.robot.safety.action_clipper import ActionClipper
from sacflow_robot.robot.safety.filter import SafetyFilter
from sacflow_robot.robot.teleop.intervention import Label, Teleoperator
from sacflow_robot.spec import FloatArray, RobotSpec

__all__ = [
    "VALID_PERIODS",
    "ActionSource",
    "ActionStep",
    "EpisodeRun",
    "SyncChunking",
    "check_fit",
    "default_safety",
    "run_episode",
]


def check_fit(policy: Policy, robot: RobotSpec) -> None:
    """Refuse a policy that was made for another robot.

    Raises:
        SpecMismatchError: Names every field that differs.
    """
    different = robot.differences(policy.spec.robot)
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
    safety: SafetyFilter | ActionClipper | None = None,
    chooser: ActionSource | None = None,
    human: Teleoperator | None = None,
    switches: OperatorRequests | None = None,
    operator: Operator | None = None,
    info: Mapping[str, Any] | None = None,
    most_steps: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> EpisodeRun:
    """Run one episode.

    The noise of the chunk chosen at step t is ``chunk_noise((H, A), seed, t)``, so that the episode can be repeated.

    Args:
        robot: The robot, connected.
        policy: Local or remote policy; says what it is, and chooses chunk by chunk, open loop, without a ``chooser``.
        seed: Decides the noise, and the start on a simulated robot.
        policy_version: Recorded with the episode.
        recorder: Gets every step as it is taken; when something goes wrong on the way, the episode is ended there and
            marked interrupted.
        limits: Lower and upper bound (A,) of the commanded action, within the robot's own.
        safety: What every command passes; starting an episode robots it, unless it was held or stopped since. None for
            the default of :func:`default_safety`.
        chooser: Where actions come from.
        human: Through what a person takes over.
        switches: What a person asked for from elsewhere: stop, hold, robot.
        operator: ``human`` and ``switches`` in one, for a caller that keeps them between episodes.
        info: What else to record about the episode; JSON values.
        most_steps: Steps after which the episode is cut; None for no limit.
        tell: Where to say what a person has to know at once: held, stopped, enabled.

    Raises:
        StoppedError: The robot was stopped before the first command; nothing was sent.
        RobotError: The robot was held or stopped before this episode, and nobody has enabled it since.
        InvalidValueError: On a lockstep robot, an observation or an action holds NaN or infinity; nothing was sent on it.
        LogWriteError: The recorder cannot keep the steps; the robot gets no further command.
    """
    if safety is None:
        safety = default_safety(robot, limits)
    loop = EpisodeLoop(
        robot,
        policy.spec,
        seed,
        safety=safety,
        chooser=SyncChunking(policy) if chooser is None else chooser,
        operator=Operator(switches, human) if operator is None else operator,
        recorder=recorder,
        tell=tell,
    )
    about = {
        "seed": seed,
        "task": robot.spec.task,
        "robot": robot.spec.robot,
        "policy_version": policy_version,
        "spec_fingerprint": policy.spec.fingerprint,
        "clock": LOOP_CLOCK,
        "lockstep": robot.lockstep,
        **({"safety_sha256": safety.limits.sha256} if isinstance(safety, SafetyFilter) else {}),
        **(info or {}),
    }
    try:
        # The collection comes first: it takes long enough to miss deadlines.
        with contextlib.nullcontext() if robot.lockstep else no_garbage_collection():
            loop.begin(about)
            while not loop.ended and (most_steps is None or loop.steps < most_steps):
                loop.step()
    except BaseException:
        loop.finish({"interrupted": True}, suppress=True)
        raise
    said: dict[str, Any] = {} if loop.label is None else {"label": str(loop.label)}
    if loop.label is not None:
        said["success"] = loop.label is Label.SUCCESS
    if loop.stopped or loop.label is Label.DISCARD:
        said |= {"interrupted": True} | ({"stopped": loop.stopped} if loop.stopped else {})
    loop.finish(said)
    return loop.result({**about, **said})


def default_safety(robot: Robot, limits: tuple[FloatArray, FloatArray] | None = None) -> SafetyFilter | ActionClipper:
    """What a robot's commands pass where nobody says otherwise.

    Args:
        robot: The robot.
        limits: Lower and upper bound (A,) of the action, for a robot in lockstep.

    Returns:
        Bounds and a latch for a robot in lockstep, the safety filter without further limits for any other.
    """
    return ActionClipper(robot.spec, limits) if robot.lockstep else SafetyFilter(robot.spec)
