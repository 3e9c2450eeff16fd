"""The gate between a policy that is being learned and the file that is being served."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from sacflow_robot.errors import PolicyFileError, SacflowError, one_line
from sacflow_robot.export.metadata import NOISE, PREFIX, PREFIX_MASK, file_version
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.learn.metrics import Evaluation
from sacflow_robot.learn.trained_run import export_agent
from sacflow_robot.learn.trainer import Trainer
from sacflow_robot.utils.intervals import difference_interval

_MOST_REFUSED = 3


class PublishGate:
    """Replaces the published policy file by candidates that pass.

    A candidate passes if every weight is finite; if the exported graph equals the network, by the golden vectors that it
    carries; if :func:`check_policy` accepts it; and, with gate episodes (the trainer's ``eval_episodes``), if its success is
    not worse than that of the best file published: it is refused where the 95 % interval of the difference lies below zero.
    The files themselves are measured, that which is being served at the start included. Learning goes on after a refusal,
    and three in a row are an error. ``candidates.csv`` in the run folder has a line for each candidate.

    Args:
        trainer: The run.
        log: Log that is learned from, for the policy's notes.
        path: Policy file to replace.
        inject_bad_candidate: Number of the candidate, from 1, whose weights are corrupted; 0 for none.

    Attributes:
        published: Candidates published, in this session.
        refused: Candidates refused, in this session.
        refused_in_row: Candidates refused since the last one published.
    """

    def __init__(self, trainer: Trainer, log: Path, path: Path, inject_bad_candidate: int = 0) -> None:
        self.published = 0
        self.refused = 0
        self.refused_in_row = 0
        self._trainer = trainer
        self._log = log
        self._path = path
        self._bad = inject_bad_candidate
        self._best: Evaluation | None = None

    def begin(self) -> str:
        """Publish where there is no file yet, else measure the one there; returns words about its success."""
        if not self._path.exists():
            self.publish()
        elif self._trainer.config.eval_episodes:
            self._best = self._measure(self._path)
        return "" if self._best is None else f" from {_rate(self._best)}"

    def publish(self, *, replace_published: bool = True) -> None:
        """Put the present policy in the place of the published one, if it passes.

        Args:
            replace_published: Whether to replace a file that is there.

        Raises:
            SacflowError: Several candidates in a row were refused.
        """
        if not replace_published and self._path.exists():
            return
        candidate = self._path.with_name(f".{self._path.stem}.candidate.onnx")
        result, version, reason = None, "", ""
        try:
            self._export(candidate)
            version = file_version(candidate)
            check_policy(candidate)
            if self._trainer.config.eval_episodes:
                result = self._measure(candidate)
                self._compare(result)
            candidate.replace(self._path)
        except (SacflowError, OSError) as error:
            reason = one_line(error)
        finally:
            candidate.unlink(missing_ok=True)
        self._note(version, result, reason)
        steps, updates = self._trainer.env_steps, self._trainer.agent.updates
        if not reason:
            self.published += 1
            self.refused_in_row = 0
            if result is not None and (self._best is None or result.success_rate >= self._best.success_rate):
                self._best = result
            of = "" if result is None else f", {_rate(result)}"
            self._trainer.progress.say(
                f"  published version {version} after {steps:,} steps and {updates:,} updates{of}"
            )
            return
        self.refused += 1
        self.refused_in_row += 1
        named = f"candidate {version}" if version else "candidate"
        self._trainer.progress.say(f"  {named} refused after {steps:,} steps: {reason}")
        if self.refused_in_row >= _MOST_REFUSED:
            raise SacflowError(
                f"{_MOST_REFUSED} candidates in a row were refused; start again to go on from the one published last"
            )

    def _export(self, path: Path) -> None:
        trainer = self._trainer
        notes = {
            "algo": trainer.config.algo,
            "seed": trainer.config.seed,
            "offline_steps": trainer.done.offline_steps,
            "online_steps": trainer.env_steps,
            "followed": str(self._log),
        }
        with self._corrupted_weights():
            if not all(bool(weight.isfinite().all()) for weight in trainer.agent.exported.parameters()):
                raise SacflowError("a weight is not finite")
            export_agent(trainer.agent, notes, path)

    @contextmanager
    def _corrupted_weights(self) -> Iterator[None]:
        """The fault switch: while this lasts, the weights of the candidate to be corrupted are."""
        if self._bad != self.published + self.refused + 1:
            yield
            return
        weights = list(self._trainer.agent.exported.parameters())
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

    def _measure(self, path: Path) -> Evaluation:
        """Success of a policy file on the gate's episodes; recorded like any evaluation."""
        self._trainer.evaluate("online", OnnxPolicy(path).infer)
        return self._trainer.done.evaluations[-1]

    def _compare(self, result: Evaluation) -> None:
        """Raise SacflowError for a result that is worse than the best by more than chance explains."""
        best = self._best
        if best is None:
            return
        _, high = difference_interval(result.successes, result.episodes, best.successes, best.episodes)
        if high < 0:
            raise SacflowError(f"{_rate(result)}, worse than {_rate(best)}")

    def _note(self, version: str, result: Evaluation | None, reason: str) -> None:
        """Add a line about a candidate to ``candidates.csv``."""
        row = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": version,
            "env_steps": self._trainer.env_steps,
            "updates": self._trainer.agent.updates,
            "successes": "" if result is None else result.successes,
            "episodes": "" if result is None else result.episodes,
            "outcome": "refused" if reason else "published",
            "reason": reason,
        }
        with (self._trainer.folder.path / "candidates.csv").open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)


def check_policy(path: Path) -> None:
    """Check a candidate's golden vectors as a server would, and its actions for inputs of many sizes.

    Raises:
        PolicyFileError: It must not be served.
    """
    policy, rng = OnnxPolicy(path), np.random.default_rng(0)
    low, high = policy.spec.robot.action_bounds
    for scale in (0.1, 1.0, 3.0):
        inputs = policy.blank_inputs(32)
        for name in sorted(inputs.keys() - {PREFIX, PREFIX_MASK}):
            inputs[name][...] = rng.normal(0, 1.0 if name == NOISE else scale, inputs[name].shape)
        actions = policy.run(inputs)
        if not np.isfinite(actions).all() or (actions < low - 1e-3).any() or (actions > high + 1e-3).any():
            raise PolicyFileError(f"{path} puts out NaN, infinity, or an action out of bounds")


def _rate(result: Evaluation) -> str:
    return f"success {result.successes}/{result.episodes}"
