"""Episodes from a policy on several simulated robots at once; training and evaluation both run on this."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Lock
from typing import Any

import numpy as np

from sacflow_robot.episode import NOMINAL_CLOCK, Episode, EpisodeBuilder, StepResult
from sacflow_robot.interfaces import VectorEnv
from sacflow_robot.spec import FloatArray
from sacflow_robot.utils.seeding import chunk_noise

Chunker = Callable[[dict[str, FloatArray], FloatArray], FloatArray]
"""Action chunks (B, H, A) from observations (B, ...) and noise (B, H, A); ``Policy.infer`` is one."""


class Rollouts:
    """Runs episodes on robots, a chunk per robot and round, so that the caller can compute while the robots move.

    The noise of the chunk chosen at step t is ``chunk_noise((H, A), seed, t)``, as in ``sacflow-robot run``, so that an
    episode depends on its seed and the policy, not on the robots beside it (but for what a policy's arithmetic does
    differently with another batch size).

    Args:
        envs: The robots.
        noise_shape: (H, A).
        seeds: Environment seeds, one per episode, taken as robots become idle; rollouts end when they do.
        part_steps: Steps of a part of an episode, for :meth:`take_parts`; None makes no parts.
    """

    def __init__(
        self, envs: VectorEnv, noise_shape: tuple[int, int], seeds: Iterable[int], part_steps: int | None = None
    ) -> None:
        self._envs = envs
        self._noise_shape = noise_shape
        self._seeds = iter(seeds)
        self._builders: dict[int, EpisodeBuilder] = {}
        self._latest: dict[int, StepResult] = {}
        self._infos: dict[int, Mapping[str, Any]] = {}
        self._current: dict[int, int] = {}
        self._chunks: dict[int, FloatArray] = {}
        self._part_steps = part_steps
        self._given: dict[int, int] = {}
        self._parts: list[Episode] = []

    def send(self, choose: Chunker) -> bool:
        """Start episodes on idle robots and send every robot its next chunk; False when no episode is left."""
        idle = [i for i in range(len(self._envs)) if i not in self._current]
        self._start(dict(zip(idle, self._seeds, strict=False)))
        envs = sorted(self._current)
        if not envs:
            return False
        observation = {
            k: np.stack([self._latest[i].observation[k] for i in envs]) for k in self._latest[envs[0]].observation
        }
        noise = np.stack([chunk_noise(self._noise_shape, self._current[i], len(self._builders[i])) for i in envs])
        self._chunks = dict(zip(envs, choose(observation, noise), strict=True))
        self._envs.send(self._chunks)
        return True

    def receive(self) -> tuple[int, list[Episode]]:
        """Wait for the robots; number of environment steps taken, and the episodes that ended."""
        steps, ended = 0, []
        for i, results in self._envs.receive().items():
            steps += len(results)
            for result, chosen in zip(results, self._chunks[i], strict=False):
                executed = chosen if result.action is None else result.action
                self._builders[i].add(result, executed, policy_action=chosen)
            self._latest[i] = results[-1]
            self._cut(i, results[-1].ended)
            if results[-1].ended:
                info: dict[str, Any] = {
                    "task": self._envs.spec.task, "clock": NOMINAL_CLOCK, "env_engine": self._envs.engine
                }  # fmt: skip
                episode = self._builders.pop(i).build(seed=self._current.pop(i), **info, **self._infos[i])
                ended.append(episode)
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
            i: {"seed": seed, "actions": self._builders[i].actions(self._noise_shape[1]), "given": self._given[i]}
            for i, seed in self._current.items()
        }

    def load_state_dict(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """Bring the robots back to where they were by playing the episodes in progress again, which is exact."""
        self._start({i: int(episode["seed"]) for i, episode in state.items()})
        self._chunks = {i: episode["actions"] for i, episode in state.items() if len(episode["actions"])}
        self._envs.send(self._chunks)
        part_steps, self._part_steps = self._part_steps, None
        self.receive()
        self._part_steps = part_steps
        self._given = {i: int(episode["given"]) for i, episode in state.items()}

    def _cut(self, robot: int, ended: bool) -> None:
        """Set a part aside if one is complete."""
        if self._part_steps is None:
            return
        first, length = self._given[robot], len(self._builders[robot])
        if length > first and (ended or length - first >= self._part_steps):
            self._parts.append(self._builders[robot].build(first))
            self._given[robot] = length

    def _start(self, starts: dict[int, int]) -> None:
        for i, start in self._envs.begin(starts).items():
            self._builders[i] = EpisodeBuilder(start, period_ns=self._envs.spec.period_ns)
            self._latest[i] = start
            self._infos[i] = start.info
            self._current[i] = starts[i]
            self._given[i] = 0


def rollout(
    envs: VectorEnv | Sequence[VectorEnv], noise_shape: tuple[int, int], choose: Chunker, seeds: Iterable[int]
) -> Iterator[Episode]:
    """Run one episode per seed, yielding episodes as they end (not in the order of the seeds).

    Several sets of robots run in a thread each; ``choose`` is then called from all of them.
    """
    if not isinstance(envs, Sequence):
        rollouts = Rollouts(envs, noise_shape, seeds)
        while rollouts.send(choose):
            yield from rollouts.receive()[1]
        return
    left, taking = iter(seeds), Lock()
    stop = False

    def seeds_left() -> Iterator[int]:
        while not stop:
            with taking:
                seed = next(left, None)
            if seed is None:
                return
            yield seed

    def run(each: VectorEnv) -> None:
        try:
            for episode in rollout(each, noise_shape, choose, seeds_left()):
                ended.put(episode)
            ended.put(None)
        except BaseException as error:  # raised by the generator below
            ended.put(error)

    ended: SimpleQueue[Episode | BaseException | None] = SimpleQueue()
    with ThreadPoolExecutor(len(envs), "rollout") as threads:
        try:
            for each in envs:
                threads.submit(run, each)
            running = len(envs)
            while running:
                item = ended.get()
                if isinstance(item, Episode):
                    yield item
                elif item is None:
                    running -= 1
                else:
                    raise item
        finally:
            stop = True
