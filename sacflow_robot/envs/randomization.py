"""Robots drawn at random: twins with hidden parameters, plain wide ranges, what a profile's uncertainty allows, and a
robosuite task with a robot drawn anew for each episode: its dynamics, and delays, losses and noise on the way to it and back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from sacflow_robot.envs.environment import SimulatedEnv
from sacflow_robot.envs.robot_parameters import JOINTS, Measured, RobotParameters, quantity
from sacflow_robot.envs.transport import Channel, Sensors, link_of
from sacflow_robot.episode import StepResult
from sacflow_robot.errors import UnknownNameError, UsageError
from sacflow_robot.spec import Array, Engine, FloatArray
from sacflow_robot.utils.seeding import Stream, random_stream

if TYPE_CHECKING:
    from sacflow_robot.envs.robosuite_env import RobosuiteEnv

Randomization = Literal["none", "wide", "profile"]  # ways to draw a training environment's robot for each episode

# Dry friction: the amplitudes that Gaz et al. identified on a Franka Emika Panda ("Dynamic Identification of the Franka Emika
# Panda Robot With Retrieval of Feasible Parameters Using Penalty-Based Optimization", RA-L 2019), rounded. Viscous: what
# MuJoCo Menagerie's Panda has.
FRANKA_FRICTION_NM = (0.55, 0.87, 0.64, 1.28, 0.84, 0.30, 0.56)
FRANKA_DAMPING_NM_S_PER_RAD = (1.0,) * JOINTS
STIFFNESS_PER_S2 = 150.0

TWIN_PARTS = ("delay", "gain", "friction", "payload", "noise", "pose_bias")  # parts in which a twin may differ
FRANKA = RobotParameters(
    {"joints.damping_nm_s_per_rad": FRANKA_DAMPING_NM_S_PER_RAD, "joints.friction_loss_nm": FRANKA_FRICTION_NM}
)
"""The robot that twins are made around."""


def draw_twin(seed: int, differs: str = "") -> RobotParameters:
    """Draw a robot with hidden parameters, for a calibration to find.

    Delays 0 to 150 ms each way, gains within 40 %, damping and friction of each joint by factors of 0.3 to 3, payload up to
    0.5 kg, noise of all sensors, a bias of the gripper's pose.

    Args:
        seed: Decides everything.
        differs: Only this part differs, clearly, from the nominal twin; one of ``TWIN_PARTS``. Empty: all.

    Raises:
        UnknownNameError: There is no such part.
    """
    if differs and differs not in TWIN_PARTS:
        raise UnknownNameError("part of a twin", differs, TWIN_PARTS)
    rng = random_stream(seed, Stream.TWIN)
    alone = bool(differs)
    factors = np.exp(rng.uniform(np.log(0.3), np.log(3), (2, JOINTS)))
    if alone:
        factors = np.exp(rng.choice([-1, 1], (2, 1)) * rng.uniform(np.log(2), np.log(3), (2, JOINTS)))
    delays = rng.uniform(50 if alone else 0, 150, 2)
    gains = 1 + rng.choice([-1, 1], 2) * rng.uniform(0.2 if alone else 0, 0.4, 2)
    mass, center = rng.uniform(0.3 if alone else 0, 0.5), rng.uniform([-0.02, -0.02, 0.0], [0.02, 0.02, 0.06])
    direction = rng.standard_normal(3)
    bias = direction / np.linalg.norm(direction) * rng.uniform(0.008 if alone else 0, 0.015)
    noise = rng.uniform(0.5 if alone else 0.1, 1, 3)
    parts = {
        "delay": {"transport.observation_delay_ms": delays[0], "transport.command_delay_ms": delays[1]},
        "gain": {
            "controller.translation_stiffness_per_s2": STIFFNESS_PER_S2 * gains[0],
            "controller.rotation_stiffness_per_s2": STIFFNESS_PER_S2 * gains[1],
        },
        "friction": {
            "joints.damping_nm_s_per_rad": factors[0] * FRANKA_DAMPING_NM_S_PER_RAD,
            "joints.friction_loss_nm": factors[1] * FRANKA_FRICTION_NM,
        },
        "payload": {"payload.mass_kg": mass, "payload.center_m": center},
        "noise": {
            "sensors.robot0_eef_pos.noise_m": (6e-3 if alone else 1e-3) * noise[0],
            "sensors.robot0_eef_quat.noise_rad": (2e-2 if alone else 3e-3) * noise[1],
            "sensors.robot0_joint_pos.noise_rad": (1e-2 if alone else 3e-4) * noise[1],
            "sensors.object.noise_m": (6e-3 if alone else 1e-3) * noise[2],
        },
        "pose_bias": {"sensors.robot0_eef_pos.bias_m": bias},
    }  # fmt: skip
    values = {name: v for part, own in parts.items() if not alone or part == differs for name, v in own.items()}
    return FRANKA.having({name: float(v) if np.ndim(v) == 0 else list(np.asarray(v)) for name, v in values.items()})


def draw_around(measured: Mapping[str, Measured], rng: np.random.Generator) -> RobotParameters:
    """A profile's values, each moved by its uncertainty (normal, kept within what is physically possible).

    Six digits of each, more than is ever measured, so that an episode's info has room for them.
    """
    values = {}
    for name, m in measured.items():
        known = quantity(name)
        moved = np.array(m.value) + np.array(m.uncertainty) * rng.standard_normal(len(m.value))
        values[name] = tuple(float(f"{v:.6g}") for v in np.clip(moved, known.low, known.high))
    return RobotParameters(values)


@dataclass(frozen=True)
class Draws:
    """Choice of the robot of an episode.

    Raises:
        UsageError: ``profile`` without values.
    """

    # ``none``: always ``model``; ``wide``: anything in a twin's ranges; ``profile``: around the measured values
    mode: Randomization = "none"
    measured: Mapping[str, Measured] = field(default_factory=dict)  # a profile's values, for ``profile``
    model: RobotParameters = field(default_factory=RobotParameters)  # the robot of ``none``

    def __post_init__(self) -> None:
        if self.mode == "profile" and not self.measured:
            raise UsageError("--randomize profile needs a profile with measured values; see 'sacflow-robot calibrate'")

    def draw(self, rng: np.random.Generator) -> RobotParameters:
        """The robot model of one episode."""
        if self.mode == "wide":
            return draw_twin(int(rng.integers(2**31)))  # anywhere in the ranges, as one would without measuring
        return draw_around(self.measured, rng) if self.mode == "profile" else self.model


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

    def __init__(self, env: "RobosuiteEnv", draws: Draws) -> None:
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
