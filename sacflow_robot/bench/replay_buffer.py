"""Measure chunk batches per second: the replay buffer beside a plain NumPy gather and robomimic's own loader.

The buffer and the gathers hold the same steps and take turns, many short ones each, so that whatever else the machine
does meets all of them; a rate is that of the median turn. robomimic's loader is thousands of times slower than one turn
and its workers would disturb the others, so it is measured after them, on the smallest number of steps.
"""

import contextlib
import io
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sacflow_robot.data.replay_buffer import ReplayBuffer
from sacflow_robot.episode import Episode
from sacflow_robot.spec import RobotSpec

BATCH, CHUNK = 256, 5
_CALLS = 50  # batches per turn; a turn must be short beside what disturbs it


def measure_buffers(robot: RobotSpec, steps: int, turns: int, folder: Path) -> list[dict[str, Any]]:
    """Batches of 256 windows of 5 steps per second: the replay buffer, in memory and in files under ``folder``, beside plain gathers from the same steps."""
    memory = ReplayBuffer(robot, CHUNK, 0.99, steps)
    files = ReplayBuffer(robot, CHUNK, 0.99, steps, folder)
    episodes = made_up_episodes(robot, steps)
    for episode in episodes:
        memory.append(episode)
        files.append(episode)
    flat = [robot.flatten(e.observations) for e in episodes]
    gather, take = _gathers(
        np.concatenate([rows[:-1] for rows in flat]),
        np.concatenate([rows[1:] for rows in flat]),
        np.concatenate([e.action for e in episodes]),
        np.concatenate([e.rewards for e in episodes]),
    )
    rngs = [np.random.default_rng(0) for _ in range(2)]
    sources: dict[str, Callable[[], object]] = {
        "buffer in memory": lambda: memory.sample(BATCH, rngs[0]),
        "buffer memory-mapped": lambda: files.sample(BATCH, rngs[1]),
        "numpy gather": gather,
        "numpy take": take,
    }
    times: dict[str, list[float]] = {name: [] for name in sources}
    order = np.random.default_rng(1)
    for turn in range(turns + turns // 10):
        for name in order.permutation(list(sources)):  # nobody always follows the same one, which would leave its cache
            sources[name]()
            spent = timeit.timeit(sources[name], number=_CALLS)
            if turn >= turns // 10:  # the first ones warm up
                times[name].append(spent / _CALLS)
    return [_row(name, len(memory), float(1 / np.median(t))) for name, t in times.items()]


def _row(source: str, steps: int, rate: float) -> dict[str, Any]:
    return {"source": source, "steps": steps, "batches_per_s": round(rate, 1)}


def _gathers(
    observation: Any, next_observation: Any, action: Any, reward: Any
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The least that has to be copied for a batch, with no heed to where episodes end: by indexing and by ``take``."""
    rng, offsets, starts = np.random.default_rng(0), np.arange(CHUNK), len(reward) - CHUNK + 1

    def gather() -> object:
        index = rng.integers(starts, size=BATCH)
        return observation[index], next_observation[index], action[index[:, None] + offsets], reward[index]

    def take() -> object:
        index = rng.integers(starts, size=BATCH)
        actions = action.take(index[:, None] + offsets, axis=0)
        return observation.take(index, axis=0), next_observation.take(index, axis=0), actions, reward.take(index)

    return gather, take


def measure_robomimic(robot: RobotSpec, steps: int, seconds: float) -> list[dict[str, Any]]:
    """robomimic's SequenceDataset behind a DataLoader, in the ways that it recommends for low-dimensional data.

    Raises:
        ModuleNotFoundError: robomimic, or something that it needs, is not installed.
    """
    rows = []
    quiet = io.StringIO()  # robomimic prints to stdout, which is for the result
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        from robomimic.utils import obs_utils
        from robomimic.utils.dataset import SequenceDataset
        from torch.utils.data import DataLoader

        from sacflow_robot.data.formats import hdf5
        from sacflow_robot.data.formats.demonstrations import DemoSet

        path = Path(folder) / "steps.hdf5"
        env_args = {"env_name": "", "type": 1, "env_kwargs": {}}
        hdf5.write(path, DemoSet(robot, made_up_episodes(robot, steps), env_args))
        keys = [a.key for a in robot.observations]
        obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": keys}})
        for cache in ("all", "low_dim"):
            dataset = SequenceDataset(
                str(path), keys, ("actions", "rewards", "dones"), seq_length=CHUNK, hdf5_cache_mode=cache
            )
            for workers in (0, 2):
                loader = DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=workers)
                name = f"robomimic, cache {cache}, {workers} workers"
                rows.append(_row(name, len(dataset), _loader_rate(loader, seconds)))
    return rows


def _loader_rate(loader: Any, seconds: float) -> float:
    """Batches per second over whole epochs, each from its first batch, so that starting workers does not count."""
    counted, spent = 0, 0.0
    while spent < seconds:
        batches = iter(loader)
        first = next(batches)
        assert first["actions"].shape[:2] == (BATCH, CHUNK)
        began = time.perf_counter()
        counted += sum(1 for _ in batches)
        spent += time.perf_counter() - began
    return counted / spent


def made_up_episodes(robot: RobotSpec, steps: int) -> list[Episode]:
    """Random episodes of 60 to 120 steps, as long as those of robosuite's tasks, together just short of ``steps``."""
    rng = np.random.default_rng(0)
    episodes, left = [], steps
    while left >= (length := int(rng.integers(60, 121))):
        actions = rng.uniform(-1, 1, (length, robot.action_dim)).astype(np.float32)
        last = np.arange(length) == length - 1
        episodes.append(
            Episode(
                observations={
                    a.key: rng.standard_normal((length + 1, *a.shape), np.float32) for a in robot.observations
                },
                action=actions,
                policy_action=actions,
                measured=actions,
                source=np.zeros(length, np.uint8),
                rewards=last.astype(np.float32),
                terminated=last,
                truncated=np.zeros(length, np.bool_),
                time_ns=np.arange(length + 1) * robot.period_ns,
            )
        )
        left -= length
    return episodes
