"""Replay buffer of whole episodes, sampled as chunks of H actions."""

import math
import os
import tempfile
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, UsageError
from sacflow_robot.spec import FloatArray, RobotSpec

Layout = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]


class Origin(IntEnum):
    """Origin of an episode in the buffer. All but those collected are kept for good."""

    DEMOS = 0
    REPLAY = 1  # logs of earlier runs
    COLLECTED = 2


@dataclass(frozen=True)
class ChunkBatch:
    """B windows of H steps; H actions a_t ... a_{t+H-1} chosen at observation t."""

    observation: FloatArray  # at the window's start (B, O), flattened in spec order, not normalized
    actions: FloatArray  # commanded actions (B, H, A); rows past the episode's end hold random filler
    valid: npt.NDArray[np.bool_]  # which rows of ``actions`` belong to the episode (B, H), bool
    reward: FloatArray  # discounted reward sum over the window's valid steps (B,)
    # what the value after the window is worth (B,): gamma^H, or 0 if the task ended within the window
    discount: FloatArray
    next_observation: FloatArray  # after the window's last valid step (B, O)
    # whether the window has a defined return (B,), bool: it is complete, or the task ended in it
    critic_valid: npt.NDArray[np.bool_]
    solved: npt.NDArray[np.bool_]  # whether the window's episode was a success (B,), bool
    any_solved: bool = True  # whether the buffer that it was drawn from holds a success at all


class ReplayBuffer:
    """Whole episodes: first those that are kept for good (demonstrations, logs), then a ring of what a run collects.

    Every step of every episode starts a window. A window never crosses its episode's end, nor the write head, because
    episodes enter and leave whole. A window cut short by the task's end is complete for the critic (nothing after it
    counts), and its missing actions are uniform noise, so that the critic learns that they do not matter. A window
    cut short by a truncation has no return (its last actions were never tried): the critic skips it, imitation uses
    its valid rows. The states of those last H - 1 steps are then never a window's start for the critic, yet windows end
    in them and bootstrap from their value; that value is learned from the same states in other episodes, where they are
    not the last, since a truncation happens by the clock and not by anything in the state. Reward sums and discounts are
    computed once, when an episode enters.

    Args:
        robot: Robot whose episodes it holds.
        chunk_length: H.
        discount: gamma per step; used here and nowhere else.
        capacity: Steps held at most, those kept for good included.
        folder: Where to keep the steps on disk, memory-mapped; None keeps them in memory. The files take their whole
            size at once and have no names, so that they vanish with the buffer, or with its process however that ends.

    Raises:
        DataError: The folder's disk has no room for the files, or they cannot be made.
    """

    def __init__(
        self, robot: RobotSpec, chunk_length: int, discount: float, capacity: int, folder: Path | None = None
    ) -> None:
        self._robot = robot
        self._h = chunk_length
        self._gamma = discount
        self._capacity = capacity
        self._columns = _allocate(_layout(robot, chunk_length, capacity), folder)
        # The H actions from each row on as one opaque item: a gather copies each window in one piece.
        row_bytes = 4 * robot.action_dim
        window = np.dtype((np.void, chunk_length * row_bytes))
        self._windows: npt.NDArray[np.void] = np.ndarray(
            capacity, window, buffer=self._columns["action"].data, strides=(row_bytes,)
        )
        self._valid_by_length = np.arange(chunk_length) < np.arange(chunk_length + 1)[:, None]
        self._ends = [0, 0]  # rows where demonstrations end and where logs do; the ring is behind them
        self._kept_episodes = 0
        self._ring: deque[tuple[int, int]] = deque()  # (first row, steps), oldest first
        self._ring_steps = 0
        self._solved_episodes = 0
        self._head = 0

    @staticmethod
    def size_bytes(robot: RobotSpec, chunk_length: int, capacity: int) -> int:
        """Memory, or disk, that a buffer of that capacity takes once it is full."""
        return _size_bytes(_layout(robot, chunk_length, capacity))

    def __len__(self) -> int:
        """Steps held."""
        return self.kept_steps + self._ring_steps

    @property
    def kept_steps(self) -> int:
        """Steps held for good."""
        return self._ends[-1]

    @property
    def episode_count(self) -> int:
        return self._kept_episodes + len(self._ring)

    def append(self, episode: Episode, origin: Origin = Origin.COLLECTED) -> None:
        """Add a whole episode, evicting the oldest collected ones that are in its way.

        Args:
            episode: The episode.
            origin: Where it comes from; demonstrations enter first, then logs, then what is collected.

        Raises:
            DataError: The episode does not fit the robot.
            UsageError: The episode is longer than the ring, or comes after one of a later origin.
        """
        episode.check_fits(self._robot, "replay buffer")
        steps = len(episode)
        low, high = self._robot.action_bounds
        if (episode.action < low).any() or (episode.action > high).any():
            raise DataError(
                "an episode's actions are beyond the robot's bounds; log what was commanded, after clipping"
            )
        kept = self.kept_steps
        if (origin < Origin.COLLECTED and self._ring) or (origin == Origin.DEMOS and self._ends[0] < kept):
            raise UsageError("an episode comes too late: demonstrations enter first, then logs, then what is collected")
        if steps > self._capacity - kept:
            beside = f" beside {kept} steps that it keeps" if kept else ""
            raise UsageError(
                f"an episode of {steps} steps does not fit a replay buffer of {self._capacity}{beside}; enlarge it"
            )
        self._make_room(steps)
        self._write(slice(self._head, self._head + steps), episode)
        if origin == Origin.COLLECTED:
            self._ring.append((self._head, steps))
            self._ring_steps += steps
        else:
            self._ends[origin:] = [end + steps for end in self._ends[origin:]]
            self._kept_episodes += 1
        self._head += steps

    def sample(
        self,
        batch_size: int,
        rng: np.random.Generator,
        shares: Mapping[Origin, float] | None = None,
        newest: tuple[int, float] = (0, 0.0),
    ) -> ChunkBatch:
        """Draw windows.

        Args:
            batch_size: B.
            rng: Where the randomness comes from.
            shares: Share of the windows drawn from each origin named. The origins not named share what is left in
                proportion to their steps, and what an empty one cannot give is given by the others. The windows then
                come in the order of their origins. Without shares they are drawn uniformly from all steps held.
            newest: So many steps collected last, and the share of the windows drawn from those alone, at the batch's end.

        Raises:
            DataError: The buffer is empty.
        """
        last, share = newest
        recent = round(share * batch_size) if last and self._ring else 0
        drawn = self._draw(batch_size - recent, rng, shares)
        if recent:
            drawn = np.concatenate([drawn, self._newest(rng.integers(min(last, self._ring_steps), size=recent))])
        index = self._rows(drawn)

        def rows_of(column: str) -> Any:
            return self._columns[column].take(index, axis=0, mode="clip")  # in range: clip does without the check

        valid = self._valid_by_length.take(rows_of("length"), axis=0)
        actions = self._windows[index].view(np.float32).reshape(batch_size * self._h, self._robot.action_dim)
        beyond = np.flatnonzero(~valid)
        actions[beyond] = rng.uniform(-1, 1, (len(beyond), self._robot.action_dim))
        return ChunkBatch(
            observation=rows_of("observation"),
            actions=actions.reshape(batch_size, self._h, -1),
            valid=valid,
            reward=rows_of("reward"),
            discount=rows_of("discount"),
            next_observation=rows_of("next_observation"),
            critic_valid=rows_of("critic_valid"),
            solved=rows_of("solved"),
            any_solved=self._solved_episodes > 0,
        )

    def observations(self) -> FloatArray:
        """All observations held (N, O), for fitting a normalizer; a view where they lie in one piece.

        Raises:
            DataError: The buffer is empty.
        """
        self._check_not_empty()
        column: FloatArray = self._columns["observation"]
        return column[self._rows(np.arange(len(self)))] if self._gap else column[: len(self)]

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Everything needed to go on as if never interrupted; rows in use only.

        The columns are views: write or copy them before the next episode enters.
        """
        used = max((first + steps for first, steps in self._ring), default=self.kept_steps)
        state: dict[str, npt.NDArray[Any]] = {name: column[:used] for name, column in self._columns.items()}
        state["ring"] = np.array(self._ring, np.int64).reshape(-1, 2)
        state["counters"] = np.array([self._head, self._kept_episodes, *self._ends])
        return state

    def load_state_dict(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Take over what :meth:`state_dict` returned."""
        for name, column in self._columns.items():
            column[: len(state[name])] = state[name]
        self._ring = deque((int(first), int(steps)) for first, steps in state["ring"])
        self._ring_steps = sum(steps for _, steps in self._ring)
        self._head, self._kept_episodes, *self._ends = map(int, state["counters"])
        solved = self._columns["solved"]
        self._solved_episodes = int(solved[: self.kept_steps].any()) + sum(
            int(solved[first]) for first, _ in self._ring
        )

    def _write(self, rows: slice, episode: Episode) -> None:
        steps, h = len(episode), self._h
        flat = self._robot.flatten(episode.observations)
        length = np.minimum(h, np.arange(steps, 0, -1))
        ended = bool(episode.terminated[-1])
        reaches_end = np.arange(steps) + length == steps
        reward = np.zeros(steps, np.float64)
        for j in range(min(h, steps)):
            reward[: steps - j] += self._gamma**j * episode.rewards[j:]
        columns = self._columns
        columns["observation"][rows] = flat[:-1]
        columns["next_observation"][rows] = flat[np.arange(steps) + length]
        columns["action"][rows] = self._robot.to_unit(episode.action)
        columns["reward"][rows] = reward
        columns["discount"][rows] = np.where(ended & reaches_end, 0.0, self._gamma**length)
        columns["length"][rows] = length
        columns["critic_valid"][rows] = ended | (length == h)
        columns["solved"][rows] = episode.success
        self._solved_episodes += episode.success

    def _make_room(self, steps: int) -> None:
        """Move the head to where that many steps fit, evicting the oldest episodes of the ring."""
        if self._head + steps > self._capacity:
            while self._ring and self._ring[0][0] >= self._head:
                self._evict_oldest()
            self._head = self.kept_steps
        while self._ring and self._head <= self._ring[0][0] < self._head + steps:
            self._evict_oldest()

    def _evict_oldest(self) -> None:
        first, steps = self._ring.popleft()
        self._ring_steps -= steps
        self._solved_episodes -= int(self._columns["solved"][first])

    @property
    def _gap(self) -> int:
        """Rows without a step between the head and the oldest episode, where that one lies behind the head."""
        return max(0, self._ring[0][0] - self._head) if self._ring else 0

    def _rows(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rows of the steps held, numbered in the order of their rows: [0, head), then from the gap's end on."""
        gap = self._gap
        return numbers + gap * (numbers >= self._head) if gap else numbers

    def _newest(self, ages: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Indices of collected steps by age, 0 the newest; wraps from the ring's start to its end."""
        numbers = self._head - 1 - ages
        return np.where(numbers >= self.kept_steps, numbers, numbers + self._ring_steps)

    def _draw(
        self, count: int, rng: np.random.Generator, shares: Mapping[Origin, float] | None
    ) -> npt.NDArray[np.int64]:
        """Numbers of that many steps."""
        self._check_not_empty()
        held = len(self)
        if not shares:
            return rng.integers(held, size=count)
        bounds = [0, *self._ends, held]
        steps = np.diff(bounds)
        named = np.array([origin in shares for origin in Origin])
        others = steps * ~named
        weights = np.array([shares.get(origin, 0.0) for origin in Origin]) * (steps > 0)
        if others.any():
            weights = weights + (1 - min(1.0, weights.sum())) * others / others.sum()
        weights = weights if weights.any() else steps
        cuts = np.rint(np.cumsum(weights) / weights.sum() * count).astype(int)
        counts = np.diff(cuts, prepend=0)
        return np.concatenate([rng.integers(bounds[i], bounds[i + 1], size=n) for i, n in enumerate(counts) if n])

    def _check_not_empty(self) -> None:
        if not len(self):
            raise DataError("the replay buffer is empty; give demonstrations or a log to train on")


def _layout(robot: RobotSpec, chunk_length: int, capacity: int) -> Layout:
    """Shape and type of each column."""
    real = np.dtype(np.float32)
    return {
        "observation": ((capacity, robot.observation_dim), real),
        "next_observation": ((capacity, robot.observation_dim), real),  # after the window, not after the step
        "action": ((capacity + chunk_length - 1, robot.action_dim), real),  # the last row's window needs rows behind it
        "reward": ((capacity,), real),
        "discount": ((capacity,), real),
        "length": ((capacity,), np.dtype(np.int32)),  # valid steps of the window that starts here
        "critic_valid": ((capacity,), np.dtype(np.bool_)),
        "solved": ((capacity,), np.dtype(np.bool_)),
    }


def _size_bytes(layout: Layout) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())


def _allocate(layout: Layout, folder: Path | None) -> dict[str, npt.NDArray[Any]]:
    """Columns of zeros, in memory or in files of the folder."""
    if folder is None:
        return {name: np.zeros(shape, dtype) for name, (shape, dtype) in layout.items()}
    try:
        return {name: _map(shape, dtype, folder) for name, (shape, dtype) in layout.items()}
    except OSError as error:
        raise DataError(
            f"no room for the replay buffer's {_size_bytes(layout) / 1e9:.3g} GB in {folder} ({error.strerror}); free "
            f"some, or lower --replay-capacity"
        ) from None


def _map(shape: tuple[int, ...], dtype: np.dtype[Any], folder: Path) -> npt.NDArray[Any]:
    """Zeros in a file without a name, its blocks taken from the disk now rather than in the middle of a run."""
    size = math.prod(shape) * dtype.itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        return np.asarray(np.memmap(file, dtype, "r+", shape=shape))
