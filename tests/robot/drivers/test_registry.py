"""Drivers by name: those known, and one's own by module or file."""

from pathlib import Path

import pytest

from sacflow_robot.errors import UnknownNameError, UsageError
from sacflow_robot.robot.conformance import check_robot
from sacflow_robot.robot.drivers.registry import make_robot
from sacflow_robot.robot.drivers.wrappers import HistoryRobot

GANTRY = Path(__file__).parents[3] / "examples" / "my_robot" / "driver.py"
MODULE = """
import my_helper
from sacflow_robot.envs.tasks import get_task
from sacflow_robot.robot.conformance import FakeRobot

def make(subject, options):
    if subject == "absent":
        raise OSError("no such port")
    robot = FakeRobot(get_task("lift").robot)
    robot.made_with = subject, dict(options), my_helper.VALUE
    return robot

def half(subject, options):
    return object()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_arm_driver.py").write_text(MODULE)
    (tmp_path / "my_helper.py").write_text("VALUE = 7")
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])
    return tmp_path


def test_the_example_keeps_the_contract() -> None:
    check_robot(lambda: make_robot(f"{GANTRY}:make_robot"))
    assert isinstance(make_robot(f"{GANTRY}:make_robot?history=2"), HistoryRobot)


def test_a_driver_of_ones_own_is_named_by_file_or_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for name in (f"{folder}/my_arm_driver.py:make", "my_arm_driver.py:make", "my_arm_driver:make"):
        made = make_robot(f"{name}:/dev/arm?speed=2").made_with  # type: ignore[attr-defined]
        assert made == ("/dev/arm", {"speed": "2"}, 7), "subject and options arrive, and what lies beside it is found"
        assert make_robot(name).made_with[0] == ""  # type: ignore[attr-defined]


def test_a_driver_that_cannot_be_used_says_why(folder: Path) -> None:
    file = folder / "my_arm_driver.py"
    for name, why in (
        (f"{file}:make:absent", "cannot be made: OSError: no such port"),
        (f"{file}:half", "which is not a robot: it lacks spec, lockstep, clock, connect"),
        (f"{file}:nobody", "has no 'nobody'; it has"),
        (f"{file}", "expected MODULE:NAME or FILE.py:NAME"),
        (f"{file}:MODULE.x", "expected MODULE:NAME or FILE.py:NAME"),
        (f"{folder}/absent.py:make", "there is no file"),
    ):
        with pytest.raises(UsageError, match="robot") as refused:
            make_robot(name)
        assert why in str(refused.value)
    (folder / "broken.py").write_text("1 / 0")
    with pytest.raises(UsageError, match="cannot be loaded: ZeroDivisionError: division by zero"):
        make_robot(f"{folder}/broken.py:make")
    with pytest.raises(UnknownNameError, match=r"unknown robot driver 'nobody_has_this'; valid names: .*sim:\.\.\."):
        make_robot("nobody_has_this:lift")
