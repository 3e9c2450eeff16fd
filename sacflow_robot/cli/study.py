"""``sacflow-robot study``."""

from __future__ import annotations

import datetime
import platform
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sacflow_robot import __version__
from sacflow_robot.cli import common
from sacflow_robot.errors import UsageError

if TYPE_CHECKING:
    from sacflow_robot.interfaces import VectorEnv
    from sacflow_robot.study.report import Report
    from sacflow_robot.study.runs import RunAll

_Work = Callable[["RunAll"], "Report"]


@dataclass(frozen=True)
class _Study:
    """Options of all studies.

    Attributes:
        out: Folder for PNG, CSV and reading; by default docs/studies, where the documentation shows them.
        seed: First seed.
        full: Take the published sizes and budgets, meant for a GPU.
        workers: Processes at once; by default one for each core.
        json: Print one JSON object.
    """

    out: Path | None = None
    seed: int = 0
    full: bool = False
    workers: int | None = None
    json: bool = False

    def _check(self, **positive: int) -> None:
        if self.seed < 0:
            raise UsageError(f"--seed is {self.seed}; it must be at least 0")
        for name, value in {"workers": 1 if self.workers is None else self.workers, **positive}.items():
            if value < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")

    def _given(self) -> list[str]:
        """The options that make the result what it is, as on a command line."""
        words = [f"--seed {self.seed}"]
        for option in fields(self):
            value, name = getattr(self, option.name), option.name.replace("_", "-")
            if option.name in ("out", "seed", "workers", "json") or value == option.default:
                continue
            values = value if isinstance(value, tuple) else [value]
            words.append(f"--{name}" if value is True else f"--{name} {shlex.join(map(str, values))}")
        return words

    def _carry_out(self, name: str, work: _Work) -> int:
        """Run the study, write its files, say what they say."""
        from sacflow_robot.envs.vector_env import core_count
        from sacflow_robot.study.report import make_folder
        from sacflow_robot.study.runs import in_parallel

        folder, began = make_folder(self.out or Path("docs/studies")), time.monotonic()
        with common.progress_bar("cases") as bar:
            row = bar.add_task(name, total=0, success="")

            def run_all(work: Callable[[Any], Any], cells: Sequence[Any]) -> list[Any]:
                bar.update(row, total=(bar.tasks[row].total or 0) + len(cells))
                return in_parallel(work, cells, self.workers or core_count(), lambda: bar.advance(row))

            report = work(run_all)
        wall_s = time.monotonic() - began
        command = common.command_line("study", name, *self._given())
        made_by = (
            f"Made by `{command}`, sacflow-robot {__version__}, {datetime.date.today().isoformat()}, "
            f"{platform.machine()} with {core_count()} cores, in {wall_s / 60:.1f} minutes."
        )
        paths = report.write(folder, made_by)
        out = common.results(self.json)
        out.print(report.reading)
        for path in paths.values():
            out.print(f"wrote {path}")
        if self.json:
            files = {kind: str(path) for kind, path in paths.items()}
            finished: list[dict[str, Any]] = [
                {k: None if isinstance(v, float) and v != v else v for k, v in r.items()} for r in report.rows
            ]
            result = {"study": name, "wall_s": round(wall_s, 1), "reading": report.reading, "files": files}
            common.print_json({**result, "rows": finished})
        return 0

    @property
    def _device(self) -> str:
        return "auto" if self.full else "cpu"


@dataclass(frozen=True)
class Gradients(_Study):
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

    def run(self) -> int:
        from sacflow_robot.study import gradients

        updates = (50_000 if self.full else 500) if self.updates is None else self.updates
        self._check(seeds=self.seeds, updates=updates, euler_steps=min(self.euler_steps, default=0))
        setup = gradients.Setup(
            variants=self.variants or tuple(gradients.VARIANTS),
            euler_steps=self.euler_steps,
            updates=updates,
            seeds=range(self.seed, self.seed + self.seeds),
            env=self.env,
            make_vector_env=partial(_gymnasium_robots, self.env),
            full=self.full,
            device=self._device,
        )
        return self._carry_out("gradients", partial(gradients.study_gradients, setup))


@dataclass(frozen=True)
class Likelihood(_Study):
    """Path density, drift and exact density against targets known in closed form.

    Attributes:
        samples: Samples of each marginal; by default 100 000, a million with --full.
    """

    samples: int | None = None

    def run(self) -> int:
        from sacflow_robot.study import likelihood

        samples = (1_000_000 if self.full else 100_000) if self.samples is None else self.samples
        if samples < 1000:
            raise UsageError(f"--samples is {samples}; it must be at least 1000")
        self._check()
        setup = likelihood.Setup(samples=samples, seed=self.seed)
        return self._carry_out("likelihood", partial(likelihood.study_likelihood, setup))


@dataclass(frozen=True)
class _Trials(_Study):
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

    _quick: ClassVar[tuple[int, int]] = 2000, 6000  # steps offline and online without --full

    def _budget(self) -> Any:
        from sacflow_robot.study.trial import Budget

        offline, online = (100_000, 100_000) if self.full else self._quick
        offline = offline if self.offline_steps is None else self.offline_steps
        online = online if self.online_steps is None else self.online_steps
        self._check(seeds=self.seeds, offline_steps=offline, online_steps=online, episodes=self.episodes)
        return Budget(
            offline_steps=offline, online_steps=online, episodes=self.episodes, full=self.full, device=self._device
        )


@dataclass(frozen=True)
class Architecture(_Trials):
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

    _quick: ClassVar[tuple[int, int]] = 1000, 2800  # some 50 runs, which are to be done in 20 minutes

    def run(self) -> int:
        from sacflow_robot.envs.tasks import get_robot
        from sacflow_robot.study import architecture

        setup = architecture.Setup(
            range(self.seed, self.seed + self.seeds),
            self._budget(),
            get_robot(self.task),
            widths=self.widths,
            euler_steps=self.euler_steps,
        )
        self._check(widths=min(self.widths, default=0), euler_steps=min(self.euler_steps, default=0))
        return self._carry_out("architecture", partial(architecture.study_architecture, setup))


@dataclass(frozen=True)
class Regularization(_Trials):
    """The three regularizers and three schedules on a task whose demonstrations show two ways."""

    def run(self) -> int:
        from sacflow_robot.study import regularization

        setup = regularization.Setup(range(self.seed, self.seed + self.seeds), self._budget())
        return self._carry_out("regularization", partial(regularization.study_regularization, setup))


def _gymnasium_robots(env: str, count: int) -> VectorEnv:
    """Robots in this process: they are cheap to step, and a study has a process for each run already."""
    from sacflow_robot.envs.gymnasium_env import GymnasiumEnv
    from sacflow_robot.study.runs import LocalVectorEnv

    return LocalVectorEnv([GymnasiumEnv(env) for _ in range(count)])
