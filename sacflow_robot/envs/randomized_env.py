"""robosuite task with a robot drawn anew for each episode: its dynamics, and delays, losses and noise on the way to it and back."""

import numpy as np

from sacflow_robot.envs.environment import SimulatedEnv
from sacflow_robot.envs.randomization import Draws
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.transport import Channel, Sensors, link_of
from sacflow_robot.episode import StepResult
from sacflow_robot.spec import Array, Engine, FloatArray
from sacflow_robot.utils.seeding import Stream, random_stream

_ROW_SUBSTEPS = 5  # an observation every 10 ms


class RandomizedEnv(SimulatedEnv):
    """A robosuite task with a robot drawn anew for each episode, decided by the episode's seed.

    Commands and observations are late and get lost as the robot model says: commands are taken up every 2 ms, observations
    captured every 10 ms. Reward and end are those of the true state. ``info`` of an episode holds the draw, as ``arm_model``
    (JSON).

    Raises:
        UsageError: The stock engine steps it.
    """

    engine: Engine = "compiled"

    def __init__(self, env: RobosuiteEnv, draws: Draws) -> None:
        self._env = env
        self._compiled = env.compiled
        self._draws = draws
        self.robot = env.robot
        self._substep_ns = round(1e9 * float(env.model.opt.timestep))
        self._substeps = round(env.robot.period_ns / self._substep_ns)  # of a control period

    def begin(self, seed: int) -> StepResult:
        """Start the episode that this seed decides, its robot included."""
        model = self._draws.draw(random_stream(seed, Stream.RANDOMIZATION))
        self._env.set_robot_model(model)
        start = self._env.begin(seed)
        self._rng = random_stream(seed, Stream.RANDOMIZATION, 1)
        self._sensors = Sensors(self.robot, model)
        self._commands: Channel[FloatArray] = Channel(link_of(model, "command"), self._rng)
        self._observations: Channel[dict[str, FloatArray]] = Channel(link_of(model, "observation"), self._rng)
        self._steps = 0
        self._seen = self._sensors.read(start.observation, self._rng)
        return StepResult(self._seen, state=start.state, info={"arm_model": model.to_json()})

    def command(self, action: FloatArray) -> StepResult:
        given = self.robot.check_action(action)
        begin_ns = self._steps * self._substeps * self._substep_ns
        self._commands.send(given, begin_ns, self._commands.draw_delay())
        made = self._compiled.follow(
            self._due(begin_ns), _ROW_SUBSTEPS, self._substeps // _ROW_SUBSTEPS, self._substeps
        )
        self._steps += 1
        for i, flat in enumerate(made.observations):
            captured_ns = begin_ns + _ROW_SUBSTEPS * (i + 1) * self._substep_ns
            delay_ns = self._observations.draw_delay()
            reading = self._sensors.read(self.robot.unflatten(flat), self._rng)
            self._observations.send(reading, captured_ns, delay_ns)
        for _, reading in self._observations.receive(begin_ns + self._substeps * self._substep_ns):
            self._seen = reading
        truncated = not made.solved and self._steps >= self._env.task.horizon
        return StepResult(self._seen, float(made.solved), made.solved, truncated, made.states[-1])

    def close(self) -> None:
        self._env.close()

    def _due(self, begin_ns: int) -> Array:
        """Commands (N, 2 + A) taken up in this period: substep of it, substeps of validity, action."""
        end_ns = begin_ns + self._substeps * self._substep_ns
        rows = []
        for arrival_ns, action in self._commands.receive(end_ns - 1):
            # Valid for two periods from when it is taken up, however long that took.
            substep = max(0, round(arrival_ns / self._substep_ns) - begin_ns // self._substep_ns)
            rows.append(np.concatenate([[substep, 2 * self._substeps], action]))
        return np.array(rows, np.float64).reshape(-1, 2 + self.robot.action_dim)
