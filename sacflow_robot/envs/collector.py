"""Episodes from a policy on several simulated robots at once; training and evaluation both run on this."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np

from sacflow_robot.envs.environment import Limiter
from sacflow_robot.envs.vector import make_vector_env
from sacflow_robot.episode import NOMINAL_CLOCK, Episode, EpisodeBuilder
from sacflow_robot.interfaces import VectorEnv
from sacflow_robot.spec import Engine, FloatArray
from sacflow_robot.utils.processes import core_count
from sacflow_robot.utils.seeding import chunk_noise

# Action chunks (B, H, A) from observations (B, ...) and noise (B, H, A); ``Policy.infer`` is one.
Chunker = Callable[[dict[str, FloatArray], FloatArray], FloatArray]


class Rollouts:
    """Runs episodes on robots, a chunk per robot and round, so that the caller can compute while the robots move.

    The noise of the chunk chosen at step t is ``chunk_noise((H, A), seed, t)``, as in ``sacflow-robot run``, so that an
    episode depends on its seed and the policy, not on the robots beside it (apart from rounding, which varies with the
    batch size).

    Args:
        seeds: Environment seeds, one per episode, taken as robots become idle; rollouts end when they do.
        part_steps: Steps of a part of an episode, for :meth:`take_parts`; None makes no parts.
    """

    def __init__(
        self, envs: VectorEnv, noise_shape: tuple[int, int], seeds: Iterable[int], part_steps: int | None = None
    ) -> None:
        self._envs = envs
        self._noise_shape = noise_shape
        self._seeds = iter(seeds)
        self._part_steps = part_steps
        self._running: dict[int, _Running] = {}
        self._chunks: dict[int, FloatArray] = {}
        self._parts: list[Episode] = []

    def send(self, choose: Chunker) -> bool:
        """Start episodes on idle robots and send every robot its next chunk; False when no episode is left."""
        idle = [i for i in range(len(self._envs)) if i not in self._running]
        self._start(dict(zip(idle, self._seeds, strict=False)))
        robots = sorted(self._running)
        if not robots:
            return False
        episodes = [self._running[i] for i in robots]
        seen = [episode.observation for episode in episodes]
        observation = {key: np.stack([each[key] for each in seen]) for key in seen[0]}
        noise = np.stack([chunk_noise(self._noise_shape, e.seed, len(e.builder)) for e in episodes])
        self._chunks = dict(zip(robots, choose(observation, noise), strict=True))
        self._envs.send(self._chunks)
        return True

    def receive(self) -> tuple[int, list[Episode]]:
        """Wait for the robots; number of environment steps taken, and the episodes that ended."""
        steps = 0
        ended = []
        for i, results in self._envs.receive().items():
            steps += len(results)
            episode = self._running[i]
            for result, chosen in zip(results, self._chunks[i], strict=False):
                executed = chosen if result.action is None else result.action
                episode.builder.add(result, executed, policy_action=chosen)
            episode.observation = results[-1].observation
            first, length = episode.parts_end, len(episode.builder)
            whole = results[-1].ended and length > first
            if self._part_steps is not None and (whole or length - first >= self._part_steps):
                self._parts.append(episode.builder.build(first))
                episode.parts_end = length
            if results[-1].ended:
                ended.append(episode.builder.build(**self._running.pop(i).info))
        return steps, ended

    def take_parts(self) -> list[Episode]:
        """Parts of episodes completed since the last call, for a learner that does not wait for an episode's end.

        The last step of a part is marked truncated where the episode goes on.
        """
        parts, self._parts = self._parts, []
        return parts

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """Episodes in progress, as seed, actions so far (T, A), and number of steps given out in parts, per robot."""
        return {
            i: {"seed": e.seed, "actions": e.builder.actions(self._noise_shape[1]), "given": e.parts_end}
            for i, e in self._running.items()
        }

    def load_state_dict(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """Bring the robots back to where they were by playing the episodes in progress again, which is exact."""
        self._start({i: int(episode["seed"]) for i, episode in state.items()})
        self._chunks = {i: episode["actions"] for i, episode in state.items() if len(episode["actions"])}
        self._envs.send(self._chunks)
        part_steps, self._part_steps = self._part_steps, None
        self.receive()
        self._part_steps = part_steps
        for i, episode in state.items():
            self._running[i].parts_end = int(episode["given"])

    def _start(self, starts: dict[int, int]) -> None:
        for i, start in self._envs.begin(starts).items():
            builder = EpisodeBuilder(start, period_ns=self._envs.spec.period_ns)
            info = {"task": self._envs.spec.task, "clock": NOMINAL_CLOCK, "env_engine": self._envs.engine, **start.info}
            self._running[i] = _Running(starts[i], builder, start.observation, {"seed": starts[i], **info})


@dataclass
class _Running:
    """An episode in progress."""

    seed: int  # its seed
    builder: EpisodeBuilder  # its steps so far
    observation: dict[str, FloatArray]  # the newest one
    info: dict[str, Any]  # to log of it
    parts_end: int = 0  # steps given out in parts


@contextmanager
def evaluation_envs(
    task: str, episodes: int, engine: Engine = "compiled", history: int = 0, limiter: Limiter | None = None
) -> Iterator[list[VectorEnv]]:
    """A robot for each core that has an episode, each by itself, so that no episode depends on another even in the last bit.

    ``engine``, ``history`` and ``limiter`` are those of ``make_vector_env``.
    """
    with ExitStack() as stack:
        envs: list[VectorEnv] = []
        for _ in range(min(episodes, core_count())):
            envs.append(make_vector_env(task, 1, engine, background=False, history=history, limiter=limiter))
            stack.callback(envs[-1].close)
        yield envs


def rollout(
    envs: VectorEnv | Sequence[VectorEnv], noise_shape: tuple[int, int], choose: Chunker, seeds: Iterable[int]
) -> Iterator[Episode]:
    """Run one episode per seed, yielding episodes as they end (not in the order of the seeds).

    Of several sets of robots each runs one episode at a time, in a thread of its own; ``choose`` is then called from all of
    them, and the episodes come in the order of the seeds.
    """
    if not isinstance(envs, Sequence):
        rollouts = Rollouts(envs, noise_shape, seeds)
        while rollouts.send(choose):
            yield from rollouts.receive()[1]
        return
    idle: SimpleQueue[VectorEnv] = SimpleQueue()
    for each in envs:
        idle.put(each)

    def run(seed: int) -> Episode:
        own = idle.get()
        try:
            return next(rollout(own, noise_shape, choose, [seed]))
        finally:
            idle.put(own)

    with ThreadPoolExecutor(len(envs), "rollout") as threads:
        yield from threads.map(run, seeds)
