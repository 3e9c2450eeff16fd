"""``sacflow-robot demos``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sacflow_robot.cli import common
from sacflow_robot.errors import UsageError
from sacflow_robot.spec import Engine
from sacflow_robot.utils.atomic_files import check_output


@dataclass(frozen=True)
class Collect:
    """Collect demonstrations from a task's scripted expert, on all cores.

    Attributes:
        env: Task.
        quality: How good the expert is: proficient hardly ever fails, mixed is like a group of people, poor often fails.
        episodes: Episodes to collect.
        out: Episode log to make.
        seed: First environment seed, which decides the expert's style too.
        env_engine: What steps the robots: compiled, or robosuite's own (stock).
        json: Print the result as one JSON object.
    """

    out: Path
    env: str = "lift"
    quality: Literal["proficient", "mixed", "poor"] = "mixed"
    episodes: int = 200
    seed: int = 1_000_000
    env_engine: Engine = "compiled"
    json: bool = False

    def run(self) -> int:
        from sacflow_robot.data.log.episode_writer import write_log
        from sacflow_robot.envs.experts.expert import make_expert
        from sacflow_robot.envs.tasks import get_task
        from sacflow_robot.learn.training_data import collect_demos

        if self.episodes < 1 or self.seed < 0:
            raise UsageError("--episodes must be at least 1 and --seed not negative")
        robot = get_task(self.env).robot
        make_expert(self.env, 0, self.quality)
        if self.out.exists():
            raise UsageError(f"{self.out} exists already; give another --out or remove it")
        check_output(self.out)
        episodes = collect_demos(self.env, self.quality, self.episodes, self.seed, self.env_engine)
        write_log(self.out, robot, episodes)
        solved, steps = sum(e.success for e in episodes), sum(map(len, episodes))
        common.results(self.json).print(
            f"wrote {self.out}: {len(episodes)} episodes, {steps:,} steps, success "
            f"{common.describe_success(solved, len(episodes))}"
        )
        if self.json:
            common.print_json({**common.success_json(solved, len(episodes)), "steps": steps, "out": str(self.out)})
        return 0
