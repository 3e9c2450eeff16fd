from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.episode import Episode
from sacflow_robot.errors import InvalidValueError, SpecMismatchError, UnknownNameError
from sacflow_robot.randomness import chunk_noise
from sacflow_robot.robot.drivers import make_robot
from sacflow_robot.robot.loop import check_fit, run_episode
from sacflow_robot.robot.sim import SimRobot
from sacflow_robot.serve.policy import OnnxPolicy
from sacflow_robot.spec import FloatArray, Observation, PolicySpec, StepResult


@pytest.fixture(scope="module")
def robot() -> SimRobot:
    return SimRobot("lift")


@pytest.fixture(scope="module")
def policy(policy_file: Path) -> OnnxPolicy:
    return OnnxPolicy(policy_file)


class ShortEpisodes:
    """The simulated arm, with episodes of a few steps."""

    def __init__(self, robot: SimRobot, steps: int) -> None:
        self._robot, self._steps, self._taken = robot, steps, 0
        self.spec = robot.spec
        self.commands: list[FloatArray] = []

    def begin(self, seed: int) -> StepResult:
        self._taken = 0
        return self._robot.begin(seed)

    def command(self, action: FloatArray) -> StepResult:
        self._taken += 1
        self.commands.append(action)
        return replace(self._robot.command(action), truncated=self._taken >= self._steps)

    def close(self) -> None:
        pass


class Fixed:
    """A policy that always answers with the same chunk."""

    def __init__(self, spec: PolicySpec, chunk: FloatArray) -> None:
        self.spec, self._chunk = spec, chunk
        self.calls: list[tuple[Observation, FloatArray]] = []

    def infer(self, observation: Observation, noise: FloatArray) -> FloatArray:
        self.calls.append((observation, noise))
        return self._chunk[None]


def test_a_chunk_is_played_open_loop_and_its_story_recorded(robot: SimRobot, policy: OnnxPolicy) -> None:
    chunk = np.zeros((5, 7), np.float32)
    chunk[:, 2] = [0.1, 0.2, 0.3, 0.4, 3.0]
    fixed, arm = Fixed(policy.spec, chunk), ShortEpisodes(robot, 7)
    run = run_episode(arm, fixed, 21, policy_version="v1", limits=(np.full(7, -0.25), np.full(7, 0.25)))
    assert len(fixed.calls) == 2, "the policy is asked once a chunk"
    for (_, noise), step in zip(fixed.calls, (0, 5), strict=True):
        assert np.array_equal(noise, chunk_noise((1, 5, 7), 21, step))
    episode = run.episode
    assert episode.proposed[:, 2] == pytest.approx([0.1, 0.2, 0.3, 0.4, 3.0, 0.1, 0.2])
    assert episode.commanded[:, 2] == pytest.approx([0.1, 0.2, 0.25, 0.25, 0.25, 0.1, 0.2])
    assert np.array_equal(episode.commanded, np.stack(arm.commands))
    assert episode.measured[1:5, 2].min() > 0.02 and episode.truncated[-1]
    assert (np.diff(episode.time_ns) > 0).all()
    info = dict(episode.info)
    assert (info["seed"], info["policy_version"], info["task"]) == (21, "v1", "lift")
    assert info["spec_fingerprint"] == policy.spec.fingerprint


def test_late_actions_are_counted(robot: SimRobot, policy: OnnxPolicy) -> None:
    fixed, arm = Fixed(policy.spec, np.zeros((5, 7), np.float32)), ShortEpisodes(robot, 6)
    for tick_ms, late in ((20, 0), (60, 6)):
        clock = itertools.count(0, tick_ms * 1_000_000)
        assert run_episode(arm, fixed, 0, policy_version="v1", clock_ns=lambda: next(clock)).overruns == late  # noqa: B023


def test_an_action_of_nan_is_not_sent(robot: SimRobot, policy: OnnxPolicy) -> None:
    chunk = np.zeros((5, 7), np.float32)
    chunk[2, 0] = np.nan
    arm = ShortEpisodes(robot, 9)
    with pytest.raises(InvalidValueError, match="NaN or infinity; it was not sent"):
        run_episode(arm, Fixed(policy.spec, chunk), 0, policy_version="v1")
    assert len(arm.commands) == 2


class Kept:
    """A recorder in memory."""

    def __init__(self) -> None:
        self.episodes: list[Episode] = []

    def append(self, episode: Episode) -> None:
        self.episodes.append(episode)


def test_an_observation_of_nan_stops_within_the_chunk_and_nothing_recorded_is_lost(
    robot: SimRobot, policy: OnnxPolicy
) -> None:
    class Blind(ShortEpisodes):
        def command(self, action: FloatArray) -> StepResult:
            result = super().command(action)
            if len(self.commands) == 3:
                result.observation["object"][:] = np.nan
            return result

    arm, kept = Blind(robot, 9), Kept()
    with pytest.raises(InvalidValueError, match="'object' holds NaN"):
        run_episode(arm, Fixed(policy.spec, np.zeros((5, 7), np.float32)), 0, policy_version="v1", recorder=kept)
    assert len(arm.commands) == 3
    (episode,) = kept.episodes
    assert len(episode) == 2 and episode.truncated[-1] and episode.info["interrupted"]


def test_a_policy_for_another_arm_is_refused(policy: OnnxPolicy, robot: SimRobot) -> None:
    check_fit(policy, robot.spec)
    other = replace(robot.spec, control_rate_hz=10.0, robot="UR5e")
    with pytest.raises(SpecMismatchError, match=r"\(robot, policy\): robot: UR5e, Panda; control_rate_hz: 10.0, 20.0"):
        check_fit(policy, other)


def test_measured_motion_is_in_action_units(robot: SimRobot) -> None:
    robot.begin(0)
    turn = np.array([0, 0, 0, 0, 0, 0.2, -1], np.float32)
    for _ in range(8):
        turned = robot.command(turn).measured
    lift = np.array([0, 0, 0.2, 0, 0, 0, -1], np.float32)
    for _ in range(8):
        lifted = robot.command(lift).measured
    assert turned is not None and lifted is not None
    assert turned[5] == pytest.approx(np.abs(turned[:6]).max()) and turned[5] > 0.02
    assert lifted[2] == pytest.approx(np.abs(lifted[:6]).max()) and lifted[2] > 0.02
    assert lifted[6] == -1


def test_driver_names() -> None:
    assert make_robot("sim:lift").spec.task == "lift"
    with pytest.raises(UnknownNameError, match="unknown robot driver 'smi'; valid names: sim:"):
        make_robot("smi:lift")
    with pytest.raises(UnknownNameError, match="unknown task 'juggle'; valid names: lift"):
        make_robot("sim:juggle")
