"""Training robots that are not the nominal one: dynamics, delays, losses and noise of a robot model, drawn anew for each episode."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from sacflow_robot.envs.randomization import Randomization, draw_around, draw_wide
from sacflow_robot.envs.robosuite_env import RobosuiteEnv, make_spaces
from sacflow_robot.envs.robot_parameters import Measured, RobotParameters
from sacflow_robot.envs.sensing import Sensors
from sacflow_robot.envs.transport import Channel, command_link, observation_link
from sacflow_robot.envs.vector_env import core_count
from sacflow_robot.episode import StepResult
from sacflow_robot.errors import UsageError
from sacflow_robot.spec import Engine, FloatArray, RobotSpec
from sacflow_robot.utils.action_history import KEY, push, robot_with_history, start_history
from sacflow_robot.utils.seeding import Stream, random_stream

_ROW_SUBSTEPS = 5  # an observation every 10 ms


@dataclass(frozen=True)
class Draws:
    """Choice of the robot of an episode.

    Attributes:
        mode: ``none``: always ``model``; ``wide``: anything in a twin's ranges; ``profile``: around the measured values.
        measured: A profile's values, for ``profile``.
        model: The robot of ``none``.
        history: Actions commanded before each observation that the observation holds as well, newest last; 0 for none.

    Raises:
        UsageError: ``profile`` without values.
    """

    mode: Randomization = "none"
    measured: Mapping[str, Measured] = field(default_factory=dict)
    model: RobotParameters = field(default_factory=RobotParameters)
    history: int = 0

    def __post_init__(self) -> None:
        if self.mode == "profile" and not self.measured:
            raise UsageError("--randomize profile needs a profile with measured values; see 'sacflow-robot calibrate'")
        if not 0 <= self.history <= 100:
            raise UsageError(f"the action history is {self.history}; it must be from 0 to 100")

    def __bool__(self) -> bool:
        return self.mode != "none" or bool(self.model) or self.history > 0

    def draw(self, rng: np.random.Generator) -> RobotParameters:
        if self.mode == "wide":
            return draw_wide(rng)
        return draw_around(self.measured, rng) if self.mode == "profile" else self.model


class RandomizedEnv(gymnasium.Wrapper[dict[str, FloatArray], FloatArray, dict[str, FloatArray], FloatArray]):
    """A robosuite task with a robot drawn anew at each reset, decided by the reset's seed.

    Commands and observations are late and get lost as the robot model says: commands are taken up every 2 ms, observations
    captured every 10 ms. Reward and end are those of the true state. ``info`` of a reset holds the draw, as ``arm_model`` (JSON).

    Args:
        env: The environment; the compiled engine has to step it.
        draws: How the robot is drawn.

    Raises:
        UsageError: The stock engine steps it.
    """

    def __init__(self, env: RobosuiteEnv, draws: Draws) -> None:
        super().__init__(env)
        self._robosuite, self._draws = env, draws
        self.robot = robot_with_history(env.robot, draws.history)
        self.observation_space = make_spaces(self.robot)[0]  # type: ignore[assignment]
        self._substep_ns = round(1e9 * float(env.model.opt.timestep))
        self._substeps = round(env.robot.period_ns / self._substep_ns)  # of a control period
        self.model = RobotParameters()
        env.compiled  # noqa: B018 (refuses the stock engine)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, FloatArray], dict[str, Any]]:
        own = int(self.np_random.integers(2**31)) if seed is None else seed
        self.model = self._draws.draw(random_stream(own, Stream.RANDOMiZATION))
        self._robosuite.set_robot_model(self.model)
        observation, info = self.env.reset(seed=seed, options=options)
        self._rng = random_stream(own, Stream.RANDOMiZATION, 1)
        self._sensors = Sensors(self._robosuite.robot, self.model)
        self._commands: Channel[FloatArray] = Channel(command_link(self.model), self._rng)
        self._observations: Channel[dict[str, FloatArray]] = Channel(observation_link(self.model), self._rng)
        self._steps = 0
        self._seen = self._sensors.read(observation, self._rng)
        self._history = start_history(self._robosuite.robot, self._draws.history)
        return self._observation(), {**info, "arm_model": self.model.to_json()}

    def step(self, action: FloatArray) -> tuple[dict[str, FloatArray], Any, bool, bool, dict[str, Any]]:
        """Command one action (7,) and let one control period (50 ms) pass.

        Raises:
            InvalidValueError: The action has the wrong shape or holds NaN or infinity.
        """
        given = self._robosuite.robot.check_action(action)
        begin_ns = self._steps * self._substeps * self._substep_ns
        self._commands.send(given, begin_ns, self._commands.draw_delay())
        made = self._robosuite.compiled.follow(
            self._due(begin_ns), _ROW_SUBSTEPS, self._substeps // _ROW_SUBSTEPS, self._substeps
        )
        self._steps += 1
        for i, flat in enumerate(made.observations):
            captured_ns = begin_ns + _ROW_SUBSTEPS * (i + 1) * self._substep_ns
            delay_ns = self._observations.draw_delay()
            reading = self._sensors.read(self._robosuite.robot.unflatten(flat), self._rng)
            self._observations.send(reading, captured_ns, delay_ns)
        for _, reading in self._observations.receive(begin_ns + self._substeps * self._substep_ns):
            self._seen = reading
        if len(self._history):
            self._history = push(self._history, given)
        truncated = not made.solved and self._steps >= self._robosuite.task.horizon
        info = {"success": made.solved, "state": made.states[-1]}
        return self._observation(), float(made.solved), made.solved, truncated, info

    def _due(self, begin_ns: int) -> npt.NDArray[np.float64]:
        """Commands (N, 2 + A) taken up in this period: substep of it, substeps of validity, action."""
        end_ns = begin_ns + self._substeps * self._substep_ns
        rows = []
        for arrival_ns, action in self._commands.receive(end_ns - 1):
            # Valid for two periods from when it is taken up, however long that took.
            substep = max(0, round(arrival_ns / self._substep_ns) - begin_ns // self._substep_ns)
            rows.append(np.concatenate([[substep, 2 * self._substeps], action]))
        return np.array(rows, np.float64).reshape(-1, 2 + self._robosuite.robot.action_dim)

    def _observation(self) -> dict[str, FloatArray]:
        return {**self._seen, **({KEY: self._history} if len(self._history) else {})}


class RandomizedVectorEnv:
    """``VectorEnv`` of randomized environments, each in a thread.

    Args:
        task: Name of the task.
        count: Number of robots.
        draws: How the robot of an episode is drawn.
        background: Whether they move while the caller does something else.

    Raises:
        UnknownNameError: No such task.
        UsageError: The compiled engine does not step the task.
    """

    def __init__(self, task: str, count: int, draws: Draws, *, background: bool = True) -> None:
        self._envs = [RandomizedEnv(RobosuiteEnv(task, engine="compiled"), draws) for _ in range(count)]
        self._threads = ThreadPoolExecutor(max(1, min(core_count(), count)), "arm") if background else None
        self._busy: dict[int, Future[list[StepResult]]] = {}
        self._told: dict[int, FloatArray] = {}

    @property
    def spec(self) -> RobotSpec:
        return self._envs[0].robot

    @property
    def engine(self) -> Engine:
        return "compiled"

    def __len__(self) -> int:
        return len(self._envs)

    def about(self, index: int) -> dict[str, Any]:
        """Entries of the log for a robot's episode: its draw."""
        return {"arm_model": self._envs[index].model.to_json()}

    def begin(self, starts: Mapping[int, int]) -> dict[int, StepResult]:
        """Start episodes: robot index to seed."""
        found = {}
        for index, seed in starts.items():
            observation, info = self._envs[index].reset(seed=seed)
            found[index] = StepResult(observation, state=info["state"])
        return found

    def send(self, chunks: Mapping[int, FloatArray]) -> None:
        """Have robots execute chunks (H, A) in the background, each stopping early where its episode ends."""
        if self._threads is None:
            self._told = dict(chunks)
            return
        self._busy = {i: self._threads.submit(self._execute, i, chunk) for i, chunk in chunks.items()}

    def receive(self) -> dict[int, list[StepResult]]:
        """Wait for what was sent; per robot one result for each action executed."""
        if self._threads is None:
            told, self._told = self._told, {}
            return {i: self._execute(i, chunk) for i, chunk in told.items()}
        busy, self._busy = self._busy, {}
        return {i: job.result() for i, job in busy.items()}

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> RandomizedVectorEnv:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _execute(self, index: int, chunk: FloatArray) -> list[StepResult]:
        results = []
        for action in chunk:
            observation, reward, terminated, truncated, info = self._envs[index].step(action)
            results.append(StepResult(observation, float(reward), terminated, truncated, info["state"]))
            if results[-1].ended:
                break
        return results
