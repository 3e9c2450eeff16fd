"""Replay buffer of whole episodes, sampled as chunks of H actions."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, UsageError
from sacflow_robot.spec import ArmSpec, FloatArray


@dataclass(frozen=True)
class ChunkBatch:
    """B windows of H steps; H actions a_t ... a_{t+H-1} chosen at observation t.

    Attributes:
        observation: At the window's start (B, O), flattened in spec order, not normalised.
        actions: Commanded actions (B, H, A); rows past the episode's end hold random filler.
        valid: Which rows of ``actions`` belong to the episode (B, H), bool.
        reward: Discounted reward sum over the window's valid steps (B,).
        discount: What the value after the window is worth (B,): gamma^H, or 0 if the task ended within the window.
        next_observation: After the window's last valid step (B, O).
        critic_valid: Whether the window has a defined return (B,), bool: it is complete, or the task ended in it.
    """

    observation: FloatArray
    actions: FloatArray
    valid: npt.NDArray[np.bool_]
    reward: FloatArray
    discount: FloatArray
    next_observation: FloatArray
    critic_valid: npt.NDArray[np.bool_]


class ReplayBuffer:
    """Ring of whole episodes.

    Every step of every episode starts a window. A window never crosses its episode's end, nor the write head, because
    episodes enter and leave whole. A window cut short by the task's end is complete for the critic (nothing after it
    counts), and its missing actions are uniform noise, so that the critic learns that they do not matter. A window
    cut short by a truncation has no return (its last actions were never tried): the critic skips it, imitation uses
    its valid rows. The states of those last H - 1 steps are then never a window's start for the critic, yet windows end
    in them and bootstrap from their value; that value is learned from the same states in other episodes, where they are
    not the last, since a truncation happens by the clock and not by anything in the state. Reward sums and discounts are
    computed once, when an episode enters.

    Args:
        arm: Arm whose episodes it holds.
        chunk_length: H.
        discount: gamma per step; used here and nowhere else.
        capacity: Steps held at most.
    """

    def __init__(self, arm: ArmSpec, chunk_length: int, discount: float, capacity: int) -> None:
        self._arm, self._h, self._gamma, self._capacity = arm, chunk_length, discount, capacity
        shape = (capacity, arm.observation_dim)
        self._columns = {
            "observation": np.zeros(shape, np.float32),
            "next_observation": np.zeros(shape, np.float32),
            "action": np.zeros((capacity, arm.action_dim), np.float32),
            "reward": np.zeros(capacity, np.float32),
            "discount": np.zeros(capacity, np.float32),
            "length": np.zeros(capacity, np.int32),  # valid steps of the window that starts here; 0: no step here
            "critic_valid": np.zeros(capacity, bool),
        }
        self._episodes: deque[tuple[int, int]] = deque()  # (first row, steps), oldest first
        self._head = 0
        self._starts: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        """Steps held."""
        return sum(steps for _, steps in self._episodes)

    @property
    def episode_count(self) -> int:
        return len(self._episodes)

    def append(self, episode: Episode) -> None:
        """Add a whole episode, evicting the oldest ones that are in its way.

        Raises:
            DataError: The episode does not fit the arm.
            UsageError: The episode is longer than the buffer.
        """
        episode.check_fits(self._arm, "replay buffer")
        steps = len(episode)
        low, high = self._arm.action_bounds
        if (episode.commanded < low).any() or (episode.commanded > high).any():
            raise DataError("an episode's actions are beyond the arm's bounds; log what was commanded, after clipping")
        if steps > self._capacity:
            raise UsageError(
                f"an episode of {steps} steps does not fit a replay buffer of {self._capacity}; enlarge it"
            )
        if self._head + steps > self._capacity:
            self._evict(self._head, self._capacity)
            self._head = 0
        self._evict(self._head, self._head + steps)

        rows = slice(self._head, self._head + steps)
        flat = self._arm.flatten(episode.observations)
        length = np.minimum(self._h, np.arange(steps, 0, -1))
        ended = bool(episode.terminated[-1])
        reaches_end = np.arange(steps) + length == steps
        reward = np.zeros(steps, np.float64)
        for j in range(min(self._h, steps)):
            reward[: steps - j] += self._gamma**j * episode.rewards[j:]
        columns = self._columns
        columns["observation"][rows] = flat[:-1]
        columns["next_observation"][rows] = flat[np.arange(steps) + length]
        columns["action"][rows] = episode.commanded
        columns["reward"][rows] = reward
        columns["discount"][rows] = np.where(ended & reaches_end, 0.0, self._gamma**length)
        columns["length"][rows] = length
        columns["critic_valid"][rows] = ended | (length == self._h)
        self._episodes.append((self._head, steps))
        self._head += steps
        self._starts = None

    def sample(self, batch_size: int, rng: np.random.Generator) -> ChunkBatch:
        """Draw windows uniformly from all steps held.

        Raises:
            DataError: The buffer is empty.
        """
        if self._starts is None:
            self._starts = np.flatnonzero(self._columns["length"])
        if len(self._starts) == 0:
            raise DataError("the replay buffer is empty; give demonstrations or a log to train on")
        index = self._starts[rng.integers(len(self._starts), size=batch_size)]
        columns = self._columns
        offset = np.arange(self._h)
        valid = offset < columns["length"][index, None]
        actions = columns["action"][np.where(valid, index[:, None] + offset, 0)]
        filler = rng.uniform(-1, 1, actions.shape).astype(np.float32)
        return ChunkBatch(
            observation=columns["observation"][index],
            actions=np.where(valid[..., None], actions, filler),
            valid=valid,
            reward=columns["reward"][index],
            discount=columns["discount"][index],
            next_observation=columns["next_observation"][index],
            critic_valid=columns["critic_valid"][index],
        )

    def observations(self) -> FloatArray:
        """All observations held (N, O), for fitting a normaliser.

        Raises:
            DataError: The buffer is empty.
        """
        if not self._episodes:
            raise DataError("the replay buffer is empty; give demonstrations or a log to train on")
        return self._columns["observation"][self._columns["length"] > 0]

    def state_dict(self) -> dict[str, npt.NDArray[np.generic]]:
        """Everything needed to go on as if never interrupted; rows in use only."""
        used = max((first + steps for first, steps in self._episodes), default=0)
        state: dict[str, npt.NDArray[np.generic]] = {k: v[:used].copy() for k, v in self._columns.items()}
        state["episodes"] = np.array(self._episodes, np.int64).reshape(-1, 2)
        state["head"] = np.array(self._head)
        return state

    def load_state_dict(self, state: dict[str, npt.NDArray[np.generic]]) -> None:
        """Take over what :meth:`state_dict` returned."""
        for name, column in self._columns.items():
            column[: len(state[name])] = state[name]
        self._episodes = deque((int(first), int(steps)) for first, steps in state["episodes"])
        self._head = int(state["head"])
        self._starts = None

    def _evict(self, low: int, high: int) -> None:
        """Drop the episodes that overlap rows [low, high); the oldest come first in the ring."""
        kept = deque((f, n) for f, n in self._episodes if f >= high or f + n <= low)
        for first, steps in self._episodes:
            if first < high and first + steps > low:
                self._columns["length"][first : first + steps] = 0
        self._episodes = kept
