"""The training loop: offline on demonstrations, then online on simulated robots.

Everything random comes from the agent's generator, the replay generator and the episodes' seeds, and robots and learner
meet at fixed points (a chunk per robot and round), so that a run depends on its configuration alone and one resumed from
its checkpoint goes on bit for bit on the same CPU.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sacflow_robot.data.formats.demonstrations import human_parts
from sacflow_robot.data.log.episode_writer import EpisodeWriter
from sacflow_robot.data.replay_buffer import Origin, ReplayBuffer
from sacflow_robot.envs.collector import Chunker, rollout
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, UsageError, one_line
from sacflow_robot.interfaces import VectorEnv
from sacflow_robot.learn.algorithms.registry import make_agent
from sacflow_robot.learn.compile import pick_device
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.counters import Counters
from sacflow_robot.learn.curve import draw_curve
from sacflow_robot.learn.exploration import Exploration
from sacflow_robot.learn.metrics import Evaluation, MetricsWriter
from sacflow_robot.learn.progress import TrainingProgress
from sacflow_robot.learn.run_folder import RunFolder, made_by
from sacflow_robot.learn.schedule import RegularizationSchedule
from sacflow_robot.learn.training_guards import FiniteWatch, Interrupted, ctrl_c_asks, diverged, memory_is_explained
from sacflow_robot.spec import FloatArray, RobotSpec
from sacflow_robot.utils.seeding import CURVE_SEED, Stream, random_stream

METRICS_EVERY = 100
"""Updates between two rows of metrics."""

_SAVE_EVERY = 10_000  # updates on demonstrations; online it is saved with every evaluation

_RECENT_EPISODES = 50
_ROOM = 10  # longest episodes given that the replay buffer must have room for besides: those to come may be longer


class Trainer:
    """One training run.

    Args:
        config: The run's configuration.
        folder: Where it writes.
        envs: Robots that training moves.
        eval_envs: Robots that evaluation moves; training episodes pause meanwhile.
        progress: What the user sees.
    """

    def __init__(
        self, config: TrainConfig, folder: RunFolder, envs: VectorEnv, eval_envs: VectorEnv, progress: TrainingProgress
    ) -> None:
        self.config = config
        self.folder = folder
        self.progress = progress
        self._envs = envs
        self._eval_envs = eval_envs
        self.agent = make_agent(envs.spec, config, pick_device(config.device))
        sizes = envs.spec, config.chunk_length, config.learner.discount, config.replay_capacity
        size = ReplayBuffer.size_bytes(envs.spec, config.chunk_length, config.replay_capacity)
        self._mapped = size > config.replay_memory_gb * 1e9
        self.buffer = ReplayBuffer(*sizes, folder.path if self._mapped else None)
        self.done = Counters(normalized=not config.from_scratch)
        self._watch = FiniteWatch(self.agent.device, folder)
        self._rng = random_stream(config.seed, Stream.REPLAY)
        shares = {Origin.DEMOS: config.demo_ratio, Origin.REPLAY: config.replay_ratio}
        self._shares = {origin: share for origin, share in shares.items() if share is not None}
        self._schedule = RegularizationSchedule(config)
        self._unlogged: list[Episode] = []
        self._began = time.monotonic()
        self._stop = False
        self._metrics: MetricsWriter | None = None
        self._latest: dict[str, Tensor | float] = {}
        self._exploration = Exploration(self.agent, envs, config, folder)

    @property
    def spec(self) -> RobotSpec:
        """The robot that is learned for."""
        return self._envs.spec

    @property
    def env_steps(self) -> int:
        """Environment steps learned from online."""
        return self.done.env_steps

    @property
    def wall_s(self) -> float:
        """Seconds spent on this run, over all its resumptions."""
        return self.done.wall_s + time.monotonic() - self._began

    def load(self, demos: Sequence[Episode], logged: Sequence[Episode] = ()) -> None:
        """Start afresh from demonstrations and logged episodes; from scratch there are none.

        What a person did in logged episodes is a demonstration as well, so that ``demo_ratio`` weighs it.

        Raises:
            UsageError: The replay buffer is too small.
        """
        demos = [*demos, *(part for episode in logged for part in human_parts(episode))]
        episodes = [*demos, *logged]
        steps = sum(map(len, episodes))
        needed = steps + min(self.config.online_steps, _ROOM * max(map(len, episodes), default=0))
        if needed > self.config.replay_capacity:
            raise UsageError(
                f"the episodes have {steps:,} steps, and what the run collects needs room beside them; give a "
                f"--replay-capacity of at least {needed:,}"
            )
        for i, episode in enumerate(episodes):
            self.buffer.append(episode, Origin.DEMOS if i < len(demos) else Origin.REPLAY)
        if self.done.normalized:
            self.agent.fit_normalizer(self.buffer.observations())

    def resume(self, *, same_robots: bool = True) -> None:
        """Go on from the folder's checkpoint.

        Args:
            same_robots: Whether the robots are as they were; on others, episodes in progress are not gone on with.

        Raises:
            DataError: There is none, it is damaged, or it is of another task, algorithm, version or size.
        """
        state = self.folder.load_checkpoint(self.config, mapped=self._mapped)
        try:
            self.agent.load_state_dict(state["agent"])
            self.buffer.load_state_dict({k: v.numpy() for k, v in state["buffer"].items()})
            self.done = Counters.from_json(state["progress"])
            self._schedule.load_state_dict(self.done.schedule)
            self._rng.bit_generator.state = self.done.rng
            self._latest = {**self.done.latest_metrics}
            if same_robots:
                self._exploration.load_state_dict(state["rollouts"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise DataError(f"{self.folder.checkpoint} does not fit the run's config.yaml: {one_line(error)}") from None
        if self.folder.episodes.exists():
            with EpisodeWriter(self.folder.episodes, self.spec) as log:
                log.truncate(self.done.logged)

    def run(self) -> None:
        """Train to the end, or until Ctrl-C.

        Raises:
            Interrupted: Ctrl-C was pressed and the run has been saved.
        """
        with self.session():
            self._offline()
            self._online()

    @contextmanager
    def session(self, save: Callable[[], None] | None = None) -> Iterator[None]:
        """Open the metrics and listen for Ctrl-C while the run learns.

        Args:
            save: Called on Ctrl-C; :meth:`save` by default.

        Raises:
            Interrupted: Ctrl-C was pressed and the run has been saved.
        """
        torch.set_num_threads(self.config.threads)
        if self.agent.compute.compiled:
            self.progress.say("the first updates compile, which takes minutes the first time on a machine")
        self._metrics = MetricsWriter(self.folder, self.done.metric_rows)
        try:
            with ctrl_c_asks(self.ask_to_stop), memory_is_explained(self.config, self.folder):
                yield
        except Interrupted:
            (save or self.save)()
            raise
        finally:
            self._metrics.close()

    def act(self, observation: dict[str, FloatArray], noise: FloatArray) -> FloatArray:
        """The policy as it would be exported now: chunks (B, H, A)."""
        return self.spec.from_unit(self.agent.act(self.spec.flatten(observation), noise))

    def _offline(self) -> None:
        total = self.config.offline_steps
        self.progress.begin("offline", total, self.done.offline_steps)
        while self.done.offline_steps < total:
            metrics = self.agent.update_offline(self._sample())
            self._watch.add(self.agent.updates, metrics)
            self.done.offline_steps += 1
            self.progress.advance(1)
            if self.done.offline_steps % METRICS_EVERY == 0:
                self._record("offline", metrics)
            if self.done.offline_steps % _SAVE_EVERY == 0 and self.done.offline_steps < total:
                self.save()
            self.check_stop()
        self._watch.read()
        if self.env_steps == 0 and not self.done.evaluations:
            self.agent.begin_online()
        if not self.done.evaluations and self.config.eval_episodes:
            self.evaluate("offline")
            self.save()

    def _online(self) -> None:
        if self.config.online_steps:
            self.progress.begin("online", self.config.online_steps, self.env_steps)
        while True:
            if self.done.evaluation_due:
                self.save()
                self.evaluate("online")
                self.done.evaluation_due = False
            if self.env_steps >= self.config.online_steps:
                break
            warming_up = self.env_steps < self.config.learner.warmup_steps
            self._exploration.send(self.done)
            updates_before = self.agent.updates
            self.learn(int(self.done.updates_owed), warming_up=warming_up)
            self.done.updates_owed %= 1
            steps, ended, parts = self._exploration.receive()
            self.take(steps, ended, parts, warming_up=warming_up)
            self._unlogged += ended
            self.record_since(updates_before)
            self.check_stop()
        self.save()

    def learn(self, updates: int, *, warming_up: bool, newest: tuple[int, float] = (0, 0.0)) -> None:
        """Update online, the critic alone while ``warming_up``; from scratch there are no updates until that is over.

        ``newest``: so many steps collected last, and the share of each batch that is drawn from those alone.
        """
        if not self.done.normalized:
            if warming_up or not len(self.buffer):
                return
            self.agent.fit_normalizer(self.buffer.observations())
            self.done.normalized = True
        self.agent.bc_coef = self._schedule.weight(self.env_steps)
        for _ in range(updates):
            metrics = self.agent.update_online(self._sample(newest), critic_only=warming_up)
            self._watch.add(self.agent.updates, metrics)
            self._latest |= metrics

    def take(self, steps: int, ended: list[Episode], parts: list[Episode], *, warming_up: bool) -> None:
        """Account for environment steps.

        Args:
            steps: Number of steps.
            ended: Episodes that ended with them.
            parts: What enters the replay buffer: those episodes, or parts of them and of those in progress.
            warming_up: Whether the policy is as cloning left it.
        """
        done, config = self.done, self.config
        for part in parts:
            self.buffer.append(part)
        for episode in ended:
            done.recent = [*done.recent, episode.success][-_RECENT_EPISODES:]
            self._schedule.observe(episode.rewards, warming_up=warming_up)
        rounds_before = done.env_steps // config.eval_every
        done.env_steps += steps
        done.updates_owed += steps * config.learner.utd_ratio
        finished = done.env_steps >= config.online_steps
        done.evaluation_due = finished or done.env_steps // config.eval_every > rounds_before
        self.progress.advance(steps)

    def _sample(self, newest: tuple[int, float] = (0, 0.0)) -> Any:
        return self.buffer.sample(self.config.learner.batch_size, self._rng, self._shares, newest)

    def evaluate(self, phase: str, act: Chunker | None = None) -> None:
        """Run held-out episodes, record the result, redraw the curve.

        Args:
            phase: ``offline`` or ``online``.
            act: What chooses chunks; by default the policy as it would be exported now.
        """
        seeds = range(CURVE_SEED, CURVE_SEED + self.config.eval_episodes)
        shape = self.config.chunk_length, self.spec.action_dim
        episodes = []
        for episode in rollout(self._eval_envs, shape, act or self.act, seeds):
            episodes.append(episode)
            self.check_stop()
        if not episodes:
            return
        scratch = self.config.from_scratch
        result = Evaluation.of(episodes, phase, self.env_steps)
        self.done.evaluations.append(result)
        self._record(phase, result.figures)
        self.progress.evaluated(f"  {result.describe(from_scratch=scratch)}", result.success_rate)
        title = f"{self.config.env}, {self.agent.policy.name}"
        draw_curve(self.done.evaluations, self.folder.curve, title, returns=scratch)

    def record_since(self, updates_before: int) -> None:
        """Write a row of metrics if a multiple of :data:`METRICS_EVERY` updates was passed since."""
        if self.agent.updates // METRICS_EVERY > updates_before // METRICS_EVERY:
            self._record("online", self._latest)

    def _record(self, phase: str, values: Mapping[str, Tensor | float]) -> None:
        assert self._metrics is not None
        self._watch.read()  # names the first update with a number that is not finite
        common: dict[str, Tensor | float] = {
            "env_steps": self.env_steps,
            "wall_s": self.wall_s,
            "replay_steps": len(self.buffer),
        }
        if self.done.recent:
            common["train_success_rate"] = float(np.mean(self.done.recent))
        self._metrics.write(phase, self.agent.updates, {**common, **values})

    def save(self) -> None:
        """Bring the episode log and the checkpoint up to now, the log first: resuming cuts what is past its count."""
        assert self._metrics is not None
        self._watch.read()
        if not self.agent.is_finite:
            raise diverged("a weight", self.agent.updates, self.folder)
        if self._unlogged:
            with EpisodeWriter(self.folder.episodes, self.spec) as log:
                log.extend(self._unlogged)
            self.done.logged += len(self._unlogged)
            self._unlogged = []
        progress = replace(
            self.done,
            schedule=self._schedule.state_dict(),
            rng=self._rng.bit_generator.state,
            metric_rows=self._metrics.rows,
            latest_metrics={name: float(value) for name, value in self._latest.items()},
            wall_s=self.wall_s,
        )
        state = {
            "agent": self.agent.state_dict(),
            "buffer": {k: torch.from_numpy(np.asarray(v)) for k, v in self.buffer.state_dict().items()},
            "rollouts": self._exploration.state_dict(),
            "progress": progress.to_json(),
            "made_by": made_by(self.config),
        }
        self.folder.save_checkpoint(state)

    def ask_to_stop(self) -> None:
        """End the run, saved, after this round."""
        self._stop = True
        self.progress.say("stopping after this round; press Ctrl-C again to stop at once and lose it")

    def check_stop(self) -> None:
        """Say what the computation could not do, and raise Interrupted where the run is to stop."""
        note, self.agent.compute.note = self.agent.compute.note, ""
        if note:
            self.progress.say(note)
        if self._stop:
            raise Interrupted
