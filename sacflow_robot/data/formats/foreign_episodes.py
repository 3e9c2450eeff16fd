"""Episodes of data sets from elsewhere that say no more than observations, actions and, at best, how it went.

Rewards that can be read in more than one way, and episodes that cannot be converted, raise DataError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from sacflow_robot.data.formats.adapt import adapt, follows_poses, robot_of_file
from sacflow_robot.data.formats.agreement import Claims, Controller, check_agreement, controller_of
from sacflow_robot.data.formats.checks import check_finite, check_unit
from sacflow_robot.data.formats.demonstrations import DemoOptions, Losses, human_episode
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError
from sacflow_robot.spec import FloatArray

NO_SUCCESS = "no success is recorded, and no episode counts as one"

_LOOKED_AT = 5  # episodes whose actions are looked at for what they mean
Kind = Literal["sparse", "-1/0", "dense", "zero", "absent"]

BoolArray = npt.NDArray[np.bool_]

_WAY_OUT = "give --reward sparse, --reward -1/0, or --reward dense --success-above X"


@dataclass(frozen=True)
class ForeignEpisode:
    """One episode of T steps as its data set has it."""

    origin: str  # names it in messages
    observations: dict[str, FloatArray]  # per key (T + 1, ...)
    actions: FloatArray  # (T, A), as recorded
    outcome: Recorded  # what is said of how it went
    columns: Mapping[str, Any] = field(default_factory=dict)  # columns of Episode that are known besides
    info: Mapping[str, Any] = field(default_factory=dict)  # what describes the whole episode

    def __post_init__(self) -> None:
        check_finite(self.actions, self.origin, "its actions")
        for key, rows in self.observations.items():
            check_finite(rows, self.origin, f"the observation {key!r}")


def make_episodes(
    path: str, found: Sequence[ForeignEpisode], claims: Claims, options: DemoOptions, losses: Losses
) -> list[Episode]:
    """The episodes as the robot and task would have them."""
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


class Recorded(NamedTuple):
    """Outcome of one episode of T steps, as a file says; None where it says nothing."""

    rewards: FloatArray | None = None  # (T,)
    success: BoolArray | None = None  # which steps solved the task (T,), by the file itself
    dones: BoolArray | None = None  # which steps ended the episode (T,)
    # tells which of the T states before each action are solved (T,), by the task's own simulator; None where it does
    # not know such states
    solved_states: Callable[[], BoolArray | None] | None = None


class Outcome(NamedTuple):
    """Outcome of the steps of one episode."""

    rewards: FloatArray  # (T,) float32, as the task gives them
    solved: BoolArray  # which steps solved the task (T,)


def judge_outcomes(
    recorded: Sequence[Recorded],
    steps: Sequence[int],
    options: DemoOptions,
    origin: str,
    losses: Losses,
    shaped: bool | None = None,
) -> list[Outcome]:
    """The outcome of each episode of one file; what was assumed goes to the losses."""
    if recorded and all(each.success is not None for each in recorded):
        return [_by_success(each, losses) for each in recorded]
    kind = reward_kind([each.rewards for each in recorded], shaped)
    stated = options.agreement.reward
    if kind == "absent" or (kind in ("zero", "dense") and stated == "auto"):
        untold = _dense if kind == "dense" else partial(_without_rewards, kind)
        return [untold(each, count, options, origin, losses) for each, count in zip(recorded, steps, strict=True)]
    remark = f"as --reward {stated} says" if stated != "auto" else _REMARKS[kind]
    kind = kind if stated == "auto" else stated
    above = (options.agreement.success_above or 0.0) if kind == "dense" else 0.0
    return [
        _replaced(each, _rewards(each) >= 0 if kind == "-1/0" else _rewards(each) > above, losses, remark)
        for each in recorded
    ]


_REMARKS = {
    "-1/0": "rewards of -1/0: solved where they are 0",
    "sparse": "sparse rewards of another scale",
}


def reward_kind(rewards: Sequence[FloatArray | None], shaped: bool | None = None) -> Kind:
    """Kind of a file's rewards, told from the values of all of its episodes and whether it says that they are shaped."""
    known = [each for each in rewards if each is not None]
    if len(known) < len(rewards) or not known:
        return "absent"
    values = np.unique(np.concatenate(known))
    if not values.any():
        return "zero"
    if values[-1] > 0 and ((len(values) == 2 and values[0] == 0) or all(len(each) == 1 for each in known)):
        return "dense" if shaped and values[-1] != 1 else "sparse"
    if np.isin(values, (-1, 0)).all():
        return "-1/0"
    return "dense"


def _rewards(each: Recorded) -> FloatArray:
    assert each.rewards is not None  # their kind was told
    return each.rewards


def _replaced(each: Recorded, solved: BoolArray, losses: Losses, remark: str) -> Outcome:
    """Rewards of 1 where solved; said, unless they are that already."""
    rewards = solved.astype(np.float32)
    if not np.array_equal(rewards, _rewards(each)):
        losses.remark(f"{remark}; rewards become 1 where solved, else 0")
    return Outcome(rewards, solved)


def _by_success(each: Recorded, losses: Losses) -> Outcome:
    assert each.success is not None
    solved = each.success.astype(bool)
    if each.rewards is not None and not np.array_equal(each.rewards, solved):
        losses.remark("the file's success flags replace its rewards")
    return Outcome(solved.astype(np.float32), solved)


def _by_states(each: Recorded, steps: int, *, dones: bool, losses: Losses) -> BoolArray | None:
    """Steps that led to a solved state; the state after the last step is not in a file, so ``dones`` may stand for it."""
    states = None if each.solved_states is None else each.solved_states()
    if states is None:
        return None
    solved = np.append(states[1:], states[-1:])
    if dones and not solved.any() and each.dones is not None and each.dones[-1]:
        losses.remark("whether an episode's last step solved the task is taken from dones, no state follows it")
        solved = np.arange(steps) == steps - 1
    return solved


def _dense(each: Recorded, steps: int, options: DemoOptions, origin: str, losses: Losses) -> Outcome:
    if not options.sparse_rewards:
        return Outcome(_rewards(each), np.zeros(steps, bool))
    solved = _by_states(each, steps, dones=True, losses=losses)
    if solved is None:
        raise DataError(
            f"{origin} has dense rewards, which do not tell when the task was solved; {_WAY_OUT}, or read it where the "
            f"simulator can tell from its states"
        )
    return _replaced(each, solved, losses, "dense rewards: success is told from the simulator's states")


def _without_rewards(
    kind: Kind, each: Recorded, steps: int, options: DemoOptions, origin: str, losses: Losses
) -> Outcome:
    what = "no rewards" if kind == "absent" else "rewards that are all 0"
    solved = _by_states(each, steps, dones=kind == "absent", losses=losses)
    if solved is not None and (kind == "absent" or solved.any()):
        losses.remark(f"{what}: success is told from the simulator's states")
    elif kind == "zero" or not options.sparse_rewards:
        losses.remark(
            f"{what}: no episode counts as a success"
            + (" (if 0 means solved, give --reward -1/0)" if kind == "zero" else "")
        )
        solved = np.zeros(steps, bool)
    elif each.dones is not None and each.dones.any():
        losses.remark("no rewards: success is taken from dones")
        solved = each.dones.astype(bool)
    else:
        raise DataError(
            f"{origin} has no rewards, no states that tell when the task was solved, and no dones; add rewards or dones "
            f"(1 where a step solved the task)"
        )
    return Outcome(solved.astype(np.float32), solved)
