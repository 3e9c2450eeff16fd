import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sacflow_robot.episode import Episode, EpisodeBuilder, Step, StepFlag, StepResult
from sacflow_robot.errors import InvalidValueError, SpecMismatchError, UnknownNameError, UsageError
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.interfaces import Clock
from sacflow_robot.robot.conformance import FakeRobot
from sacflow_robot.robot.control.run_config import RunConfig, check_fit
from sacflow_robot.robot.control.session import run_episode
from sacflow_robot.robot.drivers.registry import make_robot
from sacflow_robot.robot.drivers.sim import SimRobot
from sacflow_robot.robot.safety.action_clipper import ActionClipper
from sacflow_robot.spec import FloatArray, Observation, PolicySpec
from sacflow_robot.utils.seeding import chunk_noise


@pytest.fixture(scope="module")
def sim() -> SimRobot:
    return SimRobot("lift")


@pytest.fixture(scope="module")
def policy(policy_file: Path) -> OnnxPolicy:
    return OnnxPolicy(policy_file)


class ShortEpisodes(FakeRobot):
    """The simulated robot, with episodes of a few steps."""

    def __init__(self, robot: SimRobot, steps: int, clock: Clock | None = None) -> None:
        self._robot, self._steps, self._taken = robot, steps, 0
        super().__init__(robot.spec, clock)

    def start(self, seed: int) -> StepResult:
        self._taken = 0
        return self._robot.begin(seed)

    def react(self, action: FloatArray) -> StepResult:
        self._taken += 1
        self._robot.command(action, 0)
        return replace(self._robot.observe(), truncated=self._taken >= self._steps)


class Ticking:
    """A clock that ticks once a reading."""

    def __init__(self, start_ns: int, tick_ns: int) -> None:
        self._times = itertools.count(start_ns, tick_ns)

    def now_ns(self) -> int:
        return next(self._times)

    def sleep_until(self, time_ns: int) -> None:
        raise AssertionError("a lockstep loop does not wait")


class Fixed:
    """A policy that always answers with the same chunk."""

    def __init__(self, spec: PolicySpec, chunk: FloatArray) -> None:
        self.spec, self._chunk = spec, chunk
        self.calls: list[tuple[Observation, FloatArray]] = []

    def infer(self, observation: Observation, noise: FloatArray) -> FloatArray:
        self.calls.append((observation, noise))
        return self._chunk[None]


def test_a_chunk_is_played_open_loop_and_its_story_recorded(sim: SimRobot, policy: OnnxPolicy) -> None:
    chunk = np.zeros((5, 7), np.float32)
    chunk[:, 2] = [0.1, 0.2, 0.3, 0.4, 3.0]
    fixed, wrapped = Fixed(policy.spec, chunk), ShortEpisodes(sim, 7)
    run = run_episode(
        wrapped,
        fixed,
        21,
        RunConfig(policy_version="v1", safety=ActionClipper(sim.spec, (np.full(7, -0.25), np.full(7, 0.25)))),
    )
    assert len(fixed.calls) == 2, "the policy is asked once a chunk"
    for (_, noise), step in zip(fixed.calls, (0, 5), strict=True):
        assert np.array_equal(noise, chunk_noise((1, 5, 7), 21, step))
    episode = run.episode
    assert episode.policy_action[:, 2] == pytest.approx([0.1, 0.2, 0.3, 0.4, 3.0, 0.1, 0.2])
    assert episode.action[:, 2] == pytest.approx([0.1, 0.2, 0.25, 0.25, 0.25, 0.1, 0.2])
    assert np.array_equal(episode.action, np.stack(wrapped.commands))
    assert episode.measured[1:5, 2].min() > 0.02 and episode.truncated[-1]
    assert (np.diff(episode.time_ns) > 0).all()
    info = dict(episode.info)
    assert (info["seed"], info["policy_version"], info["task"]) == (21, "v1", "lift")
    assert info["spec_fingerprint"] == policy.spec.fingerprint


def test_late_actions_are_counted(sim: SimRobot, policy: OnnxPolicy) -> None:
    fixed, wrapped = Fixed(policy.spec, np.zeros((5, 7), np.float32)), ShortEpisodes(sim, 6)
    for tick_ms, late in ((20, 0), (60, 6)):
        wrapped.clock = Ticking(0, tick_ms * 1_000_000)
        assert run_episode(wrapped, fixed, 0, RunConfig(policy_version="v1")).overruns == late


def test_an_action_of_nan_is_not_sent(sim: SimRobot, policy: OnnxPolicy) -> None:
    chunk = np.zeros((5, 7), np.float32)
    chunk[2, 0] = np.nan
    wrapped = ShortEpisodes(sim, 9)
    with pytest.raises(InvalidValueError, match="NaN or infinity; it was not sent"):
        run_episode(wrapped, Fixed(policy.spec, chunk), 0, RunConfig(policy_version="v1"))
    assert len(wrapped.commands) == 2


class Kept:
    """A recorder in memory."""

    def __init__(self) -> None:
        self.episodes: list[Episode] = []

    def begin(self, start: StepResult, time_ns: int, info: Mapping[str, Any]) -> None:
        self._builder, self._info = EpisodeBuilder(start, time_ns), dict(info)

    def append(self, step: Step) -> None:
        self._builder.append(step)

    def end(self, info: Mapping[str, Any]) -> None:
        self.episodes.append(self._builder.build(**self._info, **info))


def test_the_recorder_gets_every_step_with_its_times_and_flags(sim: SimRobot, policy: OnnxPolicy) -> None:
    """The clock ticks once a reading: received, inferred once a chunk, then sent and received again for each step."""
    chunk = np.zeros((5, 7), np.float32)
    chunk[1, 0] = 1.5
    wrapped, kept, tick = ShortEpisodes(sim, 7), Kept(), 30_000_000
    wrapped.clock = Ticking(0, tick)
    info = {"note": "second try", "calibration_sha256": "ab"}
    run = run_episode(
        *(wrapped, Fixed(policy.spec, chunk), 3), RunConfig(policy_version="v1", recorder=kept, info=info)
    )
    (episode,) = kept.episodes
    first, late = StepFlag.CHUNK_START, StepFlag.LATE
    for found in (episode, run.episode):
        assert (found.time_ns // tick).tolist() == [0, 3, 5, 7, 9, 11, 14, 16]
        assert (found.received_ns // tick).tolist() == [0, 3, 5, 7, 9, 11, 14]
        assert (found.inferred_ns // tick).tolist() == [1, 1, 1, 1, 1, 12, 12]
        assert (found.sent_ns // tick).tolist() == [2, 4, 6, 8, 10, 13, 15]
        assert found.flags.tolist() == [first | late, StepFlag.CLIPPED, 0, 0, 0, first | late, StepFlag.CLIPPED]
        assert found.info["note"] == "second try" and found.info["calibration_sha256"] == "ab"
    assert run.overruns == 2


def test_capture_times_of_an_arm_that_tells_them_are_kept(sim: SimRobot, policy: OnnxPolicy) -> None:
    class Stamped(ShortEpisodes):
        def react(self, action: FloatArray) -> StepResult:
            return replace(super().react(action), time_ns=1000 * self._taken)

    fixed, wrapped = Fixed(policy.spec, np.zeros((5, 7), np.float32)), Stamped(sim, 3, Ticking(1_000_000, 1))
    episode = run_episode(wrapped, fixed, 3, RunConfig(policy_version="v1")).episode
    assert episode.time_ns.tolist() == [1_000_000, 1000, 2000, 3000]
    assert episode.received_ns is not None and (episode.received_ns >= 1_000_000).all()


def test_an_observation_of_nan_stops_within_the_chunk_and_nothing_recorded_is_lost(
    sim: SimRobot, policy: OnnxPolicy
) -> None:
    class Blind(ShortEpisodes):
        def react(self, action: FloatArray) -> StepResult:
            result = super().react(action)
            if len(self.commands) == 3:
                result.observation["object"][:] = np.nan
            return result

    wrapped, kept = Blind(sim, 9), Kept()
    with pytest.raises(InvalidValueError, match="'object' contains NaN"):
        run_episode(
            wrapped, Fixed(policy.spec, np.zeros((5, 7), np.float32)), 0, RunConfig(policy_version="v1", recorder=kept)
        )
    assert len(wrapped.commands) == 3
    (episode,) = kept.episodes
    assert len(episode) == 3 and episode.truncated[-1] and episode.info["interrupted"], "what was sent is logged"
    assert (
        episode.flags is not None
        and episode.flags[2] & StepFlag.OBS_INVALID
        and not episode.flags[1] & StepFlag.OBS_INVALID
    )
    assert np.array_equal(episode.observations["object"][3], episode.observations["object"][2])


def test_a_policy_for_another_arm_is_refused(policy: OnnxPolicy, sim: SimRobot) -> None:
    check_fit(policy, sim.spec)
    other = replace(sim.spec, control_rate_hz=10.0, robot="UR5e")
    with pytest.raises(SpecMismatchError, match=r"\(robot, policy\): robot: UR5e, Panda; control_rate_hz: 10.0, 20.0"):
        check_fit(policy, other)


def test_measured_motion_is_in_action_units(sim: SimRobot) -> None:
    sim.begin(0)
    turn = np.array([0, 0, 0, 0, 0, 0.2, -1], np.float32)
    for _ in range(8):
        sim.command(turn, 0)
    turned = sim.observe().measured
    lift = np.array([0, 0, 0.2, 0, 0, 0, -1], np.float32)
    for _ in range(8):
        sim.command(lift, 0)
    lifted = sim.observe().measured
    assert turned is not None and lifted is not None
    assert turned[5] == pytest.approx(np.abs(turned[:6]).max()) and turned[5] > 0.02
    assert lifted[2] == pytest.approx(np.abs(lifted[:6]).max()) and lifted[2] > 0.02
    assert lifted[6] == -1


def test_a_lockstep_arm_can_be_paced(sim: SimRobot) -> None:
    slow = SimRobot("lift", speed=2.0)
    slow.begin(3)
    sim.begin(3)
    begun = slow.clock.now_ns()
    for _ in range(4):
        action = np.full(7, 0.1, np.float32)
        slow.command(action, 0)
        sim.command(action, 0)
    assert slow.clock.now_ns() - begun >= 4 * 25_000_000, "two times real time, at most"
    assert np.array_equal(slow.observe().observation["object"], sim.observe().observation["object"])
    for speed, complaint in (("-1", "expected how many times"), ("nan", "expected how"), ("slow", "expected a number")):
        with pytest.raises(UsageError, match=complaint):
            make_robot(f"sim:lift?speed={speed}")


def test_driver_names() -> None:
    assert make_robot("sim:lift").spec.task == "lift"
    with pytest.raises(UnknownNameError, match=r"unknown robot driver 'smi'; valid names: .*sim:"):
        make_robot("smi:lift")
    with pytest.raises(UnknownNameError, match="unknown task 'juggle'; valid names: can, door, lift"):
        make_robot("sim:juggle")
