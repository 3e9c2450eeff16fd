"""Options of the studies, and the sizes that they stand for. Imports no torch, so that --help stays quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sacflow_robot.errors import UsageError


@dataclass(frozen=True)
class StudyOptions:
    """Options of all studies.

    Attributes:
        out: Folder for PNG, CSV and reading.
        seed: First seed.
        full: Take the published sizes and budgets, meant for a GPU.
        workers: Processes at once; by default one for each core.
        json: Print one JSON object.
    """

    out: Path = Path("docs/studies")
    seed: int = 0
    full: bool = False
    workers: int | None = None
    json: bool = False

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"--seed is {self.seed}; it must be at least 0")
        check_positive(workers=1 if self.workers is None else self.workers)

    @property
    def device(self) -> str:
        return "auto" if self.full else "cpu"


@dataclass(frozen=True)
class GradientsOptions(StudyOptions):
    """Gradient norm at each step of the rollout, by velocity network and number of steps K.

    Attributes:
        seeds: Seeds of each case.
        updates: Updates of SAC from scratch before the second measurement; by default 500, 50 000 with --full.
        euler_steps: Numbers of steps K.
        variants: Velocity networks, with or without another cure; all by default.
        env: Gymnasium id of what is learned.
    """

    seeds: int = 3
    updates: int | None = None
    euler_steps: tuple[int, ...] = (4, 7, 10, 16)
    variants: tuple[str, ...] = ()
    env: str = "HalfCheetah-v5"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(seeds=self.seeds, updates=self.update_count, euler_steps=min(self.euler_steps, default=0))

    @property
    def update_count(self) -> int:
        """Updates of SAC, one for each environment step, after which it is measured again."""
        return (50_000 if self.full else 500) if self.updates is None else self.updates

    @property
    def all_seeds(self) -> range:
        return range(self.seed, self.seed + self.seeds)


@dataclass(frozen=True)
class LikelihoodOptions(StudyOptions):
    """Path density, drift and exact density against targets known in closed form.

    Attributes:
        samples: Samples of each marginal; by default 100 000, a million with --full. Expectations take a fifth.
    """

    samples: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample_count < 1000:
            raise UsageError(f"--samples is {self.sample_count}; it must be at least 1000")

    @property
    def sample_count(self) -> int:
        return (1_000_000 if self.full else 100_000) if self.samples is None else self.samples


@dataclass(frozen=True)
class Budget:
    """Size of a run on the task of two ways.

    Attributes:
        demos: Demonstrations, the same for all runs.
        offline_steps: Updates of cloning.
        online_steps: Environment steps online.
        episodes: Episodes that each policy is judged by at the end, from starts held out.
        full: Take the published network sizes, batch and updates per step.
        device: Where to compute.
    """

    demos: int = 200
    offline_steps: int = 2000
    online_steps: int = 6000
    episodes: int = 100
    full: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class TrialOptions(StudyOptions):
    """Options of studies on the task of two ways.

    Attributes:
        seeds: Seeds of each case.
        offline_steps: Updates of cloning; by default 2 000 (architecture: 1 000), 100 000 with --full.
        online_steps: Environment steps online; by default 6 000 (architecture: 2 800), 100 000 with --full.
        episodes: Episodes that each policy is judged by.
    """

    seeds: int = 3
    offline_steps: int | None = None
    online_steps: int | None = None
    episodes: int = 100

    quick: ClassVar[tuple[int, int]] = 2000, 6000
    """Steps offline and online without --full."""

    def __post_init__(self) -> None:
        super().__post_init__()
        budget = self.budget
        offline, online = budget.offline_steps, budget.online_steps
        check_positive(seeds=self.seeds, offline_steps=offline, online_steps=online, episodes=self.episodes)

    @property
    def budget(self) -> Budget:
        offline, online = (100_000, 100_000) if self.full else self.quick
        offline = offline if self.offline_steps is None else self.offline_steps
        online = online if self.online_steps is None else self.online_steps
        return Budget(200, offline, online, self.episodes, self.full, self.device)

    @property
    def all_seeds(self) -> range:
        return range(self.seed, self.seed + self.seeds)


@dataclass(frozen=True)
class ArchitectureOptions(TrialOptions):
    """Gate initialization, heads, width and K: gradient norms, success, and microseconds per action.

    Attributes:
        task: Robot at whose sizes an action's cost is measured.
        widths: Widths, at K = 4.
        euler_steps: Numbers of steps K, at a width of 128.
    """

    task: str = "lift"
    seeds: int = 2
    widths: tuple[int, ...] = (32, 128, 256)
    euler_steps: tuple[int, ...] = (1, 4, 16)

    quick: ClassVar[tuple[int, int]] = 1000, 2800  # some 50 runs, which are to be done in 20 minutes

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(widths=min(self.widths, default=0), euler_steps=min(self.euler_steps, default=0))


def check_positive(**values: int) -> None:
    """Refuse options below 1.

    Raises:
        UsageError: There is one.
    """
    for name, value in values.items():
        if value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
