"""LeRobot with nothing but the stand-in, and the driver over it."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from sacflow_robot.robot.drivers.lerobot import LeRobotDriver
from sacflow_robot.robot.drivers.registry import make_robot
from tests.robot.drivers.lerobot.stand_in import BOUNDS, StandIn, StandInConfig


@pytest.fixture
def lerobot(monkeypatch: pytest.MonkeyPatch) -> None:
    class RobotConfig:
        @staticmethod
        def get_known_choices() -> dict[str, type]:
            return {"stand_in": StandInConfig}

    robots = ModuleType("lerobot.robots")
    robots.RobotConfig, robots.make_robot_from_config = RobotConfig, StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lerobot", ModuleType("lerobot"))
    monkeypatch.setitem(sys.modules, "lerobot.robots", robots)


@pytest.fixture
def name(lerobot: None, tmp_path: Path) -> str:
    file = tmp_path / "arm.yaml"
    file.write_text(BOUNDS + "robot: {id: mine, port: /dev/x}\ncontrol_rate_hz: 100\nhorizon: 1000\nunit: deg\n")
    return f"lerobot:stand_in?config={file}"


@pytest.fixture
def robot(name: str) -> Iterator[LeRobotDriver]:
    made = make_robot(name)
    assert isinstance(made, LeRobotDriver)
    made.connect()
    yield made
    StandIn.made[-1].stuck = False
    made.close()
