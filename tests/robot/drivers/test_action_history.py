import numpy as np
import pytest

from sacflow_robot.envs.robot_parameters import RobotParameters
from sacflow_robot.errors import DataError, UnknownNameError, UsageError
from sacflow_robot.robot.conformance import FakeRobot, check_robot
from sacflow_robot.robot.drivers.registry import find_driver, make_robot
from sacflow_robot.robot.drivers.rtsim_options import read_options
from sacflow_robot.robot.drivers.wrappers import HistoryRobot
from sacflow_robot.spec import RobotSpec


def test_observations_hold_the_last_commands(robot_spec: RobotSpec) -> None:
    robot = HistoryRobot(FakeRobot(robot_spec), 2)
    robot.connect()
    assert not robot.begin(0).observation["action_history"].any()
    for i in range(3):
        robot.command(np.full(7, i / 10, np.float32), 10**18)
    assert robot.observe().observation["action_history"] == pytest.approx(np.array([[0.1] * 7, [0.2] * 7]))
    assert not robot.begin(1).observation["action_history"].any(), "an episode begins without a past"
    with pytest.raises(UsageError, match="history is 'many'"):
        find_driver("sim:lift?history=many")


def test_an_arm_with_history_and_a_twins_parameters_keeps_the_contract() -> None:
    check_robot(lambda: make_robot("rtsim:lift?clock=virtual&twin=3&joints=1&tick_ms=10&history=4"))


def test_a_name_says_what_the_arm_is_like(tmp_path) -> None:  # type: ignore[no-untyped-def]
    _, _, link = read_options({"twin": "3", "obs_delay_ms": "7"})
    assert link.obs_delay_ms == 7 and link.cmd_delay_ms == link.model.number("transport.command_delay_ms") > 0
    assert link.tick_ms == 2, "a robot with its own dynamics has a cycle of its own"
    _, _, one = read_options({"twin": "3", "differs": "payload"})
    assert one.cmd_delay_ms == 0 and one.model.number("payload.mass_kg") >= 0.3
    assert read_options({"model": link.model.to_json()})[2].model == link.model
    profile = tmp_path / "arm.yaml"
    profile.write_text("payload: {mass_kg: {value: 0.3, uncertainty: 0.1, date: 2026-11-23, method: scales}}")
    assert read_options({"profile": str(profile)})[2].model == RobotParameters({"payload.mass_kg": (0.3,)})
    for bad, error, message in (
        ({"twin": "3", "model": "{}"}, UsageError, "both say what the robot is like"),
        ({"differs": "delay"}, UsageError, "give twin=SEED as well"),
        ({"twin": "three"}, UsageError, "expected a seed"),
        ({"twin": "3", "differs": "color"}, UnknownNameError, "color"),
        ({"twin": "3", "engine": "stock"}, UsageError, "compiled engine"),
        ({"model": '{"payload.mass": 1}'}, DataError, "lacks its unit"),
    ):
        with pytest.raises(error, match=message):
            read_options(bad)
