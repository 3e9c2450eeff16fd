import os
import resource
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sacflow_robot.data.replay_buffer import ChunkBatch, Origin, ReplayBuffer
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, UsageError
from sacflow_robot.spec import RobotSpec

MakeEpisode = Callable[..., Episode]
H, GAMMA = 5, 0.9
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)


@relaxed
@given(episodes=st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=12))
def test_windows_stay_within_their_episode_and_the_ring(
    make_episode: MakeEpisode, robot: RobotSpec, episodes: list[tuple[int, bool]]
) -> None:
    made = [make_episode(steps, success=success, seed=i) for i, (steps, success) in enumerate(episodes)]
    buffer = ReplayBuffer(robot, H, GAMMA, capacity=30)
    for episode in made:
        buffer.append(episode)
    assert 0 < len(buffer) <= 30
    batch = buffer.sample(200, np.random.default_rng(0))
    for row in range(200):
        start, which = int(batch.observation[row, 0]), int(batch.observation[row, 1])
        episode = made[which]
        valid = min(H, len(episode) - start)
        assert batch.valid[row].tolist() == [j < valid for j in range(H)]
        assert np.array_equal(batch.actions[row, :valid], episode.action[start : start + valid])
        assert (np.abs(batch.actions[row, valid:]) <= 1).all()
        assert batch.next_observation[row, 0] == start + valid
        assert batch.next_observation[row, 1] == which
        reaches_end = start + valid == len(episode)
        assert batch.critic_valid[row] == (episode.success or valid == H)
        assert batch.solved[row] == episode.success
        # The discount once in the reward sum, once in the bootstrap, and no bootstrap after success.
        expected = GAMMA ** (len(episode) - 1 - start) if episode.success and reaches_end else 0.0
        assert batch.reward[row] == pytest.approx(expected)
        assert batch.discount[row] == pytest.approx(0.0 if episode.success and reaches_end else GAMMA**valid)


@dataclass
class _Plain:
    """What the buffer must do, in the plainest way: a table from rows to steps, windows put together one by one."""

    robot: RobotSpec
    capacity: int
    rows: dict[int, tuple[Episode, int]] = field(default_factory=dict)
    head: int = 0
    kept: int = 0

    def append(self, episode: Episode, keep: bool) -> None:
        steps = len(episode)
        if self.head + steps > self.capacity:
            self._forget(range(self.head, self.capacity))
            self.head = self.kept
        taken = range(self.head, self.head + steps)
        self._forget(taken)
        self.rows |= {row: (episode, step) for step, row in enumerate(taken)}
        self.head += steps
        self.kept += steps * keep

    def _forget(self, rows: range) -> None:
        """Whole episodes."""
        gone = {id(self.rows[row][0]) for row in rows if row in self.rows}
        self.rows = {row: held for row, held in self.rows.items() if id(held[0]) not in gone}

    def sample(self, size: int, rng: np.random.Generator, share: float | None) -> ChunkBatch:
        rows = np.array(sorted(self.rows))
        if share is None or self.kept in (0, len(rows)):
            index = rows[rng.integers(len(rows), size=size)]
        else:
            first = round(share * size)
            index = np.append(
                rows[rng.integers(self.kept, size=first)],
                rows[self.kept + rng.integers(len(rows) - self.kept, size=size - first)],
            )
        actions = np.empty((size, H, self.robot.action_dim), np.float32)
        columns: list[tuple[object, ...]] = []
        for row, window in zip(index, actions, strict=True):
            episode, step = self.rows[row]
            valid = min(H, len(episode) - step)
            window[valid:] = rng.uniform(-1, 1, (H - valid, self.robot.action_dim))
            window[:valid] = episode.action[step : step + valid]
            rewards = episode.rewards[step : step + valid].astype(np.float64)
            ended = episode.success and step + valid == len(episode)
            flat = self.robot.flatten(episode.observations)
            columns.append(
                (
                    flat[step],
                    np.arange(H) < valid,
                    np.float32(sum(GAMMA**j * r for j, r in enumerate(rewards))),
                    np.float32(0 if ended else GAMMA**valid),
                    flat[step + valid],
                    episode.success or valid == H,
                    episode.success,
                )
            )
        observation, mask, reward, discount, after, complete, solved = map(np.array, zip(*columns, strict=True))
        any_solved = any(episode.success for episode, _ in self.rows.values())
        return ChunkBatch(observation, actions, mask, reward, discount, after, complete, solved, any_solved)


def assert_same(a: ChunkBatch, b: ChunkBatch) -> None:
    for name in vars(a):
        x, y = np.asarray(getattr(a, name)), np.asarray(getattr(b, name))
        assert x.dtype == y.dtype and x.flags.c_contiguous and np.array_equal(x, y), name


@relaxed
@given(
    kept=st.lists(st.tuples(st.integers(1, 12), st.booleans()), max_size=3),
    collected=st.lists(st.tuples(st.integers(1, 12), st.booleans()), max_size=14),
    room=st.integers(12, 40),
    share=st.one_of(st.none(), st.floats(0, 1)),
    resumed_at=st.integers(0, 16),
)
def test_every_number_is_that_of_a_plain_implementation(
    make_episode: MakeEpisode,
    robot: RobotSpec,
    tmp_path: Path,
    kept: list[tuple[int, bool]],
    collected: list[tuple[int, bool]],
    room: int,
    share: float | None,
    resumed_at: int,
) -> None:
    """In memory, in files, and after going on from a saved state; the generator is left where it is expected, too."""
    capacity = sum(steps for steps, _ in kept) + room
    plain = _Plain(robot, capacity)
    memory, files, resumed = (ReplayBuffer(robot, H, GAMMA, capacity, folder) for folder in (None, tmp_path, tmp_path))
    rngs = [np.random.default_rng(0) for _ in range(4)]
    for i, (steps, success) in enumerate(kept + collected):
        episode, keep = make_episode(steps, success=success, seed=i), i < len(kept)
        if i == resumed_at:
            resumed = ReplayBuffer(robot, H, GAMMA, capacity, tmp_path)
            resumed.load_state_dict(files.state_dict())
        plain.append(episode, keep)
        for buffer in (memory, files, resumed):
            buffer.append(episode, Origin.DEMOS if keep else Origin.COLLECTED)
        assert len(memory) == len(plain.rows) <= capacity and memory.kept_steps == plain.kept
        expected = plain.sample(9, rngs[0], share)
        for buffer, rng in zip((memory, files, resumed), rngs[1:], strict=True):
            assert_same(buffer.sample(9, rng, None if share is None else {Origin.DEMOS: share}), expected)
            assert rng.bit_generator.state == rngs[0].bit_generator.state
        flat = [robot.flatten(e.observations)[step] for _, (e, step) in sorted(plain.rows.items())]
        assert np.array_equal(files.observations(), np.array(flat))


DEMOS, REPLAY, COLLECTED = Origin


@pytest.mark.parametrize(
    ("shares", "held", "expected"),
    [
        ({DEMOS: 0.5}, (20, 0, 300), (128, 0, 128)),
        ({DEMOS: 0.5, REPLAY: 0.25}, (20, 30, 300), (128, 64, 64)),
        ({DEMOS: 0.0, REPLAY: 0.0}, (20, 30, 300), (0, 0, 256)),
        ({DEMOS: 0.5}, (20, 100, 300), (128, 32, 96)),  # what is left, by their steps
        ({REPLAY: 0.0}, (100, 30, 300), (64, 0, 192)),
        ({DEMOS: 0.5, REPLAY: 0.25}, (20, 30, 0), (171, 85, 0)),  # an empty source's share goes to the others
        ({DEMOS: 0.25}, (20, 0, 0), (256, 0, 0)),
        ({DEMOS: 0.0, REPLAY: 0.0}, (30, 90, 0), (64, 192, 0)),
        ({DEMOS: 1.0}, (20, 30, 300), (256, 0, 0)),
    ],
)
def test_shares_hold_in_every_batch(
    make_episode: MakeEpisode,
    robot: RobotSpec,
    shares: dict[Origin, float],
    held: tuple[int, ...],
    expected: tuple[int, ...],
) -> None:
    buffer = ReplayBuffer(robot, H, GAMMA, capacity=500)
    for origin in Origin:
        for _ in range(held[origin] // 10):
            buffer.append(make_episode(10, seed=int(origin)), origin)
    for seed in range(3):
        drawn = buffer.sample(256, np.random.default_rng(seed), shares).observation[:, 1]
        assert drawn.tolist() == [origin for origin in Origin for _ in range(expected[origin])]


def test_demonstrations_are_never_evicted(make_episode: MakeEpisode, robot: RobotSpec) -> None:
    buffer = ReplayBuffer(robot, H, GAMMA, capacity=40)
    for seed in range(3):
        buffer.append(make_episode(6, seed=seed), Origin.DEMOS)
    for seed in range(3, 60):
        buffer.append(make_episode(1 + seed % 9, seed=seed))
        drawn = {int(o[1]) for o in buffer.sample(1000, np.random.default_rng(seed)).observation}
        assert {0, 1, 2, seed} <= drawn
    assert 18 < len(buffer) <= 40 and buffer.kept_steps == 18
    for origin in (DEMOS, REPLAY):
        with pytest.raises(UsageError, match="comes too late: demonstrations enter first"):
            buffer.append(make_episode(1), origin)
    with pytest.raises(UsageError, match="23 steps does not fit a replay buffer of 40 beside 18 steps that it keeps"):
        buffer.append(make_episode(23))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_files_take_their_room_at_once_and_leave_no_name(
    robot: RobotSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mapped_bytes() -> int:
        maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
        ends = [line[0].split("-") for line in maps if len(line) > 5 and str(tmp_path) in line[5]]
        return sum(int(high, 16) - int(low, 16) for low, high in ends)

    memmap, taken = np.memmap, []

    def watch(file: Any, *args: Any, **kwargs: Any) -> Any:
        taken.append(os.fstat(file.fileno()).st_blocks * 512)
        return memmap(file, *args, **kwargs)

    monkeypatch.setattr(np, "memmap", watch)
    buffer = ReplayBuffer(robot, H, GAMMA, 100_000, tmp_path)
    size = ReplayBuffer.size_bytes(robot, H, 100_000)
    assert size == sum(a.nbytes for a in buffer._columns.values()) > 19e6
    assert sum(taken) >= size, "the disk has given the blocks before anything is written"
    assert 0 <= mapped_bytes() - size < len(taken) * 4096
    assert list(tmp_path.iterdir()) == []
    del buffer
    assert mapped_bytes() == 0


def test_a_disk_without_room_is_one_line_before_anything_is_learned(robot: RobotSpec, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(DataError, match=r"^no room for the replay buffer's 0.0194 GB in .* lower --replay-cap"):
            ReplayBuffer(robot, H, GAMMA, 100_000, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match=r"no room .* \(No such file or directory\)"):
        ReplayBuffer(robot, H, GAMMA, 10, tmp_path / "absent")


def test_every_step_is_drawn_and_the_oldest_episodes_leave_first(make_episode: MakeEpisode, robot: RobotSpec) -> None:
    buffer = ReplayBuffer(robot, H, GAMMA, capacity=20)
    for seed in range(4):
        buffer.append(make_episode(8, seed=seed))
    batch = buffer.sample(2000, np.random.default_rng(1))
    drawn = {(int(o[1]), int(o[0])) for o in batch.observation}
    assert drawn == {(seed, step) for seed in (2, 3) for step in range(8)}
    assert buffer.episode_count == 2


@relaxed
@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=12), last=st.integers(1, 30), kept=st.integers(0, 2))
def test_the_newest_steps_can_be_given_a_share_of_their_own(
    make_episode: MakeEpisode, robot: RobotSpec, lengths: list[int], last: int, kept: int
) -> None:
    buffer = ReplayBuffer(robot, H, GAMMA, capacity=30)
    for seed in range(kept):
        buffer.append(make_episode(3, seed=100 + seed), Origin.DEMOS)
    collected = []
    for seed, steps in enumerate(lengths):
        buffer.append(make_episode(steps, seed=seed))
        collected += [(seed, step) for step in range(steps)]
    batch = buffer.sample(400, np.random.default_rng(1), newest=(last, 0.75))
    drawn = {(int(o[1]), int(o[0])) for o in batch.observation[100:]}
    assert drawn <= set(collected[-last:])
    held = collected[-(len(buffer) - buffer.kept_steps) :]
    assert len(batch.observation) == 400 and drawn <= set(held)
    if min(last, len(held)) <= 8:  # few enough for 300 draws to find each
        assert drawn == set(held[-last:])
    with_none = buffer.sample(64, np.random.default_rng(3), newest=(0, 0.5))
    assert np.array_equal(with_none.observation, buffer.sample(64, np.random.default_rng(3)).observation)


def test_filler_after_the_end_is_random(make_episode: MakeEpisode, robot: RobotSpec) -> None:
    buffer = ReplayBuffer(robot, H, GAMMA, capacity=20)
    buffer.append(make_episode(1))
    batch = buffer.sample(50, np.random.default_rng(1))
    assert len(np.unique(batch.actions[:, 1, 0])) == 50


def test_going_on_from_a_saved_state_draws_the_same(make_episode: MakeEpisode, robot: RobotSpec) -> None:
    first, second = (ReplayBuffer(robot, H, GAMMA, capacity=40) for _ in range(2))
    for seed in range(6):
        first.append(make_episode(9, seed=seed, success=seed % 2 == 0))
    second.load_state_dict(first.state_dict())
    for buffer in (first, second):
        buffer.append(make_episode(7, seed=9))
    a, b = (buffer.sample(64, np.random.default_rng(3)) for buffer in (first, second))
    for name in vars(a):
        assert np.array_equal(getattr(a, name), getattr(b, name))


def test_actions_beyond_the_bounds_are_refused(make_episode: MakeEpisode, robot: RobotSpec) -> None:
    episode = make_episode(3)
    buffer = ReplayBuffer(robot, H, GAMMA, capacity=5)
    with pytest.raises(DataError, match="beyond the robot's bounds"):
        buffer.append(replace(episode, action=episode.policy_action))


def test_bad_use(make_episode: MakeEpisode, robot: RobotSpec) -> None:
    buffer = ReplayBuffer(robot, H, GAMMA, capacity=5)
    with pytest.raises(DataError, match="empty"):
        buffer.sample(1, np.random.default_rng(0))
    with pytest.raises(DataError, match="empty"):
        buffer.observations()
    with pytest.raises(UsageError, match="6 steps does not fit a replay buffer of 5"):
        buffer.append(make_episode(6))
