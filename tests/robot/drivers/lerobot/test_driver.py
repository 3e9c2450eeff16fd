"""The LeRobot driver over a stand-in for LeRobot's ``Robot``."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sacflow_robot.errors import DataError, InvalidValueError, RobotError, StoppedError, UsageError
from sacflow_robot.interfaces import Robot
from sacflow_robot.robot.conformance import check_robot
from sacflow_robot.robot.control.run_config import RunConfig
from sacflow_robot.robot.control.session import run_episode
from sacflow_robot.robot.drivers.lerobot import LeRobotDriver
from sacflow_robot.robot.drivers.registry import make_robot
from sacflow_robot.robot.safety.filter import SafetyFilter
from sacflow_robot.robot.safety.safety_limits import SafetyLimits
from tests.robot.drivers.lerobot.stand_in import BOUNDS, StandIn, StandInConfig, soon
from tests.robot.drivers.waiting import eventually

pytestmark = pytest.mark.realtime


def test_it_is_reached_without_calibrating_and_without_a_command(robot: LeRobotDriver) -> None:
    stand_in = StandIn.made[-1]
    start = robot.begin(3)
    assert stand_in.config == StandInConfig(id="mine", port="/dev/x")
    assert stand_in.calibrated_on_connect is False and stand_in.sent == []
    assert start.observation["joint_pos"].tolist() == [10.0, -20.0, 50.0]
    assert start.observation["wrist"].dtype == np.uint8
    assert start.measured is not None and np.allclose(start.measured, [0.1, -0.2, 0.0])
    assert robot.spec.action_units == ("-100 to 100 deg", "-100 to 100 deg", "0 to 100 deg")
    robot.spec.check_observation(start.observation)


def test_an_action_goes_to_the_bounds_and_not_beyond(robot: LeRobotDriver) -> None:
    robot.begin(0)
    robot.command(np.array([0.5, -5.0, 1.0], np.float32), soon())
    assert eventually(lambda: robot.observe().observation["joint_pos"].tolist() == [50.0, -100.0, 100.0])
    assert len(StandIn.made[-1].threads) == 1, "LeRobot's robot is called by one thread"


def test_an_action_out_of_date_moves_nothing(robot: LeRobotDriver) -> None:
    robot.begin(0)
    robot.command(np.ones(3, np.float32), time.monotonic_ns() - 1)
    time.sleep(0.05)
    assert StandIn.made[-1].sent == []


def test_when_an_action_runs_out_it_stays_where_it_is(robot: LeRobotDriver) -> None:
    robot.begin(0)
    robot.command(np.ones(3, np.float32), time.monotonic_ns() + 100_000_000)
    time.sleep(0.15)
    stand_in = StandIn.made[-1]
    first = len(stand_in.sent)
    assert eventually(lambda: len(stand_in.sent) > first + 5)
    held = stand_in.sent[first + 1 :]
    assert held[0]["shoulder.pos"] < 100 and all(sent == held[0] for sent in held), "one place, not what is read anew"
    stand_in.positions["shoulder.pos"] -= 1
    assert eventually(lambda: stand_in.positions["shoulder.pos"] == held[0]["shoulder.pos"])


def test_hold_and_stop(robot: LeRobotDriver) -> None:
    robot.begin(0)
    robot.command(np.ones(3, np.float32), soon())
    assert eventually(lambda: len(StandIn.made[-1].sent) > 2)
    robot.hold()
    assert eventually(lambda: StandIn.made[-1].sent[-1]["shoulder.pos"] < 100)
    robot.command(np.ones(3, np.float32), soon())
    robot.stop()
    with pytest.raises(StoppedError):
        robot.command(np.ones(3, np.float32), soon())
    assert eventually(lambda: StandIn.made[-1].sent[-1]["shoulder.pos"] < 100)
    robot.connect()
    sent = len(StandIn.made[-1].sent)
    time.sleep(0.05)
    assert len(StandIn.made[-1].sent) == sent, "connecting again moves nothing"
    robot.command(np.ones(3, np.float32), soon())
    assert eventually(lambda: StandIn.made[-1].sent[-1]["shoulder.pos"] == 100)


def test_what_is_no_action_is_refused(robot: LeRobotDriver) -> None:
    for action, message in ((np.zeros(2), "expected \\(3,\\)"), (np.array([0, np.nan, 0]), "contains NaN")):
        with pytest.raises(InvalidValueError, match=message):
            robot.command(action.astype(np.float32), soon())


def test_the_conformance_kit(name: str) -> None:
    def unplug(robot: Robot) -> None:
        StandIn.made[-1].broken = True

    check_robot(lambda: make_robot(name), lose=unplug)


def test_an_observation_is_as_old_as_the_begin_of_its_reading(robot: LeRobotDriver) -> None:
    robot.begin(0)
    StandIn.made[-1].read_s = 0.1
    time.sleep(0.25)
    age_s = (time.monotonic_ns() - (robot.observe().time_ns or 0)) / 1e9
    assert 0.1 <= age_s < 0.35
    StandIn.made[-1].stuck = True
    time.sleep(0.05)
    assert robot.observe().stale_reason == "the robot has not been read since"


def test_an_episode_is_cut_at_its_horizon(robot: LeRobotDriver) -> None:
    assert not robot.begin(0).truncated
    robot._began_ns -= 10_000_000_000
    assert robot.observe().truncated


def test_what_cannot_be_is_refused(lerobot: None, tmp_path: Path, name: str) -> None:
    file = tmp_path / "other.yaml"
    for text, message in (
        ("joints: {a.pos: [0, 1]}", "bounds are given for a.pos; the robot has shoulder.pos, elbow.pos, gripper.pos"),
        (BOUNDS + "robot: {speed: 3}", "refuses the settings"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=message):
            make_robot(f"lerobot:stand_in?config={file}")
    for text, message in (
        ("robot: {}", "lacks 'joints'"),
        ("joints: {a: [1, 0]}", "higher highest"),
        (BOUNDS + "rate: 3", "unexpected keyword"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            make_robot(f"lerobot:stand_in?config={file}")
    with pytest.raises(UsageError, match="needs a file with its port"):
        make_robot("lerobot:stand_in")
    with pytest.raises(UsageError, match="knows no robot 'so9000'"):
        make_robot(name.replace("stand_in", "so9000"))
    file.write_text(BOUNDS + "robot: {port: /dev/absent}")
    with pytest.raises(RobotError, match="cannot be reached: no such port"):
        make_robot(f"lerobot:stand_in?config={file}").connect()


def test_lerobot_that_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lerobot", None)
    monkeypatch.setitem(sys.modules, "lerobot.robots", None)
    (tmp_path / "arm.yaml").write_text(BOUNDS)
    with pytest.raises(UsageError, match="lerobot cannot be imported"):
        make_robot(f"lerobot:so101_follower?config={tmp_path}/arm.yaml")


def test_one_that_is_not_calibrated_is_not_moved(name: str) -> None:
    robot = make_robot(name)
    StandIn.made[-1].is_calibrated = False
    with pytest.raises(RobotError, match="lerobot-calibrate"):
        robot.connect()
    robot.close()


def test_the_loop_drives_it_through_the_safety_filter_and_holds_it_where_it_stands(robot: LeRobotDriver) -> None:
    class ActionSource:
        count = 0

        def begin(self) -> None:
            pass

        def step(self, observation: Any, noise: Any = None) -> Any:
            self.count += 1
            action = None if self.count == 1 else np.array([0.9, -0.2, 0.5], np.float32)
            return SimpleNamespace(action=action, joined=False)

    policy: Any = SimpleNamespace(spec=SimpleNamespace(noise_shape=(4, 3), fingerprint="f"))
    limits = SafetyLimits(turn_rad_per_s=(1.0,), max_observation_age_s=5, max_action_age_s=5)
    safety = SafetyFilter(robot.spec, limits)
    run = run_episode(
        robot, policy, 0, RunConfig(policy_version="v", safety=safety, actions=ActionSource(), max_steps=40)
    )
    commanded = run.episode.action
    assert np.allclose(commanded[0], [0.1, -0.2, 0.0], atol=1e-6), "no action came: where it stands, gripper included"
    per_period = np.abs(np.diff(commanded[:, :2], axis=0)) * np.radians(100)
    assert 0.009 < per_period.max() <= 0.01 + 1e-6, "1 rad/s in periods of 10 ms"
