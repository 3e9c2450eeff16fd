"""Configuration of a LeRobot robot, and the robot that LeRobot makes of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import yaml

from sacflow_robot.errors import DataError, UsageError, one_line


class LeRobot(Protocol):
    """The part of ``lerobot.robots.Robot`` that the driver uses."""

    @property
    def observation_features(self) -> Mapping[str, Any]: ...

    @property
    def action_features(self) -> Mapping[str, Any]: ...

    @property
    def is_connected(self) -> bool: ...

    @property
    def is_calibrated(self) -> bool: ...

    def connect(self, calibrate: bool = True) -> None: ...

    def get_observation(self) -> Mapping[str, Any]: ...

    def send_action(self, action: dict[str, Any]) -> Mapping[str, Any]: ...

    def disconnect(self) -> None: ...


@dataclass(frozen=True)
class LeRobotConfig:
    """Settings that LeRobot's own configuration lacks.

    Attributes:
        joints: Per action feature of the robot, lowest and highest position, in LeRobot's unit. An action of -1 and 1
            stands for them; nothing beyond is commanded.
        robot: Fields of LeRobot's configuration class, e.g. ``port`` and ``id``.
        unit: LeRobot's unit with that configuration, e.g. ``deg``, or ``%`` of the calibrated range.
        task: Task, as policies are trained for it.
        control_rate_hz: Actions per second.
        horizon: Control periods after which an episode is cut.
    """

    joints: Mapping[str, tuple[float, float]]
    robot: Mapping[str, Any]
    unit: str = "% of range"
    task: str = "task"
    control_rate_hz: float = 30.0
    horizon: int = 600


def load_config(path: Path | str) -> LeRobotConfig:
    """Read a configuration, a YAML map of the attributes above.

    Raises:
        DataError: It cannot be read, or has no bounds that make sense.
    """
    try:
        data = dict(yaml.safe_load(Path(path).read_text()))
        joints = {str(name): (float(low), float(high)) for name, (low, high) in data.pop("joints").items()}
        config = LeRobotConfig(joints, dict(data.pop("robot", {})), **data)
        if not joints or not all(math.isfinite(a) and math.isfinite(b) and a < b for a, b in joints.values()):
            raise ValueError("each joint needs a lowest and a higher highest position")
        if not 0 < config.control_rate_hz <= 1000 or config.horizon < 1:
            raise ValueError("control_rate_hz must be above 0 and at most 1000, horizon at least 1")
        return config
    except KeyError as error:
        raise DataError(
            f"{path} lacks {error}: lowest and highest position of each joint, without which none is moved"
        ) from None
    except (OSError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise DataError(f"{path} is no configuration of a LeRobot robot: {one_line(error)}") from None


def find_lerobot(name: str, settings: Mapping[str, Any]) -> LeRobot:
    """The LeRobot robot registered under that name, not connected yet.

    Raises:
        UsageError: lerobot is not installed, knows no such robot, or refuses the settings.
    """
    try:
        robots = import_module("lerobot.robots")
    except ImportError as error:
        raise UsageError(
            f"lerobot cannot be imported ({one_line(error)}); install it beside this package, in an environment without "
            "the extra 'train', whose torch it does not bear"
        ) from None
    with contextlib.suppress(ImportError, AttributeError):  # from lerobot 0.4.1 on: robots of installed plugins
        import_module("lerobot.utils.import_utils").register_third_party_plugins()
    with contextlib.suppress(ImportError):  # a robot registers itself when its module is imported
        import_module(f"lerobot.robots.{name}")
    known = robots.RobotConfig.get_known_choices()
    if name not in known:
        raise UsageError(f"lerobot knows no robot {name!r}; imported so far: {', '.join(sorted(known)) or 'none'}")
    try:
        make = (
            getattr(robots, "make_robot_from_config", None)
            or import_module("lerobot.robots.utils").make_robot_from_config
        )
        robot: LeRobot = make(known[name](**settings))
        return robot
    except (TypeError, ValueError, ImportError) as error:
        raise UsageError(f"lerobot refuses the settings of {name}: {one_line(error)}") from None
