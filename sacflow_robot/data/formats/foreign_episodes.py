"""Episodes of data sets from elsewhere that say no more than observations, actions and, at best, how it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sacflow_robot.data.formats.adapt import adapt, follows_poses, robot_of_file
from sacflow_robot.data.formats.agreement import Claims, Controller, check_agreement, controller_of
from sacflow_robot.data.formats.checks import check_unit
from sacflow_robot.data.formats.demonstrations import DemoOptions, Losses, human_episode
from sacflow_robot.data.formats.outcomes import Outcome, Recorded, judge_outcomes
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError
from sacflow_robot.spec import FloatArray

NO_SUCCESS = "no success is recorded, and no episode counts as one"

_LOOKED_AT = 5  # episodes whose actions are looked at for what they mean


@dataclass(frozen=True)
class ForeignEpisode:
    """One episode of T steps as its data set has it.

    Attributes:
        origin: Names it in messages.
        observations: Per key (T + 1, ...).
        actions: (T, A), as recorded.
        outcome: What is said of how it went.
        columns: Columns of Episode that are known besides.
        info: What describes the whole episode.
    """

    origin: str
    observations: dict[str, FloatArray]
    actions: FloatArray
    outcome: Recorded
    columns: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, rows in {"its actions": self.actions, **self.observations}.items():
            wrong = np.flatnonzero(~np.isfinite(rows.reshape(len(rows), -1)).all(1))
            if wrong.size:
                named = what if what == "its actions" else f"the observation {what!r}"
                raise DataError(
                    f"{self.origin}: NaN or infinity among {named}, first in frame {wrong[0]}; leave it out"
                )


def make_episodes(
    path: str, found: Sequence[ForeignEpisode], claims: Claims, options: DemoOptions, losses: Losses
) -> list[Episode]:
    """The episodes as the robot and task would have them.

    Args:
        path: Names the data set in messages.
        found: Its episodes.
        claims: What it says of its robot and rate.
        options: How to read it.
        losses: Takes the remarks.

    Raises:
        SpecMismatchError: It does not agree with the robot and task, and no option resolves that.
        DataError: Its rewards can be read in more than one way, or an episode cannot be converted.
    """
    robot = options.robot
    if controller_of(robot).delta and any(follows_poses(e.actions, e.observations) for e in found[:_LOOKED_AT]):
        claims = replace(claims, controller=Controller(delta=False, seen=True))
    check_agreement(path, claims, robot, options.agreement)
    recorded_with = robot_of_file(claims, robot)
    low, high = recorded_with.action_bounds
    beyond = float(np.mean(np.concatenate([((e.actions < low) | (e.actions > high)).any(1) for e in found] or [[0]])))
    if beyond:
        losses.remark(f"{beyond:.0%} of the actions are beyond the robot's range and are clipped")
    episodes = []
    for each, outcome in zip(found, _outcomes(path, found, options, losses), strict=True):
        check_unit(each.observations, robot, each.origin)
        episode = human_episode(
            each.observations,
            each.actions,
            recorded_with,
            rewards=outcome.rewards,
            solved=outcome.solved,
            **each.columns,
        )
        episode = replace(episode, info={**episode.info, **each.info})
        episode.check_fits(robot, each.origin)
        episodes.append(adapt(episode, claims, robot, options.agreement, losses))
    return episodes


def _outcomes(path: str, found: Sequence[ForeignEpisode], options: DemoOptions, losses: Losses) -> list[Outcome]:
    steps = [len(each.actions) for each in found]
    recorded = [each.outcome for each in found]
    if all(each.rewards is None and each.success is None for each in recorded):
        losses.remark(NO_SUCCESS)
        return [Outcome(np.zeros(n, np.float32), np.zeros(n, bool)) for n in steps]
    return judge_outcomes(recorded, steps, options, path, losses)
