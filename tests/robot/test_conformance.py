"""The simulated drivers through the conformance kit, and drivers that break the contract; the others where their stand-ins are."""

import os
import signal
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.episode import StepResult
from sacflow_robot.errors import RobotError, UnknownNameError, UsageError
from sacflow_robot.interfaces import Robot
from sacflow_robot.robot.conformance import FakeRobot, check_robot
from sacflow_robot.robot.drivers import registry as drivers
from sacflow_robot.robot.drivers.registry import DRIVERS, make_robot
from sacflow_robot.robot.drivers.rtsim import ProcessRobot, VirtualClock
from sacflow_robot.spec import FloatArray, RobotSpec


@pytest.mark.parametrize(
    "name",
    ["sim:lift?speed=100", "rtsim:lift?clock=virtual&obs_delay_ms=30&cmd_delay_ms=20"],
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


class Nervous(Checked):
    def hold(self) -> None:
        if not self.calls:
            raise RuntimeError("what robot?")


class Ghost(Checked):
    """Goes on as if nothing had happened."""

    lockstep = False

    def start(self, seed: int) -> StepResult:
        return replace(super().start(seed), time_ns=self.clock.now_ns())

    def observe(self) -> StepResult:
        return self.start(0)


class Mortal(Ghost):
    """Says that it is gone, or closed."""

    lost = False

    def observe(self) -> StepResult:
        if self.lost or self.closed:
            raise RobotError("it is gone")
        return super().observe()

    def command(self, action: FloatArray, valid_until_ns: int) -> None:
        if self.closed:
            raise RobotError("it is closed")
        super().command(action, valid_until_ns)


class Shaken(Mortal):
    def stop(self) -> None:
        if self.lost:
            raise RobotError("nothing to stop")
        super().stop()


@pytest.mark.slow  # it starts the process six times
@pytest.mark.realtime
def test_an_arm_in_a_process_of_its_own_keeps_the_contract_even_when_that_is_gone() -> None:
    def kill(robot: Robot) -> None:
        assert isinstance(robot, ProcessRobot) and robot.pid is not None
        os.kill(robot.pid, signal.SIGKILL)

    check_robot(lambda: make_robot("rtsim:lift?obs_delay_ms=20"), lose=kill)


def test_the_kit_finds_what_breaks_the_contract(robot: RobotSpec) -> None:
    check_robot(lambda: Checked(robot, VirtualClock()))
    for driver, complaint in (
        (FakeRobot, "was taken; raise InvalidValueError"),
        (Deaf, "a stopped robot took a command"),
        (Blind, "'object' has shape"),
        (Timeless, "has to say when it was seen"),
        (Nervous, "before it was connected: hold raised RuntimeError: what robot?"),
        (Ghost, "a closed robot was observed"),
    ):
        with pytest.raises(AssertionError, match=complaint):
            check_robot(lambda driver=driver: driver(robot, VirtualClock()))


def test_the_kit_finds_an_arm_that_is_lost_unseen(robot: RobotSpec) -> None:
    def lose(robot: Robot) -> None:
        robot.lost = True  # type: ignore[attr-defined]

    check_robot(lambda: Mortal(robot, VirtualClock()), lose=lose)
    with pytest.raises(AssertionError, match="after the robot was lost, observe still goes on"):
        check_robot(lambda: Mortal(robot, VirtualClock()), lose=lambda robot: None)
    with pytest.raises(AssertionError, match="after the robot was lost: stop raised RobotError: nothing to stop"):
        check_robot(lambda: Shaken(robot, VirtualClock()), lose=lose)


def test_installed_and_not_installed_know_the_same_drivers() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][drivers.GROUP] == DRIVERS


def test_others_drivers_are_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name, value = "theirs", "sacflow_robot.robot.drivers.registry:make_sim"

    class Broken:
        name, value = "broken", "no_such_package:make"

    monkeypatch.setattr(drivers, "entry_points", lambda group: [Point, Broken])
    assert make_robot("theirs:lift").spec.task == "lift"
    with pytest.raises(UnknownNameError, match=r"valid names: broken:\.\.\., .*theirs:\.\.\."):
        make_robot("their:lift")
    with pytest.raises(UsageError, match="'broken' cannot be loaded from no_such_package:make: No module"):
        make_robot("broken:x")
