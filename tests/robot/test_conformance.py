"""The simulated drivers through the conformance kit, and drivers that break the contract; the others where their stand-ins are."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.errors import UnknownNameError, UsageError
from sacflow_robot.robot import drivers
from sacflow_robot.robot.drivers import DRIVERS, make_robot
from sacflow_robot.robot.testing import FakeRobot, check_robot
from sacflow_robot.spec import ArmSpec, FloatArray, StepResult

pytestmark = pytest.mark.realtime


@pytest.mark.parametrize(
    "name",
    ["sim:lift?speed=100", "rtsim:lift?clock=virtual&obs_delay_ms=30&cmd_delay_ms=20", "rtsim:lift?obs_delay_ms=20"],
)
def test_our_drivers_keep_the_contract(name: str) -> None:
    check_robot(lambda: make_robot(name))


class Checked(FakeRobot):
    def command(self, action: FloatArray, valid_until_ns: int) -> None:
        super().command(self.spec.check_action(action), valid_until_ns)


class Deaf(Checked):
    def stop(self) -> None:
        pass


class Blind(Checked):
    def react(self, action: FloatArray) -> StepResult:
        return StepResult({**self.start(0).observation, "object": np.zeros(3, np.float32)})


class Timeless(Checked):
    lockstep = False


def test_the_kit_finds_what_breaks_the_contract(arm: ArmSpec) -> None:
    check_robot(lambda: Checked(arm))
    for driver, complaint in (
        (FakeRobot, "was taken; raise InvalidValueError"),
        (Deaf, "a stopped arm took a command"),
        (Blind, "'object' has shape"),
        (Timeless, "has to say when it was seen"),
    ):
        with pytest.raises(AssertionError, match=complaint):
            check_robot(lambda driver=driver: driver(arm))


def test_installed_and_not_installed_know_the_same_drivers() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][drivers.GROUP] == DRIVERS


def test_others_drivers_are_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name, value = "theirs", "sacflow_robot.robot.drivers:make_sim"

    class Broken:
        name, value = "broken", "no_such_package:make"

    monkeypatch.setattr(drivers, "entry_points", lambda group: [Point, Broken])
    assert make_robot("theirs:lift").spec.task == "lift"
    with pytest.raises(UnknownNameError, match=r"valid names: broken:\.\.\., .*theirs:\.\.\."):
        make_robot("their:lift")
    with pytest.raises(UsageError, match="'broken' cannot be loaded from no_such_package:make: No module"):
        make_robot("broken:x")
