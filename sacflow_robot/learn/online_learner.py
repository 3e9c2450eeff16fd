"""Learning from a log that grows while a robot runs, and publishing the policy that comes of it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, UsageError, one_line
from sacflow_robot.learn.progress import TrainingProgress
from sacflow_robot.learn.publish_gate import PublishGate
from sacflow_robot.learn.run_folder import RunFolder
from sacflow_robot.learn.trainer import Trainer
from sacflow_robot.learn.training_data import check_seeds
from sacflow_robot.learn.training_envs import training_envs
from sacflow_robot.spec import NO_ENVIRONMENT
from sacflow_robot.utils.action_history import KEY, with_action_history
from sacflow_robot.utils.atomic_files import write_text

_POLL_S = 1.0
_SLICE = 20  # updates between two looks at the log, and at Ctrl-C
_MOST_AT_ONCE = 100
_MOST_OWED = 10
_GATE_EPISODES = 30


@dataclass(frozen=True)
class OnlineConfig:
    """Learn from a growing episode log, and publish.

    Attributes:
        log: Episode log that a robot's run appends to; waited for where there is none yet.
        publish: Policy file to replace, the one being served; None for the run folder's own.
        publish_every: Environment steps taken from the log between two candidates.
        gate_episodes: Simulated episodes that compare a candidate with the best policy published, on seeds that are used for
            nothing else. 0 leaves it to the export's own tests and to the server's; None: 30, 0 without an environment.
        stop_after: End once so many environment steps have been learned from; None goes on until stopped.
        log_share: Share of each batch that comes from the log alone, once there is something; 0 leaves it to its size.
        from_average: Begin from the averaged policy, which made the log, and not from the latest.
        inject_bad_candidate: A fault switch: number of the candidate, from 1, whose weights are corrupted. 0 for none.
    """

    log: Path
    publish: Path | None = None
    publish_every: int = 1000
    gate_episodes: int | None = None
    stop_after: int | None = None
    log_share: float = 0.0
    from_average: bool = False
    inject_bad_candidate: int = 0

    def __post_init__(self) -> None:
        if self.publish_every < 1 or (self.gate_episodes or 0) < 0 or self.inject_bad_candidate < 0:
            raise UsageError(
                "--publish-every must be at least 1, --gate-episodes and --inject-bad-candidate not negative"
            )


def learn_from_log(run_dir: Path, online: OnlineConfig, learner: dict[str, Any] | None = None) -> OnlineLearner:
    """Go on with a run from a log.

    Args:
        run_dir: The run folder, in which learning goes on.
        online: The log, and where to publish.
        learner: Fields of ``LearnerConfig`` in place of the run's own.

    Raises:
        Interrupted: Ctrl-C was pressed and the run has been saved.
        UsageError: Gate episodes for a run without an environment.
        DataError: There is no run, or the log cannot be read or does not fit.
        SacflowError: Several candidates in a row were refused.
    """
    folder, config = RunFolder.open(run_dir)
    gate = online.gate_episodes
    if gate is None:
        gate = 0 if config.env == NO_ENVIRONMENT else _GATE_EPISODES
    if gate and config.env == NO_ENVIRONMENT:
        raise UsageError(f"--gate-episodes is {gate}, but {run_dir} is a run without an environment; leave it out")
    folder.claim()
    config = replace(config, learner=replace(config.learner, **learner or {}), eval_episodes=gate, num_envs=1)
    if config.compile == "auto":  # a robot is being moved meanwhile, and compiling takes every core for up to a minute
        config = replace(config, compile="off")
    with training_envs(config, folder.robot) as (envs, eval_envs), TrainingProgress() as progress:
        trainer = Trainer(config, folder, envs, eval_envs, progress)
        trainer.resume(same_robots=False)  # they are not moved any more
        online_learner = OnlineLearner(trainer, online)
        online_learner.run()
    return online_learner


class LogCursor:
    """Place in a log up to which it has been taken, kept in the run folder beside the checkpoint.

    Attributes:
        episodes: Episodes taken.
        learned: Environment steps' worth of updates done.

    Raises:
        DataError: The note in the run folder cannot be read.
    """

    def __init__(self, folder: RunFolder, log: Path) -> None:
        self._file = folder.path / "followed.json"
        self._log = log
        self.episodes = 0
        self.learned = 0.0
        try:
            kept = json.loads(self._file.read_text())
            if kept["log"] == str(log.resolve()):
                self.episodes = int(kept["episodes"])
                self.learned = float(kept["learned"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self._file} cannot be read: {one_line(error)}; remove it to take the log anew") from None

    def save(self) -> None:
        note = {"log": str(self._log.resolve()), "episodes": self.episodes, "learned": self.learned}
        write_text(self._file, json.dumps(note))

    def take(self) -> list[Episode]:
        """Episodes that have ended since, oldest first, at most ``_MOST_AT_ONCE``.

        Raises:
            DataError: The log cannot be read, or is shorter than it was.
        """
        if not self._log.exists():
            return []
        log = EpisodeLog.open(self._log, heal=False)
        if len(log) < self.episodes:
            raise DataError(
                f"{self._log} has {len(log)} episodes, of which {self.episodes} were taken; is it another log?"
            )
        last = min(len(log), self.episodes + _MOST_AT_ONCE)
        found = [log.read(i) for i in range(self.episodes, last)]
        self.episodes = last
        return found


class OnlineLearner:
    """Drives a trainer with the episodes that a robot logs, instead of robots of its own, and publishes candidates.

    Every episode enters the replay buffer as soon as it has ended. With a robot slower than the learner, each step is followed
    by its updates; with one that is faster, the learner does what it can, always from the newest too, and what it owes
    beyond ten candidates' worth is forgotten. Warm-up and candidates count steps by the updates done for them.

    The checkpoint is the state last published, so that a run that went wrong goes on from there when it is started again,
    with the episodes logged since.

    Args:
        trainer: The run, resumed from its checkpoint.
        online: The log, and where to publish.

    Attributes:
        gate: What publishes candidates, and counts them.
    """

    def __init__(self, trainer: Trainer, online: OnlineConfig) -> None:
        self.trainer = trainer
        self.online = online
        publish = online.publish or trainer.folder.policy
        self.gate = PublishGate(trainer, online.log, publish, online.inject_bad_candidate)
        self._cursor = LogCursor(trainer.folder, online.log)
        self._log_steps = 0  # of the log, taken in this session

    def run(self) -> None:
        """Learn until ``stop_after``, or until Ctrl-C.

        Raises:
            Interrupted: Ctrl-C was pressed and the run has been saved.
            UsageError: The run was stopped while cloning.
            DataError: The log cannot be read or does not fit.
            SacflowError: Several candidates in a row were refused.
        """
        trainer = self.trainer
        done, total = trainer.done.offline_steps, trainer.config.offline_steps
        if done < total:
            raise UsageError(
                f"{trainer.folder.path} was stopped while cloning, after {done:,} of {total:,} updates; finish it first with "
                f"train --resume {trainer.folder.path}"
            )
        with trainer.session(self._save):
            self._learn()

    def _learn(self) -> None:
        online, trainer, cursor = self.online, self.trainer, self._cursor
        if online.from_average:
            trainer.agent.start_from_average()
        start = self.gate.begin()
        trainer.progress.say(f"following {online.log}{start}")
        # During the warm-up the policy stays what it is.
        next_at = max(cursor.learned, float(trainer.config.learner.warmup_steps)) + online.publish_every
        while True:
            found = self._take_new()
            self._update()
            all_taken = not found and trainer.done.updates_owed < 1
            done = online.stop_after is not None and trainer.env_steps >= online.stop_after and all_taken
            if done or cursor.learned >= next_at:
                next_at = cursor.learned + online.publish_every
                # Cloning alone has made the policy of the warm-up, which goes on unchanged.
                self.gate.publish(replace_published=not self._warming_up)
                self._save()
            if done:
                return
            trainer.check_stop()
            if all_taken:
                time.sleep(_POLL_S)

    @property
    def _warming_up(self) -> bool:
        return self._cursor.learned < self.trainer.config.learner.warmup_steps

    def _take_new(self) -> bool:
        """Move what the log has got into the replay buffer; whether that was anything."""
        trainer = self.trainer
        found = self._cursor.take()
        for episode in found:
            if KEY in episode.observations:  # as long a history as the policy sees
                episode = with_action_history(episode, trainer.config.action_history)
            episode.check_fits(trainer.spec, str(self.online.log))
            check_seeds([episode], trainer.config, self.online.log)
            trainer.take(len(episode), [episode], [episode], warming_up=self._warming_up)
            self._log_steps += len(episode)
        return bool(found)

    def _update(self) -> None:
        """Do some of the updates owed."""
        trainer, counters = self.trainer, self.trainer.done
        per_step = trainer.config.learner.utd_ratio
        counters.updates_owed = min(counters.updates_owed, _MOST_OWED * self.online.publish_every * per_step)
        updates = min(int(counters.updates_owed), _SLICE)
        before = trainer.agent.updates
        newest = self._log_steps, self.online.log_share
        trainer.learn(updates, warming_up=self._warming_up, newest=newest)
        counters.updates_owed -= updates
        trainer.record_since(before)
        self._cursor.learned += updates / per_step if per_step else 0.0

    def _save(self) -> None:
        if self.gate.refused_in_row:
            return
        self.trainer.save()
        self._cursor.save()
