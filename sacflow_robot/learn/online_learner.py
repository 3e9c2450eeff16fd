"""Learning from a log that grows while a robot runs, and publishing what comes of it, if it is fit to be served."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.data.replay_buffer import ChunkBatch
from sacflow_robot.envs.collector import Chunker
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, SacflowError, UsageError, one_line
from sacflow_robot.export.metadata import file_version
from sacflow_robot.learn.run_folder import Evaluation, RunFolder, replace_text
from sacflow_robot.learn.trained_run import export_agent
from sacflow_robot.learn.trainer import METRICS_EVERY, Trainer
from sacflow_robot.spec import FloatArray
from sacflow_robot.utils.action_history import KEY, with_action_history
from sacflow_robot.utils.intervals import difference_interval

_POLL_S = 1.0
_SLICE = 20  # updates between two looks at the log, and at Ctrl-C
_MOST_AT_ONCE = 100
_MOST_OWED = 10
_MOST_REFUSED = 3


@dataclass(frozen=True)
class FollowConfig:
    """Learn from a growing episode log, and publish.

    Attributes:
        log: Episode log that a robot's run appends to; waited for where there is none yet.
        publish: Policy file to replace, the one being served.
        publish_every: Environment steps taken from the log between two candidates.
        gate_episodes: Simulated episodes that a candidate is held against the best policy published with, on seeds that are
            used for nothing else; 0 leaves it to the export's own tests and to the server's.
        stop_after: End once so many environment steps have been learned from; None goes on until stopped.
        log_share: Share of each batch that comes from the log alone, once there is something; 0 leaves it to its size.
        from_average: Begin from the averaged policy, which made the log, and not from the latest.
        inject_bad_candidate: A fault switch: of the candidate of this number, counted from 1, the weights are corrupted. 0 for none.
    """

    log: Path
    publish: Path
    publish_every: int = 1000
    gate_episodes: int = 30
    stop_after: int | None = None
    log_share: float = 0.0
    from_average: bool = False
    inject_bad_candidate: int = 0


class LogCursor:
    """How much of a log has been taken, kept in the run folder beside the checkpoint.

    Attributes:
        episodes: Episodes taken.
        learned: Environment steps' worth of updates done.
    """

    def __init__(self, folder: RunFolder, log: Path) -> None:
        self._file, self._log = folder.path / "followed.json", log
        self.episodes, self.learned = 0, 0.0
        try:
            kept = json.loads(self._file.read_text())
            if kept["log"] == str(log.resolve()):
                self.episodes, self.learned = int(kept["episodes"]), float(kept["learned"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self._file} cannot be read: {one_line(error)}; remove it to take the log anew") from None

    def save(self) -> None:
        replace_text(
            self._file,
            json.dumps({"log": str(self._log.resolve()), "episodes": self.episodes, "learned": self.learned}),
        )

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


class FollowingTrainer(Trainer):
    """A training run that goes on from its checkpoint with what a robot logs, instead of moving robots of its own.

    What it publishes has passed a gate: every weight finite; the exported graph the same as the network, by the golden
    vectors that it carries; ``accept``; and, with gate episodes, a success that is not worse than that of the best file
    published: a candidate is refused where the 95 % interval of the difference lies below zero. What is measured is the files
    themselves, that which is being served at the start included, and not what a checkpoint says. Learning goes on after a
    refusal, and three in a row end the run with an error. The checkpoint is the state last published, so that a run that went
    wrong goes on from there when it is started again, with the episodes logged since. ``candidates.csv`` in the run folder
    has a line for each candidate.

    Every episode enters the replay buffer as soon as it has ended. With a robot slower than the learner, each step is followed
    by its updates; with one that is faster, the learner does what it can, always from the newest too, and what it owes
    beyond ten candidates' worth is forgotten. Warm-up and candidates count steps by the updates done for them.

    Set ``follow``, ``accept``, ``load_policy`` and ``check`` before :meth:`run`.

    Attributes:
        follow: What to follow and where to publish.
        accept: Raises SacflowError for a candidate file that must not be served.
        load_policy: What a policy file chooses.
        check: Raises SacflowError for an episode that must not be learned from.
        published: Candidates published, in this session.
        refused: Candidates refused, in this session.
    """

    follow: FollowConfig
    accept: Callable[[Path], None]
    load_policy: Callable[[Path], Chunker]
    check: Callable[[Episode], None]
    published = refused = 0
    _log_steps = 0  # of the log, taken in this session
    _refused_in_row = 0
    _taken: LogCursor | None = None
    _best: Evaluation | None = None
    _judged: Chunker | None = None  # what is being evaluated, if not the network

    def act(self, observation: dict[str, FloatArray], noise: FloatArray) -> FloatArray:
        return super().act(observation, noise) if self._judged is None else self._judged(observation, noise)

    def _offline(self) -> None:
        """That lies behind.

        Raises:
            UsageError: It does not.
        """
        if self.offline_steps < self.config.offline_steps:
            raise UsageError(
                f"{self.folder.path} was stopped while cloning, after {self.offline_steps:,} of {self.config.offline_steps:,} "
                f"updates; finish it first with train --resume {self.folder.path}"
            )

    def _online(self) -> None:
        follow = self.follow
        taken = self._taken = LogCursor(self.folder, follow.log)
        if follow.from_average:
            self.agent.go_on_from_average()
        if not follow.publish.exists():
            self._publish()
        elif follow.gate_episodes:
            self._best = self._gate_result(follow.publish)
        of = "" if self._best is None else f" from {_rate(self._best)}"
        self._progress.say(f"following {follow.log}{of}")
        # During the warm-up the policy stays what it is.
        next_at = max(taken.learned, float(self.config.learner.warmup_steps)) + follow.publish_every
        per_step = self.config.learner.utd_ratio
        while True:
            new = [self._as_observed(episode) for episode in taken.take()]
            for episode in new:
                self.check(episode)
                self._take(len(episode), [episode])
                self._log_steps += len(episode)
            self._unlogged = []  # they are in a log already
            self._updates_owed = min(self._updates_owed, _MOST_OWED * follow.publish_every * per_step)
            updates = min(int(self._updates_owed), _SLICE)
            self._learn_slice(updates)
            taken.learned += updates / per_step if per_step else 0.0
            all_taken = not new and self._updates_owed < 1
            done = follow.stop_after is not None and self.env_steps >= follow.stop_after and all_taken
            if done or taken.learned >= next_at:
                next_at = taken.learned + follow.publish_every
                self._publish()
                self._save()
            if done:
                return
            self._say_what_failed()
            self._check_stop()
            if all_taken:
                time.sleep(_POLL_S)

    def _as_observed(self, episode: Episode) -> Episode:
        """An episode with as long an action history as the policy sees, where it was recorded with one."""
        return with_action_history(episode, self.config.action_history) if KEY in episode.observations else episode

    def _pieces(self, ended: list[Episode]) -> list[Episode]:
        return ended

    def _sample(self) -> ChunkBatch:
        newest = self._log_steps, self.follow.log_share
        return self.buffer.sample(self.config.learner.batch_size, self._rng, self._shares, newest)

    @property
    def _warming_up(self) -> bool:
        return self._taken is not None and self._taken.learned < self.config.learner.warmup_steps

    def _learn_slice(self, updates: int) -> None:
        before = self.agent.updates
        self._learn(updates)
        self._updates_owed -= updates
        if self.agent.updates // METRICS_EVERY > before // METRICS_EVERY:
            self._record("online", self._latest)

    def _save(self) -> None:
        if self._refused_in_row:
            return
        super()._save()
        if self._taken is not None:
            self._taken.save()

    def _publish(self) -> None:
        """Put the present policy in the place of the published one, if it is fit to be."""
        path = self.follow.publish
        if self._warming_up and path.exists():
            return  # cloning alone has made it, and goes on unchanged
        candidate = path.with_name(f".{path.stem}.candidate.onnx")
        result, version, reason = None, "", ""
        try:
            with self._spoilt():
                if not all(bool(weight.isfinite().all()) for weight in self.agent.exported.parameters()):
                    raise SacflowError("a weight is not finite")
                export_agent(self.agent, self._notes(), candidate)
            version = file_version(candidate)
            self.accept(candidate)
            if self.follow.gate_episodes:
                result = self._gate_result(candidate)
                self._compare(result)
            candidate.replace(path)
        except (SacflowError, OSError) as error:
            reason = one_line(error)
        finally:
            candidate.unlink(missing_ok=True)
        self._note(version, result, reason)
        if reason:
            self._refuse(version, reason)
            return
        self.published, self._refused_in_row = self.published + 1, 0
        if result is not None and (self._best is None or result.success_rate >= self._best.success_rate):
            self._best = result
        of = "" if result is None else f", {_rate(result)}"
        steps, updates = self.env_steps, self.agent.updates
        self._progress.say(f"  published version {version} after {steps:,} steps and {updates:,} updates{of}")

    def _refuse(self, version: str, reason: str) -> None:
        self.refused, self._refused_in_row = self.refused + 1, self._refused_in_row + 1
        named = f"candidate {version}" if version else "candidate"
        self._progress.say(f"  {named} refused after {self.env_steps:,} steps: {reason}")
        if self._refused_in_row >= _MOST_REFUSED:
            raise SacflowError(
                f"{_MOST_REFUSED} candidates in a row were refused; start again to go on from the one published last"
            )

    def _compare(self, result: Evaluation) -> None:
        """Raise SacflowError for a result that is worse than the best by more than chance explains."""
        best = self._best
        if best is None:
            return
        _, high = difference_interval(result.successes, result.episodes, best.successes, best.episodes)
        if high < 0:
            raise SacflowError(f"{_rate(result)}, worse than {_rate(best)}")

    @contextmanager
    def _spoilt(self) -> Iterator[None]:
        """The fault switch: while this lasts, the weights of the candidate to be spoilt are."""
        if self.follow.inject_bad_candidate != self.published + self.refused + 1:
            yield
            return
        weights = list(self.agent.exported.parameters())
        kept = [weight.detach().clone() for weight in weights]
        try:
            with torch.no_grad():
                for weight in weights:
                    weight.copy_(weight.flatten().flip(0).view_as(weight))
            yield
        finally:
            with torch.no_grad():
                for weight, before in zip(weights, kept, strict=True):
                    weight.copy_(before)

    def _note(self, version: str, result: Evaluation | None, reason: str) -> None:
        """A line about a candidate, in ``candidates.csv``."""
        path = self.folder.path / "candidates.csv"
        row = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": version,
            "env_steps": self.env_steps,
            "updates": self.agent.updates,
            "successes": "" if result is None else result.successes,
            "episodes": "" if result is None else result.episodes,
            "outcome": "refused" if reason else "published",
            "reason": reason,
        }
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)

    def _gate_result(self, path: Path) -> Evaluation:
        """Success of a policy file on the gate's episodes; recorded like any evaluation."""
        self._judged = self.load_policy(path)
        try:
            self._evaluate("online")
        finally:
            self._judged = None
        return self.evaluations[-1]

    def _notes(self) -> dict[str, object]:
        return {
            "algo": self.config.algo,
            "seed": self.config.seed,
            "offline_steps": self.offline_steps,
            "online_steps": self.env_steps,
            "followed": str(self.follow.log),
        }


def _rate(result: Evaluation) -> str:
    return f"success {result.successes}/{result.episodes}"
