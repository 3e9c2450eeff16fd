"""The training loop: offline on demonstrations, then online on simulated robots.

Everything random comes from the agent's generator, the replay generator and the episodes' seeds, and robots and learner
meet at fixed points (a chunk per robot and round), so that a run depends on its configuration alone and one resumed from
its checkpoint goes on bit for bit on the same CPU.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sacflow_robot.data.interventions import human_parts
from sacflow_robot.data.log.episode_writer import EpisodeWriter
from sacflow_robot.data.replay_buffer import ChunkBatch, Origin, ReplayBuffer
from sacflow_robot.envs.collector import Rollouts, rollout
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, SacflowError, UsageError, one_line
from sacflow_robot.interfaces import VectorEnv
from sacflow_robot.learn.algorithms.registry import make_agent
from sacflow_robot.learn.compile import pick_device
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.curve import draw_curve
from sacflow_robot.learn.progress import TrainingProgress
from sacflow_robot.learn.run_folder import Evaluation, MetricsWriter, RunFolder, made_by
from sacflow_robot.learn.schedule import RegularizationSchedule
from sacflow_robot.learn.training_guards import FiniteWatch, Interrupted, ctrl_c_asks, diverged, memory_is_explained
from sacflow_robot.spec import FloatArray
from sacflow_robot.utils.intervals import wilson_interval
from sacflow_robot.utils.seeding import Stream, random_stream

CURVE_SEED = 20_000
"""First seed of the evaluations during training; ``eval`` starts at 10 000 by default."""

TRAINING_SEED = 1_000_000
"""Training and demonstrations use seeds from here on only; evaluation uses seeds below."""

METRICS_EVERY = 100
"""Updates between two rows of metrics."""

_SAVE_EVERY = 10_000  # updates on demonstrations; online it is saved with every evaluation

_SEEDS_PER_RUN = 1_000_000
_RECENT_EPISODES = 50
_PART_STEPS = 50  # of an episode that are learned from before it ends, where it is long
_ROOM = 10  # longest episodes given that the replay buffer must have room for besides: those to come may be longer


class Trainer:
    """One training run.

    Args:
        config: The run's configuration.
        folder: Where it writes.
        envs: Robots that training moves.
        eval_robots: Robots that evaluation moves; training episodes pause meanwhile.
        progress: What the user sees.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        envs: VectorEnv,
        eval_robots: VectorEnv,
        progress: TrainingProgress,
    ) -> None:
        self.config, self.folder, self._envs, self._eval_robots = config, folder, envs, eval_robots
        self._progress = progress
        self.agent = make_agent(envs.spec, config, pick_device(config.device))
        size = ReplayBuffer.size_bytes(envs.spec, config.chunk_length, config.replay_capacity)
        self._mapped = size > config.replay_memory_gb * 1e9
        self.buffer = ReplayBuffer(
            envs.spec,
            config.chunk_length,
            config.learner.discount,
            config.replay_capacity,
            folder.path if self._mapped else None,
        )
        self._watch = FiniteWatch(self.agent.device)
        self.evaluations: list[Evaluation] = []
        self.offline_steps = self.env_steps = 0
        self._rng = random_stream(config.seed, Stream.REPLAY)
        shares = {Origin.DEMOS: config.demo_ratio, Origin.REPLAY: config.replay_ratio}
        self._shares = {origin: share for origin, share in shares.items() if share is not None}
        self._schedule = RegularizationSchedule(config)
        self._normalized = not config.from_scratch
        self._episodes_begun = 0
        self._updates_owed = 0.0
        self._recent: deque[bool] = deque(maxlen=_RECENT_EPISODES)
        self._evaluation_due = False
        self._unlogged: list[Episode] = []
        self._logged = 0
        self._earlier_wall_s, self._began = 0.0, time.monotonic()
        self._stop = False
        self._metrics: MetricsWriter | None = None
        self._metric_rows = 0
        self._latest: dict[str, Tensor | float] = {}
        shape = config.chunk_length, envs.spec.action_dim
        part_steps = _PART_STEPS if config.from_scratch else None
        self._rollouts = Rollouts(envs, shape, self._training_seeds(), part_steps)

    def load(self, demos: Sequence[Episode], logged: Sequence[Episode] = ()) -> None:
        """Start afresh from demonstrations and logged episodes; from scratch there are none.

        What a person did in logged episodes is a demonstration as well, so that ``demo_ratio`` weighs it.
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
        if self._normalized:
            self.agent.fit_normalizer(self.buffer.observations())

    def resume(self, *, same_robots: bool = True) -> None:
        """Go on from the folder's checkpoint.

        Args:
            same_arms: Whether the robots are as they were; on others, the episodes that were in progress are not gone on with.

        Raises:
            DataError: There is none, it is damaged, or it is of another task, algorithm, version or size.
        """
        state = self.folder.load_checkpoint(self.config, mapped=self._mapped)
        if not same_robots:
            state["rollouts"] = {}
        try:
            self._restore(state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise DataError(f"{self.folder.checkpoint} does not fit the run's config.yaml: {one_line(error)}") from None
        if self.folder.episodes.exists():
            with EpisodeWriter(self.folder.episodes, self._envs.spec) as log:
                log.truncate(self._logged)

    def _restore(self, state: dict[str, Any]) -> None:
        self.agent.load_state_dict(state["agent"])
        self.buffer.load_state_dict({k: v.numpy() for k, v in state["buffer"].items()})
        progress = json.loads(state["progress"])
        self.offline_steps, self.env_steps = progress["offline_steps"], progress["env_steps"]
        self.evaluations = [Evaluation(**e) for e in progress["evaluations"]]
        self._episodes_begun, self._updates_owed = progress["episodes_begun"], progress["updates_owed"]
        self._evaluation_due = progress["evaluation_due"]
        self._recent.extend(progress["recent"])
        self._normalized = progress["normalized"]
        self._schedule.load_state_dict(progress["schedule"])
        self._logged, self._earlier_wall_s = progress["logged"], progress["wall_s"]
        self._rng.bit_generator.state = progress["rng"]
        self._metric_rows = progress["metric_rows"]
        in_progress = {int(i): {**e, "actions": e["actions"].numpy()} for i, e in state["rollouts"].items()}
        self._rollouts.load_state_dict(in_progress)
        self._latest = progress["latest_metrics"]

    @property
    def earlier_wall_s(self) -> float:
        """Seconds spent on this run before it was resumed; 0 for a new one."""
        return self._earlier_wall_s

    @property
    def wall_s(self) -> float:
        """Seconds spent on this run, over all its resumptions."""
        return self._earlier_wall_s + time.monotonic() - self._began

    def run(self) -> None:
        """Train to the end, or until Ctrl-C.

        Raises:
            Interrupted: Ctrl-C was pressed and the run has been saved.
        """
        torch.set_num_threads(self.config.threads)
        if self.agent.compute.compiled:
            self._progress.say("the first updates compile, which takes minutes the first time on a machine")
        self._metrics = MetricsWriter(self.folder, self._metric_rows)
        try:
            with ctrl_c_asks(self._ask_to_stop), memory_is_explained(self.config, self.folder):
                self._offline()
                self._online()
        except Interrupted:
            self._save()
            raise
        finally:
            self._metrics.close()

    def act(self, observation: dict[str, FloatArray], noise: FloatArray) -> FloatArray:
        """The policy as it would be exported now: chunks (B, H, A)."""
        spec = self._envs.spec
        return spec.from_unit(self.agent.act(spec.flatten(observation), noise))

    def _offline(self) -> None:
        total = self.config.offline_steps
        self._progress.begin("offline", total, self.offline_steps)
        while self.offline_steps < total:
            metrics = self.agent.update_offline(self._sample())
            self._check_finite(self._watch.add(self.agent.updates, metrics))
            self.offline_steps += 1
            self._progress.advance(1)
            if self.offline_steps % METRICS_EVERY == 0:
                self._record("offline", metrics)
            if self.offline_steps % _SAVE_EVERY == 0 and self.offline_steps < total:
                self._save()
            self._say_what_failed()
            self._check_stop()
        self._check_finite(self._watch.read())
        if self.env_steps == 0 and not self.evaluations:
            self.agent.begin_online()
        if not self.evaluations and self.config.eval_episodes:
            self._evaluate("offline")
            self._save()

    def _online(self) -> None:
        config = self.config
        if config.online_steps:
            self._progress.begin("online", config.online_steps, self.env_steps)
        while True:
            if self._evaluation_due:
                self._save()
                self._evaluate("online")
                self._evaluation_due = False
            if self.env_steps >= config.online_steps:
                break
            self._rollouts.send(self._explore)
            updates_before = self.agent.updates
            self._learn(int(self._updates_owed))
            self._updates_owed %= 1
            steps, ended = self._rollouts.receive()
            self._take(steps, ended)
            if self.agent.updates // METRICS_EVERY > updates_before // METRICS_EVERY:
                self._record("online", self._latest)
            self._say_what_failed()
            self._check_stop()
        self._save()

    @property
    def _warming_up(self) -> bool:
        return self.env_steps < self.config.learner.warmup_steps

    def _learn(self, updates: int) -> None:
        """Updates online; from scratch they begin when the warm-up is over and there are steps to learn from."""
        if not self._normalized:
            if self._warming_up or not len(self.buffer):
                return
            self.agent.fit_normalizer(self.buffer.observations())
            self._normalized = True
        self.agent.bc_coef = self._schedule.weight(self.env_steps)
        for _ in range(updates):
            metrics = self.agent.update_online(self._sample(), critic_only=self._warming_up)
            self._check_finite(self._watch.add(self.agent.updates, metrics))
            self._latest |= metrics

    def _take(self, steps: int, ended: list[Episode]) -> None:
        """Account for one round of the arms."""
        for piece in self._pieces(ended):
            self.buffer.append(piece)
        for episode in ended:
            self._recent.append(episode.success)
            self._schedule.observe(episode.rewards, warming_up=self._warming_up)
        self._unlogged += ended
        rounds_before = self.env_steps // self.config.eval_every
        self.env_steps += steps
        self._updates_owed += steps * self.config.learner.utd_ratio
        finished = self.env_steps >= self.config.online_steps
        self._evaluation_due = finished or self.env_steps // self.config.eval_every > rounds_before
        self._progress.advance(steps)

    def _pieces(self, ended: list[Episode]) -> list[Episode]:
        """What enters the replay buffer: whole episodes, or, from scratch, the parts completed of those in progress."""
        return self._rollouts.take_parts() if self.config.from_scratch else ended

    def _sample(self) -> ChunkBatch:
        return self.buffer.sample(self.config.learner.batch_size, self._rng, self._shares)

    def _explore(self, observation: dict[str, FloatArray], noise: FloatArray) -> FloatArray:
        if self.config.from_scratch and not self._normalized:
            return self._envs.spec.from_unit(uniform_actions(noise))
        chunks = self.agent.explore(self._envs.spec.flatten(observation), noise)
        if not np.isfinite(chunks).all():
            raise self._diverged("the policy's action")
        return self._envs.spec.from_unit(chunks)

    def _evaluate(self, phase: str) -> None:
        """Run held-out episodes, record the result, redraw the curve."""
        seeds = range(CURVE_SEED, CURVE_SEED + self.config.eval_episodes)
        shape = self.config.chunk_length, self._envs.spec.action_dim
        episodes = []
        for episode in rollout(self._eval_robots, shape, self.act, seeds):
            episodes.append(episode)
            self._check_stop()
        if not episodes:
            return
        result = Evaluation(
            phase=phase,
            env_steps=self.env_steps,
            successes=sum(e.success for e in episodes),
            episodes=len(episodes),
            mean_steps=float(np.mean([len(e) for e in episodes])),
            mean_return=float(np.mean([e.rewards.sum() for e in episodes])),
        )
        self.evaluations.append(result)
        low, high = wilson_interval(result.successes, result.episodes)
        values = {"success_rate": result.success_rate, "success_low": low, "success_high": high}
        self._record(phase, {**values, "mean_steps": result.mean_steps, "mean_return": result.mean_return})
        cloned = "before learning" if self.config.from_scratch else "after cloning"
        when = cloned if phase == "offline" else f"after {self.env_steps:,} online steps"
        success = f"success {result.successes}/{result.episodes} (95 % interval {low:.0%} to {high:.0%})"
        what = f"return {result.mean_return:.4g}" if self.config.from_scratch else success
        self._progress.evaluated(f"  {when}: {what}, {result.mean_steps:.0f} steps on average", result.success_rate)
        title = f"{self.config.env}, {self.agent.policy.name}"
        draw_curve(self.evaluations, self.folder.curve, title, returns=self.config.from_scratch)

    def _record(self, phase: str, values: Mapping[str, Tensor | float]) -> None:
        assert self._metrics is not None
        for name, value in values.items():
            if not np.isfinite(float(value)):
                self._check_finite(self._watch.read())
                raise self._diverged(name)
        common: dict[str, Tensor | float] = {
            "env_steps": self.env_steps,
            "wall_s": self.wall_s,
            "replay_steps": len(self.buffer),
        }
        if self._recent:
            common["train_success_rate"] = float(np.mean(self._recent))
        self._metrics.write(phase, self.agent.updates, common | dict(values))

    def _save(self) -> None:
        """Bring the episode log and the checkpoint up to now, the log first: resuming cuts what is past its count."""
        assert self._metrics is not None
        self._check_finite(self._watch.read())
        if not self.agent.is_finite:
            raise self._diverged("a weight")
        if self._unlogged:
            with EpisodeWriter(self.folder.episodes, self._envs.spec) as log:
                log.extend(self._unlogged)
            self._logged += len(self._unlogged)
            self._unlogged = []
        progress = {
            "offline_steps": self.offline_steps,
            "env_steps": self.env_steps,
            "evaluations": [asdict(e) for e in self.evaluations],
            "episodes_begun": self._episodes_begun,
            "updates_owed": self._updates_owed,
            "evaluation_due": self._evaluation_due,
            "recent": list(self._recent),
            "normalized": self._normalized,
            "schedule": self._schedule.state_dict(),
            "logged": self._logged,
            "wall_s": self.wall_s,
            "rng": self._rng.bit_generator.state,
            "metric_rows": self._metrics.rows,
            "latest_metrics": {name: float(value) for name, value in self._latest.items()},
        }
        in_progress = {
            str(i): {**e, "actions": torch.from_numpy(e["actions"])} for i, e in self._rollouts.state_dict().items()
        }
        state: dict[str, Any] = {
            "agent": self.agent.state_dict(),
            "buffer": {k: torch.from_numpy(np.asarray(v)) for k, v in self.buffer.state_dict().items()},
            "rollouts": in_progress,
            "progress": json.dumps(progress),
            "made_by": made_by(self.config),
        }
        self.folder.save_checkpoint(state)

    def _training_seeds(self) -> Iterator[int]:
        first = TRAINING_SEED + (1 + self.config.seed) * _SEEDS_PER_RUN
        while True:
            self._episodes_begun += 1
            yield first + self._episodes_begun - 1

    def _check_finite(self, found: tuple[str, int] | None) -> None:
        if found is not None:
            raise diverged(*found, self.folder)

    def _diverged(self, what: str) -> SacflowError:
        return diverged(what, self.agent.updates, self.folder)

    def _ask_to_stop(self) -> None:
        self._stop = True
        self._progress.say("stopping after this round; press Ctrl-C again to stop at once and lose it")

    def _say_what_failed(self) -> None:
        note, self.agent.compute.note = self.agent.compute.note, ""
        if note:
            self._progress.say(note)

    def _check_stop(self) -> None:
        if self._stop:
            raise Interrupted


def uniform_actions(noise: FloatArray) -> FloatArray:
    """Actions spread evenly over [-1, 1], one for each number of standard normal noise of any shape."""
    spread: FloatArray = torch.erf(torch.from_numpy(noise) / 2**0.5).numpy()
    return spread
