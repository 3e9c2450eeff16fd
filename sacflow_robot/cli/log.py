"""``sacflow-robot log``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from sacflow_robot.cli import common
from sacflow_robot.episode import Source


@dataclass(frozen=True)
class Info:
    """What an episode log holds; reading it all also checks it.

    Attributes:
        log: Episode log.
        json: Print the result as one JSON object.
    """

    log: Annotated[Path, tyro.conf.Positional]
    json: bool = False

    def run(self) -> int:
        from rich.table import Table
        from rich.text import Text

        from sacflow_robot.data.log import EpisodeLog

        log = EpisodeLog.open(self.log)
        episodes = list(log.episodes())
        solved = sum(e.success for e in episodes)
        sources: Counter[str] = Counter()
        for episode in episodes:
            values, counts = np.unique(episode.source, return_counts=True)
            sources.update({_source_name(int(v)): int(n) for v, n in zip(values, counts, strict=True)})
        versions = sorted({str(e.info["policy_version"]) for e in episodes if "policy_version" in e.info})
        lengths = [len(e) for e in episodes]
        arm = log.arm
        rows = {
            "arm": f"{arm.robot}, {arm.task}, {arm.controller}, {arm.control_rate_hz:g} Hz",
            "episodes": f"{len(episodes)}, success {common.describe_success(solved, len(episodes))}"
            if episodes
            else "0",
            "steps": f"{log.steps:,}" + (f" ({min(lengths)} to {max(lengths)} an episode)" if lengths else ""),
            "chosen by": ", ".join(f"{name} {n:,}" for name, n in sources.items()),
            "policies": ", ".join(versions) or "none",
            "simulator states": "yes, episodes can be replayed"
            if any(e.states is not None for e in episodes)
            else "no",
            "observations": ", ".join(f"{a.key} {a.shape}" for a in arm.observations),
        }
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in rows.items():
            table.add_row(Text(name, "bold"), Text(value))
        common.console().print(table)
        if self.json:
            common.print_json(
                {
                    **common.success_json(solved, len(episodes)),
                    "steps": log.steps,
                    "sources": dict(sources),
                    "policies": versions,
                }
            )
        return 0


def _source_name(value: int) -> str:
    try:
        return Source(value).name.lower()
    except ValueError:
        return f"unknown ({value})"
