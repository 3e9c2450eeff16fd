"""What happens to messages between a control loop and a simulated arm: delay, jitter, loss, noise, a network that fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from sacflow_robot.errors import DataError, UnknownNameError, UsageError, one_line
from sacflow_robot.robot.drivers import Options, engine_option
from sacflow_robot.spec import ArmSpec, Engine, FloatArray, Observation


@dataclass(frozen=True)
class LinkOptions:
    """Options of ``rtsim:TASK?NAME=VALUE&...``, or of the YAML file given as ``rtsim:TASK?file=PATH``.

    Attributes:
        obs_delay_ms: From an observation's capture to its arrival at the control loop.
        cmd_delay_ms: From a command's sending to its arrival at the arm.
        jitter_ms: Each message takes up to this much longer, drawn evenly.
        obs_drop: Share of the observations that never arrive.
        cmd_drop: Share of the commands that never arrive.
        noise_m: Standard deviation of the noise on observed lengths (m).
        noise_rad: Standard deviation of the noise on observed rotations, per axis (rad).
        down_s: When in every episode the network fails, in seconds from its start; negative for never.
        up_s: When it comes back.
        tick_ms: The arm's own cycle: it takes up commands and is observed this often.
        seed: Added to the episode's seed for what is drawn here.
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
    seed: float = 0.0

    def __post_init__(self) -> None:
        for name in ("obs_delay_ms", "cmd_delay_ms", "jitter_ms", "noise_m", "noise_rad", "seed"):
            if not 0 <= getattr(self, name) <= 1e6:
                raise UsageError(f"rtsim: {name} is {getattr(self, name):g}, expected a number that is not negative")
        for name in ("obs_drop", "cmd_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"rtsim: {name} is {getattr(self, name):g}, expected a share from 0 to below 1")
        if self.tick_ms not in (2, 10, 50):
            raise UsageError(f"rtsim: tick_ms is {self.tick_ms:g}, expected 2, 10 or 50")

    @property
    def tick_ns(self) -> int:
        return round(self.tick_ms * 1e6)


def read_options(options: Options) -> tuple[Literal["real", "virtual"], Engine, LinkOptions]:
    """Clock, engine and link of an ``rtsim`` name.

    Raises:
        UnknownNameError: An option, clock or engine that there is not.
        UsageError: A value out of its range.
        DataError: The file cannot be read.
    """
    link = LinkOptions()
    if "file" in options:
        link = _with(link, _read_file(Path(options["file"])))
    own = {name: text for name, text in options.items() if name not in ("file", "clock", "engine")}
    link = _with(link, own)
    clock = options.get("clock", "real")
    if clock not in ("real", "virtual"):
        raise UnknownNameError("clock", clock, ["real", "virtual"])
    return "virtual" if clock == "virtual" else "real", engine_option(options), link


def _with(link: LinkOptions, values: Mapping[str, object]) -> LinkOptions:
    known = [f.name for f in fields(LinkOptions)]
    numbers = {}
    for name, value in values.items():
        if name not in known:
            raise UnknownNameError("option of robot driver 'rtsim'", name, [*known, "file", "clock", "engine"])
        try:
            numbers[name] = float(str(value))
        except ValueError:
            raise UsageError(f"rtsim: {name} is {value!r}, expected a number") from None
    return replace(link, **numbers)


def _read_file(path: Path) -> Mapping[str, object]:
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"rtsim: {path} cannot be read: {one_line(error)}") from None
    if not isinstance(data, dict):
        raise DataError(f"rtsim: {path} is not a map of option names to numbers")
    return {str(name): value for name, value in data.items()}


def add_noise(arm: ArmSpec, seen: Observation, link: LinkOptions, rng: np.random.Generator) -> dict[str, FloatArray]:
    """An observation as a sensor with noise gives it. Draws the same numbers whatever the noise is."""
    noisy = {}
    for array in arm.observations:
        value = seen[array.key].astype(np.float64).reshape(-1)
        drawn = rng.standard_normal(array.size)
        turned = np.zeros(array.size, bool)
        for start in array.quaternions:
            turned[start : start + 4] = True
            value[start : start + 4] = _turned(value[start : start + 4], link.noise_rad * drawn[start : start + 3])
        if array.unit.startswith("m"):
            value = np.where(turned, value, value + link.noise_m * drawn)
        noisy[array.key] = value.astype(array.dtype).reshape(array.shape)
    return noisy


def _turned(quat: np.ndarray, vector: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """A quaternion x y z w after a small rotation vector."""
    x, y, z = vector / 2
    bx, by, bz, bw = quat
    out = quat + np.array(
        [x * bw + y * bz - z * by, y * bw + z * bx - x * bz, z * bw + x * by - y * bx, -x * bx - y * by - z * bz]
    )
    return np.asarray(out / np.linalg.norm(out))
