"""Options of the studies, and the sizes that they stand for. Imports no torch, so that --help stays quick."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from sacflow_robot.errors import UsageError

_LEAST = {"seed": 0, "samples": 1000}  # of numbers that options give; 1 of all others


@dataclass(frozen=True)
class StudyOptions:
    """Options of all studies.

    Attributes:
        out: Folder for PNG, CSV and reading.
        seed: First seed.
        full: Take the published sizes and budgets, meant for a GPU.
        workers: Processes at once; by default one for each core.
    """

    out: Path = Path("docs/studies")
    seed: int = 0
    full: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        for option in fields(self):
            value, least = getattr(self, option.name), _LEAST.get(option.name, 1)
            numbers = value if isinstance(value, tuple) else (value,)
            if option.default and not numbers:
                numbers = (0,)
            for number in numbers:
                if type(number) is int and number < least:
                    name = option.name.replace("_", "-")
                    raise UsageError(f"--{name} is {number}; it must be at least {least}")

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

    @property
    def update_count(self) -> int:
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

    @property
    def sample_count(self) -> int:
        return (1_000_000 if self.full else 100_000) if self.samples is None else self.samples


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

    @property
    def steps(self) -> tuple[int, int]:
        """Updates of cloning, and environment steps online."""
        offline, online = (100_000, 100_000) if self.full else self.quick
        return (
            offline if self.offline_steps is None else self.offline_steps,
            online if self.online_steps is None else self.online_steps,
        )

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
