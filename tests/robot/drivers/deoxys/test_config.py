"""The driver's configuration: what it makes of the arm and of the commands, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.calibrate.profile import load_profile
from sacflow_robot.cli.operator import safety_filter
from sacflow_robot.envs.tasks import get_task
from sacflow_robot.errors import DataError, UsageError
from sacflow_robot.robot.drivers.deoxys import messages, wire
from sacflow_robot.robot.drivers.deoxys.config import DeoxysConfig, load_config
from sacflow_robot.robot.drivers.deoxys.driver import DeoxysRobot
from sacflow_robot.robot.drivers.registry import make_robot

pytestmark = pytest.mark.realtime

SHIPPED = Path(__file__).parents[4] / "launch" / "deoxys_twin.yml"


def test_it_is_the_arm_that_policies_are_trained_on(config: DeoxysConfig) -> None:
    assert config.arm.differences(get_task("lift").robot) == []


def test_the_gripper_keeps_the_force_and_the_widths_of_a_profile(config: DeoxysConfig, tmp_path: Path) -> None:
    text = (SHIPPED.parents[1] / "calibration" / "panda.yaml").read_text()
    text = text.replace("max_gripper_force_n: 40.0", "max_gripper_force_n: 12.0")
    (tmp_path / "soft.yaml").write_text(text.replace("gripper_width_m: [0.0, 0.08]", "gripper_width_m: [0.02, 0.05]"))
    sent: list[bytes] = []

    class Wire:
        def send(self, command: bytes, gripper: bytes) -> None:
            sent.append(gripper)

    robot = DeoxysRobot(config)
    robot._wire = Wire()  # type: ignore[assignment]
    safety_filter(robot, load_profile(tmp_path / "soft.yaml"))
    for closing in (1.0, -1.0):
        robot._send(np.zeros(6), closing)
    grasp, move = (messages.packed(messages.parse("FrankaGripperControlMessage", data)) for data in sent)
    assert (grasp.force, grasp.width, move.width) == (12.0, 0.02, 0.05)


def test_a_command_on_the_wire_is_what_deoxys_expects(config: DeoxysConfig) -> None:
    command = messages.parse("FrankaControlMessage", wire.pose_command(config, np.arange(1.0, 7.0)))
    assert (command.controller_type, command.traj_interpolator_type, command.timeout) == (1, 2, 0.2)
    inner = messages.packed(command)
    assert [getattr(inner.goal, n) for n in ("x", "y", "z", "ax", "ay", "az")] == [1, 2, 3, 4, 5, 6]
    assert inner.goal.is_delta and list(inner.translational_stiffness) == [150.0] * 3
    assert list(inner.rotational_stiffness) == [250.0] * 3 and len(inner.config.residual_mass_vec) == 7
    grasp = messages.packed(messages.parse("FrankaGripperControlMessage", wire.gripper_command(0.2)))
    assert (grasp.width, grasp.speed, grasp.force, grasp.epsilon_inner, grasp.epsilon_outer) == (
        -0.01,
        0.5,
        30,
        0.08,
        0.08,
    )
    opening = messages.packed(messages.parse("FrankaGripperControlMessage", wire.gripper_command(-0.2)))
    assert (opening.width, opening.speed) == (0.08, 0.1)
    assert messages.parse("FrankaControlMessage", wire.idle_command(termination=True)).termination


def test_a_configuration_that_is_wrong_is_refused(tmp_path: Path) -> None:
    file, text = tmp_path / "deoxys.yml", SHIPPED.read_text()
    for old, new, message in (
        ("  PUB_PORT: 15556\n", "", "lacks 'PUB_PORT'"),
        ("15556", "70000", "STATE_PORT is 70000"),
        ("TASK: lift", "TASKS: lift", "unknown key SACFLOW.TASKS; valid keys: TASK, HORIZON"),
        ("cube_quat,", "cube_turn,", "'cube_turn' is not a part of 'object'"),
        ("[-0.56, 0.0, 0.912]", "[0, 0]", "BASE_POS_IN_WORLD has 2 numbers, expected 3"),
        ("ROTATIONAL_STIFFNESS: 250", "ROTATIONAL_STIFFNESS: -1", "ROTATIONAL_STIFFNESS is -1; it must be positive"),
    ):
        assert old in text
        file.write_text(text.replace(old, new))
        with pytest.raises(DataError, match=message):
            load_config(file)
    with pytest.raises(DataError, match="cannot be read"):
        load_config(tmp_path / "absent.yml")


def test_it_is_found_by_name() -> None:
    robot = make_robot(f"deoxys:{SHIPPED}?nuc_ip=10.0.0.2")
    assert isinstance(robot, DeoxysRobot) and robot.config.nuc_ip == "10.0.0.2" and robot.config.task == "lift"
    with pytest.raises(UsageError, match="unknown option of robot driver 'deoxys' 'port'"):
        make_robot(f"deoxys:{SHIPPED}?port=3")
