"""Converted actions move the simulated robot as the recorded ones did."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sacflow_robot.data.formats.adapt import adapt, follows_poses, resample, robot_of_file
from sacflow_robot.data.formats.agreement import AgreementOptions, Claims, Controller
from sacflow_robot.data.formats.demonstrations import Losses, human_episode
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError
from sacflow_robot.spec import FloatArray, RobotSpec
from sacflow_robot.utils.action_history import robot_with_history, with_action_history
from sacflow_robot.utils.rotations import from_rotation_vector, multiply, rotation_between

Recording = tuple[dict[str, FloatArray], npt.NDArray[np.float64]]


def drive(rate_hz: float, actions: FloatArray) -> Recording:
    """Observations (T + 1, ...) and states of the simulated robot from one start, commanded at a rate."""
    env = RobosuiteEnv("lift", step_rate_hz=rate_hz)
    first, info = env.reset(seed=0)
    rows, states = [first], [info["state"]]
    for action in actions:
        observation, *_, info = env.step(action)
        rows.append(observation)
        states.append(info["state"])
    env.close()
    return {key: np.stack([row[key] for row in rows]) for key in first}, np.stack(states)


def wave(seconds: float, rate_hz: float, size: float) -> FloatArray:
    """Smooth motion in all six dimensions, the gripper closing half-way."""
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    angles = 2 * np.pi * 0.5 * t[:, None] + np.arange(6)
    motion = np.sin(angles) * np.where(np.arange(6) < 3, size, 0.3 * size)
    return np.column_stack([motion, np.where(t < seconds / 2, -1, 1)]).astype(np.float32)


@pytest.mark.parametrize("rate_hz", [10.0, 40.0])
def test_resampled_actions_move_the_arm_as_those_of_the_other_rate(robot: RobotSpec, rate_hz: float) -> None:
    actions = wave(2.0, rate_hz, 0.4)
    observations, states = drive(rate_hz, actions)
    claims, losses = Claims(rate_hz=rate_hz), Losses()
    own = human_episode(
        observations, actions, robot_of_file(claims, robot), rewards=np.zeros(len(actions), np.float32), states=states
    )
    episode = adapt(own, claims, robot, AgreementOptions(resample=True), losses)
    assert len(episode) == 40 and f"resampled from {rate_hz:g} to 20 Hz" in str(losses)
    assert np.diff(episode.time_ns).tolist() == [50_000_000] * 40

    # Where both have an observation they have the same one; in between it is interpolated.
    every = max(1, round(20 / rate_hz)), max(1, round(rate_hz / 20))
    for key, rows in observations.items():
        assert np.allclose(episode.observations[key][:: every[0]], rows[:: every[1]], atol=1e-6), key
    assert np.allclose(np.linalg.norm(episode.observations["robot0_eef_quat"], axis=1), 1)
    assert episode.states is not None and np.allclose(episode.states[:: every[0]], states[:: every[1]])
    assert set(np.unique(episode.action[:, 6])) == {-1, 1}, "the gripper's command is never a mean"

    moved, _ = drive(20, episode.action)
    expected, found = observations["robot0_eef_pos"][:: every[1]], moved["robot0_eef_pos"][:: every[0]]
    traveled = np.abs(np.diff(expected, axis=0)).sum()
    assert np.abs(np.diff(found, axis=0)).sum() == pytest.approx(traveled, rel=0.06), "the total motion is kept"
    assert np.abs(found - expected).max() < 0.01


def test_absolute_goals_become_the_deltas_that_they_were(robot: RobotSpec) -> None:
    deltas = wave(1.5, 20, 0.6)
    observations, _ = drive(20, deltas)
    position, hand = (observations[key][:-1].astype(np.float64) for key in ("robot0_eef_pos", "robot0_eef_quat"))
    quarter = np.tile(from_rotation_vector(np.array([[0, 0, -np.pi / 2]])), (len(hand), 1))
    for turn in (quarter, np.tile([0.0, 0, 0, 1], (len(hand), 1))):  # goals of the grip site, and of the hand
        goal = multiply(from_rotation_vector(0.5 * deltas[:, 3:6].astype(np.float64)), multiply(hand, turn))
        rotation = rotation_between(np.tile([0.0, 0, 0, 1], (len(goal), 1)), goal)
        actions = np.column_stack([position + 0.05 * deltas[:, :3], rotation, deltas[:, 6]]).astype(np.float32)
        assert follows_poses(actions, observations) and not follows_poses(deltas, observations)
        claims, losses = Claims(controller=Controller("OSC_POSE", delta=False)), Losses()
        rewards = np.zeros(len(actions), np.float32)
        own = human_episode(observations, actions, robot_of_file(claims, robot), rewards=rewards)
        assert np.array_equal(own.action, actions), "absolute goals are not clipped to the range of deltas"
        episode = adapt(own, claims, robot, AgreementOptions(controller_map=True), losses)
        assert np.allclose(episode.action, deltas, atol=1e-4)
        assert str(losses) == "absolute goals became deltas from the robot's poses"

    elsewhere = replace(own, action=own.action + np.float32(1))
    with pytest.raises(DataError, match=r"goals lie 1\.7 m"):
        adapt(elsewhere, claims, robot, AgreementOptions(controller_map=True), Losses())


def episode_of(robot: RobotSpec, steps: int, **columns: Any) -> Episode:
    rng = np.random.default_rng(0)
    observations = {a.key: rng.standard_normal((steps + 1, *a.shape)).astype(np.float32) for a in robot.observations}
    actions = rng.uniform(-1, 1, (steps, robot.action_dim)).astype(np.float32)
    return human_episode(observations, actions, robot, **{"rewards": np.zeros(steps, np.float32), **columns})


def test_another_scale_commands_the_same_motion(robot: RobotSpec) -> None:
    scale = (0.02,) * 3 + (0.1,) * 3
    claims, losses = Claims(controller=Controller("OSC_POSE", True, scale)), Losses()
    before = episode_of(robot, 6)
    after = adapt(before, claims, robot, AgreementOptions(controller_map=True), losses)
    assert np.allclose(after.action[:, :3] * 0.05, before.action[:, :3] * 0.02)
    assert np.allclose(after.action[:, 3:6] * 0.5, before.action[:, 3:6] * 0.1)
    assert np.array_equal(after.action[:, 6], before.action[:, 6]) and "clipped" not in str(losses)
    wide = Claims(controller=Controller("OSC_POSE", True, (0.2,) * 6))
    assert np.abs(adapt(before, wide, robot, AgreementOptions(controller_map=True), losses).action).max() == 1
    assert "beyond the controller's range and are clipped" in str(losses)
    same = adapt(before, Claims("Panda", 20, Controller("OSC_POSE", True)), robot, AgreementOptions(), losses)
    assert same is before


@pytest.mark.parametrize("rate_hz", [7.0, 10.0, 30.0, 50.0])
def test_a_success_stays_where_it_was(robot: RobotSpec, rate_hz: float) -> None:
    solved = 11
    rewards = (np.arange(24) >= solved).astype(np.float32)
    own = episode_of(replace(robot, control_rate_hz=rate_hz), 24, rewards=rewards)
    found = resample(own, rate_hz, robot, Losses())
    first = found.info["first_success"]
    assert first == int(np.argmax(found.rewards > 0)) and found.rewards[first:].all()
    assert abs((first + 1) / 20 - (solved + 1) / rate_hz) <= 1 / 20
    assert found.success and found.terminated.tolist() == [False] * (len(found) - 1) + [True]
    assert len(found) == pytest.approx(24 * 20 / rate_hz, abs=1)
    last = replace(own, rewards=np.eye(1, 24, 23, dtype=np.float32)[0])
    assert resample(last, rate_hz, robot, Losses()).rewards.tolist()[-1] == 1, "a success at the end is not lost"


def test_the_last_actions_are_those_of_the_new_rate(robot: RobotSpec) -> None:
    remembering = robot_with_history(robot, 3)
    own = with_action_history(episode_of(replace(robot, control_rate_hz=10.0), 8), 3)
    found = resample(own, 10, remembering, Losses())
    history = found.observations["action_history"]
    assert history.shape == (17, 3, 7) and np.array_equal(history[5], found.action[2:5]) and not history[0].any()


def test_positions_are_interpolated_and_unknown_controllers_refused(robot: RobotSpec) -> None:
    joints = replace(robot, controller="joint position", action_names=tuple("abcdefg"))
    ramp = np.repeat(np.arange(10, dtype=np.float32)[:, None], 7, axis=1) / 10
    own = replace(episode_of(joints, 10), action=ramp, policy_action=ramp)
    found = resample(own, 10, joints, Losses()).action[:, 0]
    assert np.allclose(found[1::2], ramp[:, 0]) and np.allclose(found[2::2], (ramp[:-1, 0] + ramp[1:, 0]) / 2)
    unknown = replace(robot, controller="as the environment's, rescaled to [-1, 1]")
    with pytest.raises(DataError, match="cannot be resampled"):
        resample(own, 10, unknown, Losses())
