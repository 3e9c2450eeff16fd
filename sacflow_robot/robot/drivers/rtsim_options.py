"""Options of the ``rtsim`` driver: delay, jitter, loss, noise, a network that fails, clocks that differ, a robot model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import yaml

from sacflow_robot.envs.robot_parameters import SECTIONS, RobotParameters, model_of, read_sections
from sacflow_robot.envs.transport import JOINT_POSITION, Link
from sacflow_robot.errors import DataError, UnknownNameError, UsageError, one_line
from sacflow_robot.robot.drivers.options import Options, engine_option
from sacflow_robot.spec import ArraySpec, Engine, RobotSpec

_MODELS = "profile", "twin", "differs", "model"
_TRANSPORT = {
    "obs_delay_ms": "observation_delay_ms",
    "cmd_delay_ms": "command_delay_ms",
    "jitter_ms": "jitter_ms",
    "obs_drop": "observation_drop_ratio",
    "cmd_drop": "command_drop_ratio",
}

_RANGES = {
    **dict.fromkeys(("obs_delay_ms", "cmd_delay_ms", "jitter_ms", "horizon_s", "seed"), (0.0, 1e6)),
    "noise_m": (0.0, 1.0),
    "noise_rad": (0.0, math.pi),
    "clock_offset_ms": (-1e12, 1e12),
    "clock_drift_ppm": (-1e4, 1e4),
}


@dataclass(frozen=True)
class RtsimOptions:
    """Options of ``rtsim:TASK?NAME=VALUE&...``, or of the YAML file given as ``rtsim:TASK?file=PATH``.

    Attributes:
        obs_delay_ms: From an observation's capture to its arrival at the control loop.
        cmd_delay_ms: From a command's sending to its arrival at the robot.
        jitter_ms: Each message takes up to this much longer, drawn evenly.
        obs_drop: Share of the observations that never arrive.
        cmd_drop: Share of the commands that never arrive.
        noise_m: Standard deviation of the noise on observed lengths (m).
        noise_rad: Standard deviation of the noise on observed rotations, per axis (rad).
        down_s: When in every episode the network fails, in seconds from its start; negative for never.
        up_s: When it comes back.
        tick_ms: The robot's own cycle: it takes up commands and is observed this often.
        horizon_s: Length after which an episode is cut; 0 for the task's own.
        seed: Added to the episode's seed for what is drawn here.
        clock_offset_ms: Observations are stamped by a clock of the robot's that is so much ahead of the control loop's.
        clock_drift_ppm: And gains as much on it.
        joints: 1 to observe the joint positions as well, which no policy here was trained with.
        model: What the robot is like. In a name: ``profile=PATH`` takes a calibration profile's measured values, and
            ``twin=SEED`` draws a robot with hidden ones, of which ``differs=PART`` keeps only a part; either has a cycle of
            2 ms unless the name says otherwise.
    """

    obs_delay_ms: float = 0.0
    cmd_delay_ms: float = 0.0
    jitter_ms: float = 0.0
    obs_drop: float = 0.0
    cmd_drop: float = 0.0
    noise_m: float = 0.0
    noise_rad: float = 0.0
    down_s: float = -1.0
    up_s: float = -1.0
    tick_ms: float = 10.0
    horizon_s: float = 0.0
    seed: float = 0.0
    clock_offset_ms: float = 0.0
    clock_drift_ppm: float = 0.0
    joints: float = 0.0
    model: RobotParameters = field(default_factory=RobotParameters)

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"rtsim: {name} is {value:g}, expected a number from {low:g} to {high:g}")
        for name in ("obs_drop", "cmd_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"rtsim: {name} is {getattr(self, name):g}, expected a share from 0 to below 1")
        if self.tick_ms not in (2, 10, 50):
            raise UsageError(f"rtsim: tick_ms is {self.tick_ms:g}, expected 2, 10 or 50")

    def robot(self, robot: RobotSpec) -> RobotSpec:
        """The robot with the observations that these options add."""
        if not self.joints:
            return robot
        return replace(robot, observations=(*robot.observations, ArraySpec(JOINT_POSITION, (7,), "rad")))

    def sensors(self, robot: RobotSpec) -> RobotParameters:
        """The model with ``noise_m`` and ``noise_rad`` added to its sensors' own noise."""
        noise = {}
        for array in robot.observations:
            if array.unit.startswith("m"):
                noise[f"sensors.{array.key}.noise_m"] = self.noise_m
            if array.quaternions:
                noise[f"sensors.{array.key}.noise_rad"] = self.noise_rad
        return self.model.having({n: math.hypot(v, self.model.number(n)) for n, v in noise.items() if v})

    @property
    def observation_link(self) -> Link:
        return Link(self.obs_delay_ms, self.jitter_ms, self.obs_drop)

    @property
    def command_link(self) -> Link:
        return Link(self.cmd_delay_ms, self.jitter_ms, self.cmd_drop)

    @property
    def tick_ns(self) -> int:
        return round(self.tick_ms * 1e6)

    def stamp_ns(self, time_ns: int) -> int:
        """A time of the control loop's clock by the robot's own."""
        return time_ns + round(1e6 * self.clock_offset_ms) + round(1e-6 * self.clock_drift_ppm * time_ns)


def read_options(options: Options) -> tuple[Literal["real", "virtual"], Engine, RtsimOptions]:
    """Read clock, engine and options of an ``rtsim`` name.

    Raises:
        UnknownNameError: There is no such option, clock or engine.
        UsageError: A value is out of its range.
        DataError: The file cannot be read.
    """
    made = RtsimOptions()
    if "file" in options:
        made = _with(made, _read_file(Path(options["file"])))
    own = {name: text for name, text in options.items() if name not in ("file", "clock", "engine", *_MODELS)}
    made = _with(replace(made, tick_ms=2.0) if set(options) & {"profile", "twin"} else made, own)
    model = _read_model(options)
    if model:
        if engine_option(options) == "stock" and model.part("controller", "joints", "payload"):
            raise UsageError("rtsim: a robot's own dynamics need the compiled engine; leave out engine=stock")
        made = _with_transport(replace(made, model=model), own)
    clock = options.get("clock", "real")
    if clock not in ("real", "virtual"):
        raise UnknownNameError("clock", clock, ["real", "virtual"])
    return "virtual" if clock == "virtual" else "real", engine_option(options), made


def _with_transport(made: RtsimOptions, own: Mapping[str, object]) -> RtsimOptions:
    """The model's delays and losses, where the name does not give others."""
    values = {
        option: made.model.number(f"transport.{name}")
        for option, name in _TRANSPORT.items()
        if option not in own and f"transport.{name}" in made.model
    }
    return replace(made, **values)  # type: ignore[arg-type]


def _read_model(options: Options) -> RobotParameters:
    given = [name for name in ("profile", "twin", "model") if name in options]
    if len(given) > 1:
        raise UsageError(f"rtsim: {' and '.join(given)} both say what the robot is like; give one")
    if "differs" in options and "twin" not in options:
        raise UsageError("rtsim: differs=PART is about a twin; give twin=SEED as well")
    try:
        if "model" in options:
            return RobotParameters.from_json(options["model"])
        if "profile" in options:
            data = _read_file(Path(options["profile"]))
            return model_of(read_sections({s: data[s] for s in SECTIONS if s in data}))
        if "twin" in options:
            from sacflow_robot.envs.randomization import draw_twin

            if not options["twin"].isdigit():
                raise UsageError(f"rtsim: twin is {options['twin']!r}, expected a seed")
            return draw_twin(int(options["twin"]), options.get("differs", ""))
    except (ValueError, TypeError) as error:
        raise DataError(f"rtsim: {given[0]}: {one_line(error)}") from None
    return RobotParameters()


def _with(made: RtsimOptions, values: Mapping[str, object]) -> RtsimOptions:
    known = [f.name for f in fields(RtsimOptions) if f.name != "model"]
    numbers = {}
    for name, value in values.items():
        if name not in known:
            raise UnknownNameError(
                "option of robot driver 'rtsim'", name, [*known, "file", "clock", "engine", *_MODELS]
            )
        try:
            numbers[name] = float(str(value))
        except ValueError:
            raise UsageError(f"rtsim: {name} is {value!r}, expected a number") from None
    return replace(made, **numbers)  # type: ignore[arg-type]


def _read_file(path: Path) -> Mapping[str, object]:
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"rtsim: {path} cannot be read: {one_line(error)}") from None
    if not isinstance(data, dict):
        raise DataError(f"rtsim: {path} is not a map of option names to numbers")
    return {str(name): value for name, value in data.items()}
