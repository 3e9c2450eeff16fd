"""Progress of a run in numbers, as its checkpoint keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sacflow_robot.learn.metrics import Evaluation


@dataclass
class Counters:
    """Progress of a run, as JSON in its checkpoint.

    Attributes:
        offline_steps: Updates on demonstrations done.
        env_steps: Environment steps learned from online.
        evaluations: Evaluations so far.
        episodes_begun: Episodes of the training robots, whose seeds follow from their number.
        updates_owed: Updates that the steps so far call for and that are not done.
        evaluation_due: Whether an evaluation comes before the next round.
        recent: Outcomes of the last training episodes.
        normalized: Whether the observation normalizer is fitted.
        schedule: State of the regularization schedule.
        logged: Episodes in the folder's log.
        wall_s: Seconds spent, over all resumptions.
        rng: State of the replay generator.
        metric_rows: Rows of metrics.csv.
        latest_metrics: Last value of each of the update's figures.
    """

    offline_steps: int = 0
    env_steps: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)
    episodes_begun: int = 0
    updates_owed: float = 0.0
    evaluation_due: bool = False
    recent: list[bool] = field(default_factory=list)
    normalized: bool = True
    schedule: dict[str, Any] = field(default_factory=dict)
    logged: int = 0
    wall_s: float = 0.0
    rng: Mapping[str, Any] = field(default_factory=dict)
    metric_rows: int = 0
    latest_metrics: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Counters:
        """Inverse of :meth:`to_json`."""
        counters = Counters(**json.loads(text))
        counters.evaluations = [Evaluation(**each) for each in json.loads(text)["evaluations"]]
        return counters
