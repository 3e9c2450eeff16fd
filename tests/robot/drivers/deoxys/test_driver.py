"""The driver against the twin, over real sockets and in real time."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from sacflow_robot.calibrate.profile import load_profile
from sacflow_robot.cli.operator import safety_filter
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.tasks import get_task
from sacflow_robot.errors import (
    DataError,
    RobotError,
    RobotFaultError,
    StaleStateError,
    StoppedError,
    UsageError,
    WireError,
)
from sacflow_robot.robot.conformance import check_robot
from sacflow_robot.robot.drivers.deoxys import messages, wire
from sacflow_robot.robot.drivers.deoxys.config import DeoxysConfig, load_config
from sacflow_robot.robot.drivers.deoxys.driver import DeoxysRobot
from sacflow_robot.robot.drivers.deoxys.messages import RobotMode
from sacflow_robot.robot.drivers.deoxys.objects import Sighting, parse_sighting
from sacflow_robot.robot.drivers.deoxys.states import ArmState, GripperState
from sacflow_robot.robot.drivers.deoxys.twin import FrankaTwin
from sacflow_robot.robot.drivers.registry import make_robot
from sacflow_robot.utils.rotations import from_matrix, matrix_to_vector, vector_to_matrix

pytestmark = pytest.mark.realtime

UP = np.array([0, 0, 1, 0, 0, 0, -1], np.float32)
SHIPPED = Path(__file__).parents[4] / "launch" / "deoxys_twin.yml"


@pytest.fixture
def robot(config: DeoxysConfig, live: FrankaTwin, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeoxysRobot]:
    """A connected robot; connecting sends 6 idle messages where deoxys sends 20, which takes it a second."""
    monkeypatch.setattr("sacflow_robot.robot.drivers.deoxys.driver._IDLE_COMMANDS", 6)
    made = DeoxysRobot(config)
    made.connect()
    yield made
    made.close()


def in_s(seconds: float) -> int:
    return time.monotonic_ns() + round(seconds * 1e9)


def eventually(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.01)
    return False


def height(robot: DeoxysRobot) -> float:
    return float(robot.observe().observation["robot0_eef_pos"][2])


def test_it_is_the_arm_that_policies_are_trained_on(config: DeoxysConfig) -> None:
    assert config.arm.differences(get_task("lift").robot) == []


def test_the_conformance_kit(config: DeoxysConfig, live: FrankaTwin) -> None:
    check_robot(lambda: DeoxysRobot(config))


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


def test_an_episode_starts_as_in_lockstep(robot: DeoxysRobot, env: RobosuiteEnv) -> None:
    for seed in (5, 6):
        start, expected = robot.begin(seed), env.begin(seed).observation
        assert not start.ended and start.time_ns is not None and start.time_ns <= time.monotonic_ns()
        # Time goes on: the cube drops 10 mm onto the table meanwhile, which its heights alone may show.
        for key, heights in (("robot0_eef_pos", []), ("object", [2, 9])):
            off = np.abs(start.observation[key] - expected[key])
            assert np.delete(off, heights).max() < 4e-3 and off.max() < 0.015, key
        assert np.abs(start.observation["robot0_gripper_qpos"] - expected["robot0_gripper_qpos"]).max() < 1e-3
        assert abs(start.observation["robot0_eef_quat"] @ expected["robot0_eef_quat"]) > 0.9999


def test_a_command_moves_the_arm_and_runs_out(robot: DeoxysRobot, live: FrankaTwin) -> None:
    robot.begin(0)
    before = height(robot)
    robot.command(UP, in_s(0.15))
    assert eventually(lambda: height(robot) > before + 0.005)
    time.sleep(0.6)
    at = height(robot)
    time.sleep(0.5)
    assert abs(height(robot) - at) < 2e-3, "it stands still"
    measured = robot.observe().measured
    assert measured is not None and measured[2] > 0.1 and measured[6] == -1
    time.sleep(1.0)
    assert live.state().robot_mode == RobotMode.MOVE, "kept from giving up by standstills"
    robot.command(UP, in_s(0.15))
    assert eventually(lambda: height(robot) > at + 0.005)


def test_a_command_out_of_date_is_dropped(robot: DeoxysRobot, live: FrankaTwin) -> None:
    robot.begin(0)
    before = live.commands
    robot.command(UP, time.monotonic_ns() - 1)
    time.sleep(0.2)
    assert live.commands == before and live.state().robot_mode == RobotMode.IDLE


def test_the_gripper_follows_the_sign(robot: DeoxysRobot, live: FrankaTwin) -> None:
    robot.begin(0)
    robot.command(np.array([0, 0, 0, 0, 0, 0, -0.1], np.float32), in_s(0.1))
    assert eventually(lambda: robot.observe().observation["robot0_gripper_qpos"][0] > 0.038), "wide open at -0.1"
    assert eventually(lambda: not live.gripper._busy)
    robot.command(np.array([0, 0, 0, 0, 0, 0, 0.1], np.float32), in_s(0.1))
    assert eventually(lambda: robot.observe().observation["robot0_gripper_qpos"][0] < 0.002)


def test_hold_ends_a_motion_and_the_next_command_ends_it(robot: DeoxysRobot) -> None:
    robot.begin(0)
    robot.command(UP, in_s(60))
    time.sleep(0.1)
    robot.hold()
    time.sleep(0.5)
    at = height(robot)
    time.sleep(0.5)
    assert abs(height(robot) - at) < 2e-3
    robot.command(UP, in_s(1))
    assert eventually(lambda: height(robot) > at + 0.005)


def test_stop_is_latched_until_it_is_connected_again(robot: DeoxysRobot, live: FrankaTwin) -> None:
    robot.begin(0)
    robot.command(UP, in_s(60))
    assert eventually(lambda: live.state().robot_mode == RobotMode.MOVE)
    robot.stop()
    assert eventually(lambda: live.state().robot_mode == RobotMode.IDLE)
    with pytest.raises(StoppedError):
        robot.command(UP, in_s(1))
    time.sleep(0.3)
    assert live.state().robot_mode == RobotMode.IDLE, "nothing is sent any more"
    robot.connect()
    assert live.state().robot_mode == RobotMode.IDLE, "connecting moves nothing"
    robot.command(UP, in_s(1))
    assert eventually(lambda: live.state().robot_mode == RobotMode.MOVE)


def test_a_stop_ends_the_gripper_too(robot: DeoxysRobot, live: FrankaTwin) -> None:
    robot.begin(0)
    width = live.plant.finger_width
    begun = width()
    robot.command(np.array([0, 0, 0, 0, 0, 0, -1], np.float32), in_s(0.1))
    assert eventually(lambda: width() > begun + 0.005)
    robot.stop()
    time.sleep(0.7)
    assert width() < 0.07, "it was told to open to 0.08, which takes 0.4 s"


def test_a_reflex_is_latched_and_named(
    robot: DeoxysRobot, live: FrankaTwin, ask: Callable[..., dict[str, Any]]
) -> None:
    robot.begin(0)
    robot.command(UP, in_s(60))
    ask(fault="joint_reflex")
    assert eventually(lambda: bool(robot._fault))
    with pytest.raises(RobotFaultError, match="joint_reflex"):
        robot.observe()
    with pytest.raises(RobotFaultError, match="not ready: joint_reflex"):
        robot.connect()
    ask(recover=True)
    time.sleep(0.3)
    assert live.state().robot_mode == RobotMode.IDLE, "it does not go on by itself"
    with pytest.raises(RobotFaultError):
        robot.command(UP, in_s(1))
    robot.connect()
    robot.command(UP, in_s(1))
    assert eventually(lambda: live.state().robot_mode == RobotMode.MOVE)


def test_a_user_stop_is_named(robot: DeoxysRobot, ask: Callable[..., dict[str, Any]]) -> None:
    robot.begin(0)
    ask(user_stop=True)
    robot.command(UP, in_s(60))
    assert eventually(lambda: bool(robot._fault))
    with pytest.raises(RobotFaultError, match="user stop is pressed"):
        robot.command(UP, in_s(1))


def test_silence_is_refused(robot: DeoxysRobot, live: FrankaTwin) -> None:
    robot.begin(0)
    live.stop()
    time.sleep(0.7)
    with pytest.raises(StaleStateError, match=r"the newest .* is 0\..* s old, allowed is 0.5 s"):
        robot.observe()


def test_nobody_there(config: DeoxysConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sacflow_robot.robot.drivers.deoxys.driver._REACH_WITHIN_S", 0.3)
    robot = DeoxysRobot(config)
    with pytest.raises(StaleStateError, match=f"no arm state from tcp://127.0.0.1:{config.state_port} and no gripper"):
        robot.connect()
    with pytest.raises(UsageError, match="sockets cannot be opened"):
        DeoxysRobot(config).connect()
    robot.close()
    robot.close()
    with pytest.raises(RobotError, match="not connected"):
        robot.observe()


def test_states_of_another_making_are_refused(config: DeoxysConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sacflow_robot.robot.drivers.deoxys.driver._REACH_WITHIN_S", 0.5)
    with zmq.Context() as context, context.socket(zmq.PUB) as states:
        states.bind(f"tcp://{config.nuc_ip}:{config.state_port}")
        robot = DeoxysRobot(config)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "sleep", lambda s: states.send(b"\xff\xff"))
            with pytest.raises(
                StaleStateError, match="messages refused: 2 bytes that are not a FrankaRobotStateMessage"
            ):
                robot.connect()
        robot.close()


def test_a_function_can_tell_where_objects_are(config: DeoxysConfig, live: FrankaTwin) -> None:
    pose = np.array([0.5, 0.1, 0.0, 0, 0, 0, 1.0])
    seen = lambda: Sighting({"cube": pose}, time.monotonic_ns())  # noqa: E731
    robot = DeoxysRobot(config, seen)
    robot.connect()
    start = robot.begin(0)
    world = pose[:3] + np.array(config.base_pos_in_world)
    assert np.allclose(start.observation["object"][:7], [*world, *pose[3:]], atol=1e-6)
    assert np.allclose(start.observation["object"][7:], world - start.observation["robot0_eef_pos"], atol=1e-6)
    robot._source = lambda: Sighting({"ball": pose}, time.monotonic_ns())
    assert eventually(lambda: "ball" in (robot._wire.sighting.poses if robot._wire and robot._wire.sighting else {}))
    with pytest.raises(RobotError, match="'cube' is not seen; seen are: ball"):
        robot.observe()
    robot.close()


def test_joint_positions_and_the_arms_own_times_for_calibration(config: DeoxysConfig, live: FrankaTwin) -> None:
    robot = DeoxysRobot(replace(config, joints=True, arm_stamps=True))
    robot.connect()
    start = robot.begin(3)
    joints = start.observation["robot0_joint_pos"]
    assert robot.spec.observations[-1].key == "robot0_joint_pos" and joints.shape == (7,) and joints.dtype == np.float32
    assert np.allclose(joints, live.plant.joints()[0], atol=1e-3), "the arm is at rest"
    assert abs((start.time_ns or 0) - live._frame * 10_000_000) < 500_000_000, "the twin's life began at its own 0"
    robot.close()
    bare = ArmState(np.zeros(3), np.eye(3), 1, (), 0, None, 0, 0)
    with pytest.raises(RobotError, match="no joint positions"):
        robot._observation(bare, GripperState(0.08, 0), None)


def test_the_horizon_cuts_an_episode(robot: DeoxysRobot) -> None:
    robot.begin(0)
    robot._began_ns -= 15_000_000_000
    assert robot.observe().truncated


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


def test_poses() -> None:
    rng = np.random.default_rng(0)
    for vector in (*rng.uniform(-1.7, 1.7, (200, 3)), np.zeros(3), np.array([np.pi, 0, 0]), np.array([0, 1e-9, 0])):
        matrix = vector_to_matrix(vector)
        assert np.allclose(matrix @ matrix.T, np.eye(3)) and np.linalg.det(matrix) > 0
        assert np.allclose(vector_to_matrix(matrix_to_vector(matrix)), matrix, atol=1e-7)
        angle = np.linalg.norm(vector)
        expected = np.append(vector * (np.sin(angle / 2) / angle if angle else 0.5), np.cos(angle / 2))
        assert abs(abs(from_matrix(matrix) @ expected) - 1) < 1e-9


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"poses": {"cube": [0, 0, 0, 0, 0, 0]}}',
        b'{"poses": {"cube": [0, 0, NaN, 0, 0, 0, 1]}}',
        b'{"poses": {"cube": [0, 0, 0, 0, 0, 0, 2]}}',
        b'{"poses": {}, "age_s": -1}',
        b'{"poses": {}, "age_s": "old"}',
    ],
)
def test_poses_that_are_none_are_refused(data: bytes) -> None:
    with pytest.raises(WireError, match="object poses cannot be read"):
        parse_sighting(data, 0)


def test_a_tracker_may_say_how_old_its_poses_are() -> None:
    data = json.dumps({"poses": {"cube": [0, 0, 0, 0, 0, 0, 1]}, "age_s": 0.05}).encode()
    seen = parse_sighting(data, 1_000_000_000)
    assert (seen.time_ns, seen.solved, seen.frame) == (950_000_000, None, -1)


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
