"""The driver against the twin, over real sockets and in real time."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import zmq

from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.errors import RobotError, RobotFaultError, StaleStateError, StoppedError, UsageError
from sacflow_robot.robot.conformance import check_robot
from sacflow_robot.robot.drivers.deoxys.config import DeoxysConfig
from sacflow_robot.robot.drivers.deoxys.driver import DeoxysRobot
from sacflow_robot.robot.drivers.deoxys.messages import RobotMode
from sacflow_robot.robot.drivers.deoxys.states import ArmState, GripperState
from sacflow_robot.robot.drivers.deoxys.twin import FrankaTwin
from tests.robot.drivers.waiting import eventually, in_s

pytestmark = pytest.mark.realtime

UP = np.array([0, 0, 1, 0, 0, 0, -1], np.float32)


@pytest.fixture
def robot(config: DeoxysConfig, live: FrankaTwin, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeoxysRobot]:
    """A connected robot; connecting sends 6 idle messages where deoxys sends 20, which takes it a second."""
    monkeypatch.setattr("sacflow_robot.robot.drivers.deoxys.driver._IDLE_COMMANDS", 6)
    made = DeoxysRobot(config)
    made.connect()
    yield made
    made.close()


def height(robot: DeoxysRobot) -> float:
    return float(robot.observe().observation["robot0_eef_pos"][2])


def test_the_conformance_kit(config: DeoxysConfig, live: FrankaTwin) -> None:
    check_robot(lambda: DeoxysRobot(config))


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
