"""Stops of a replay and of a calibration, which can only be ended."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from sacflow_robot.calibrate.excitation import Excitation, record
from sacflow_robot.episode import Episode
from sacflow_robot.errors import RobotError, StoppedError
from sacflow_robot.robot.control.operator import OperatorRequests, StopOnlyOperator, obey, settle
from sacflow_robot.robot.control.playback import replay_episode
from sacflow_robot.robot.safety.filter import SafetyFilter
from sacflow_robot.robot.safety.latch import State
from sacflow_robot.spec import FloatArray, RobotSpec
from tests.robot.safety.following_robot import ACCELERATION, LIMITS, MOTIONS, made, moving


def test_a_replay_is_stopped_within_the_limits(make_episode: Callable[..., Episode], robot_spec: RobotSpec) -> None:
    episode = make_episode(60, states=False)
    episode = replace(episode, action=np.full_like(episode.action, 0.5))
    robot = made(robot_spec)
    robot.extra = {"robot0_gripper_qpos": np.zeros(2, np.float32), "object": np.zeros(10, np.float32)}
    requests = OperatorRequests()
    command, count = robot.command, iter(range(10_000))

    def commanding(action: FloatArray, valid_until_ns: int) -> None:
        command(action, valid_until_ns)
        if next(count) == 20:
            requests.stop("enough")

    robot.command = commanding  # type: ignore[method-assign]
    limits = replace(LIMITS, workspace=None)
    result = replay_episode(
        robot, episode, safety=SafetyFilter(robot_spec, limits), operator=StopOnlyOperator(requests)
    )
    motions = np.array([motion for _, motion in robot.commands[1:]])
    assert result.stopped == "enough" and 20 < len(motions) < 40 and robot.stopped and requests.state == "stopped"
    assert np.abs(np.diff(motions, axis=0)).max() <= ACCELERATION * 0.05**2 + 1e-6 and not motions[-1].any()
    requests.stop("again")
    robot.connect()
    with pytest.raises(StoppedError, match="stopped before the first command: again"):
        replay_episode(robot, episode, safety=SafetyFilter(robot_spec, limits), operator=StopOnlyOperator(requests))


def test_a_calibration_is_stopped_within_the_limits(robot_spec: RobotSpec) -> None:
    robot, requests, safety = (
        made(robot_spec),
        OperatorRequests(),
        SafetyFilter(robot_spec, replace(LIMITS, workspace=None)),
    )
    robot.extra = {"robot0_gripper_qpos": np.zeros(2, np.float32), "object": np.zeros(10, np.float32)}
    operator = StopOnlyOperator(requests)

    def look(commanded: FloatArray) -> None:
        if len(robot.commands) == 70:
            requests.stop("enough")
        obey(safety, operator.look(commanded))

    with pytest.raises(RobotError, match="the robot was held or stopped: enough; nothing was measured"):
        record(robot, safety, Excitation(robot_spec, 10.0, 5), 5, heed=look)
    motions = np.array([motion for _, motion in robot.commands[1:]])
    safety.rest()
    assert robot.stopped and safety.state is State.STOPPED and len(motions) < 90 and not motions[-1].any()


def test_a_calibration_whose_brake_fails_stops_the_robot(robot_spec: RobotSpec) -> None:
    robot, requests, safety = (
        made(robot_spec),
        OperatorRequests(),
        SafetyFilter(robot_spec, replace(LIMITS, workspace=None)),
    )
    robot.extra = {"robot0_gripper_qpos": np.zeros(2, np.float32), "object": np.zeros(10, np.float32)}
    operator, command = StopOnlyOperator(requests), robot.command

    def commanding(action: FloatArray, valid_until_ns: int) -> None:
        if safety.state is not State.RUNNING:
            raise RobotError("the cable is gone")
        command(action, valid_until_ns)

    def look(commanded: FloatArray) -> None:
        if len(moving(robot)) == 5:
            requests.stop("enough")
        obey(safety, operator.look(commanded))

    robot.command = commanding  # type: ignore[method-assign]
    with pytest.raises(RobotError, match="the cable is gone"):
        record(robot, safety, Excitation(robot_spec, 10.0, 5), 5, heed=look)
    assert robot.stopped


def test_a_robot_is_stopped_before_its_stop_is_answered() -> None:
    robot, requests, safety = made(), OperatorRequests(), SafetyFilter(MOTIONS, LIMITS)
    operator = StopOnlyOperator(requests)
    safety.see(robot.observe().observation, 0)
    safety.enable(0)
    safety.step(np.full(7, 0.5, np.float32), 0)
    number = requests.stop("enough")
    obey(safety, operator.look(np.zeros(7, np.float32)))
    stop, answered = robot.stop, []

    def stopping() -> None:
        answered.append(requests.outcome(number))
        stop()

    robot.stop = stopping  # type: ignore[method-assign]
    settle(robot, safety, operator)
    assert answered == [""] and robot.stopped and requests.outcome(number) == "stopped"


def test_a_calibration_goes_on_after_an_observation_that_is_missing_for_less_than_the_patience(
    robot_spec: RobotSpec,
) -> None:
    robot, safety = made(robot_spec), SafetyFilter(robot_spec, replace(LIMITS, workspace=None))
    robot.extra = {"robot0_gripper_qpos": np.zeros(2, np.float32), "object": np.zeros(10, np.float32)}
    operator, looks = StopOnlyOperator(), itertools.count()

    def look(commanded: FloatArray) -> None:
        robot.fault = "stale" if 80 <= next(looks) < 85 else ""
        obey(safety, operator.look(commanded))

    made_up = record(robot, safety, Excitation(robot_spec, 10.0, 5), 5, heed=look)
    assert len(made_up.sent_ns) > 150 and safety.state is State.RUNNING
