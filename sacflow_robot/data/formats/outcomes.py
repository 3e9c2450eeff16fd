"""Tell which steps of a recorded episode solved its task, from the rewards or whatever else its file keeps.

Files keep rewards of four kinds: sparse (1 once solved, else 0), -1/0 (0 once solved, else -1), dense (shaped, positive
on the way), or none. The tasks here reward 1 once solved and 0 before, so that all of them become that, and what was
assumed is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from sacflow_robot.data.formats.demonstrations import DemoOptions, Losses
from sacflow_robot.errors import DataError
from sacflow_robot.spec import FloatArray

Kind = Literal["sparse", "-1/0", "dense", "zero", "absent"]

BoolArray = npt.NDArray[np.bool_]

_WAY_OUT = "give --reward sparse, --reward -1/0, or --reward dense --success-above X"


class Recorded(NamedTuple):
    """Outcome of one episode of T steps, as a file says; None where it says nothing.

    Attributes:
        rewards: (T,).
        success: Which steps solved the task (T,), by the file itself.
        dones: Which steps ended the episode (T,).
        solved_states: Tells which of the T states before each action are solved (T,), by the task's own simulator; None
            where it does not know such states.
    """

    rewards: FloatArray | None = None
    success: BoolArray | None = None
    dones: BoolArray | None = None
    solved_states: Callable[[], BoolArray | None] | None = None


class Outcome(NamedTuple):
    """Outcome of the steps of one episode.

    Attributes:
        rewards: (T,) float32, as the task gives them.
        solved: Which steps solved the task (T,).
    """

    rewards: FloatArray
    solved: BoolArray


def judge_outcomes(
    recorded: Sequence[Recorded],
    steps: Sequence[int],
    options: DemoOptions,
    origin: str,
    losses: Losses,
    shaped: bool | None = None,
) -> list[Outcome]:
    """The outcome of each episode of one file; what was assumed goes to the losses.

    Args:
        recorded: What the file says of each episode.
        steps: T of each episode.
        options: How to read the file.
        origin: Names it in messages.
        losses: Takes the remarks.
        shaped: Whether the file says that its rewards are shaped.

    Raises:
        DataError: The rewards can be read in more than one way, and nothing else in the file decides.
    """
    if recorded and all(each.success is not None for each in recorded):
        return [_by_success(each, losses) for each in recorded]
    kind = reward_kind([each.rewards for each in recorded], shaped)
    stated = options.agreement.reward
    if kind == "absent" or (kind == "zero" and stated == "auto"):
        return [
            _without_rewards(each, count, kind, options, origin, losses)
            for each, count in zip(recorded, steps, strict=True)
        ]
    if stated != "auto":
        solves = _STATED[stated]
        return [
            _replaced(each, solves(_rewards(each), options), losses, f"as --reward {stated} says") for each in recorded
        ]
    if kind == "dense":
        return [_dense(each, count, options, origin, losses) for each, count in zip(recorded, steps, strict=True)]
    if kind == "-1/0":
        return [
            _replaced(each, _rewards(each) >= 0, losses, "rewards of -1/0: solved where they are 0")
            for each in recorded
        ]
    return [_replaced(each, _rewards(each) > 0, losses, "sparse rewards of another scale") for each in recorded]


_STATED: dict[str, Callable[[FloatArray, DemoOptions], BoolArray]] = {
    "sparse": lambda rewards, _: rewards > 0,
    "-1/0": lambda rewards, _: rewards >= 0,
    "dense": lambda rewards, options: rewards > (options.agreement.success_above or 0.0),
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
    each: Recorded, steps: int, kind: Kind, options: DemoOptions, origin: str, losses: Losses
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
