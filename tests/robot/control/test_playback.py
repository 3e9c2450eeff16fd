from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from sacflow_robot.envs.demonstrations import demonstrate
from sacflow_robot.episode import Episode, EpisodeBuilder, StepResult
from sacflow_robot.errors import DataError, SpecMismatchError
from sacflow_robot.robot.conformance import FakeRobot
from sacflow_robot.robot.control.playback import check_replayable, replay_episode, sending_offsets
from sacflow_robot.robot.drivers.registry import make_robot
from sacflow_robot.robot.drivers.sim import SimRobot
from sacflow_robot.robot.safety.action_clipper import ActionClipper
from sacflow_robot.spec import FloatArray, RobotSpec
from sacflow_robot.utils.action_history import with_action_history

MS = 1_000_000


@pytest.fixture(scope="module")
def sim() -> Iterator[SimRobot]:
    made = SimRobot("lift")
    yield made
    made.close()


@pytest.fixture(scope="module")
def demonstration() -> Episode:
    return demonstrate("lift", "proficient", 5)


class FakeClock:
    """A clock that moves when someone sleeps, and a little each time it is looked at."""

    def __init__(self) -> None:
        self.time_ns = 1_000 * MS

    def now_ns(self) -> int:
        self.time_ns += 1_000
        return self.time_ns

    def sleep_until(self, time_ns: int) -> None:
        self.time_ns = max(self.time_ns, time_ns)


class Robot(FakeRobot):
    """A physical robot as far as replay can tell: no states, observations of its own, commands that take their time."""

    def __init__(self, episode: Episode, spec: RobotSpec, clock: FakeClock | None = None) -> None:
        self._episode, self._fake = episode, clock
        self.sent_ns: list[int] = []
        self.slow_step, self.ends_after = -1, len(episode)
        super().__init__(spec, clock)

    def start(self, seed: int) -> StepResult:
        return StepResult(self._observation(0))

    def react(self, action: FloatArray) -> StepResult:
        done = len(self.commands)
        if self._fake is not None:
            self.sent_ns.append(self._fake.time_ns)
            self._fake.time_ns += (130 if done - 1 == self.slow_step else 10) * MS
        return StepResult(self._observation(done), truncated=done >= self.ends_after)

    def _observation(self, step: int) -> dict[str, FloatArray]:
        return {key: rows[step].copy() for key, rows in self._episode.observations.items()}


def test_the_simulator_reproduces_every_state_and_shows_where_it_does_not(
    sim: SimRobot, demonstration: Episode
) -> None:
    sim.begin(6)
    result = replay_episode(sim, demonstration)
    assert result.steps == len(demonstration) and result.success == demonstration.success
    assert result.max_state_deviation is not None and result.max_state_deviation <= 1e-9
    assert max(result.observation_deviation.values()) <= 1e-9 and result.limited_steps == 0
    assert result.max_lateness_ns is None
    assert result.states is not None and demonstration.states is not None
    states = demonstration.states.copy()
    states[20, 3] += 0.01
    assert replay_episode(sim, replace(demonstration, states=states)).max_state_deviation == pytest.approx(0.01)
    with pytest.raises(DataError, match="no simulator states"):
        replay_episode(sim, replace(demonstration, states=None))


def test_limits_hold_in_the_simulator_too(sim: SimRobot, demonstration: Episode) -> None:
    bound = np.full(7, 0.1, np.float32)
    result = replay_episode(sim, demonstration, safety=ActionClipper(sim.spec, (-bound, bound)))
    beyond = (np.abs(demonstration.action) > 0.1).any(axis=1)
    assert result.limited_steps == beyond.sum() > 0
    assert np.array_equal(result.commanded, np.clip(demonstration.action, -bound, bound))
    assert result.max_state_deviation is not None and result.max_state_deviation > 1e-3


def test_commands_are_sent_at_their_logged_times_and_lateness_does_not_add_up(
    make_episode: Callable[..., Episode], robot_spec: RobotSpec
) -> None:
    episode, clock = make_episode(8), FakeClock()
    times = np.array([0, 50, 120, 150, 210, 260, 290, 340, 400]) * MS
    episode = replace(episode, time_ns=times)
    device = Robot(episode, robot_spec, clock)
    device.slow_step = 2  # takes 130 ms, so that steps 3 and 4 are late and step 5 is not
    result = replay_episode(device, episode, offsets_ns=sending_offsets(episode))
    start_ns = device.sent_ns[0]
    late_ms = (np.array(device.sent_ns) - start_ns - times[:-1]) / MS
    assert late_ms[[0, 1, 2, 6, 7]] == pytest.approx(0, abs=0.01)
    assert late_ms[3] == pytest.approx(120 + 130 - 150, abs=0.01) and late_ms[4] == pytest.approx(50, abs=0.01)
    assert late_ms[5] == pytest.approx(10, abs=0.01)
    assert result.max_lateness_ns == pytest.approx(100 * MS, rel=1e-3)


def test_another_arm_gets_limited_commands_and_is_compared_by_what_it_sees(
    make_episode: Callable[..., Episode], robot_spec: RobotSpec
) -> None:
    episode = make_episode(6, states=False)
    seen = {key: rows.copy() for key, rows in episode.observations.items()}
    seen["robot0_eef_pos"][4, 2] += 0.25
    seen["robot0_eef_quat"] *= -1  # the same rotations
    device, bound = Robot(replace(episode, observations=seen), robot_spec), np.full(7, 0.5, np.float32)
    result = replay_episode(device, episode, safety=ActionClipper(device.spec, (-bound, bound)))
    assert np.array_equal(np.stack(device.commands), np.clip(episode.action, -0.5, 0.5))
    assert result.limited_steps == (np.abs(episode.action) > 0.5).any(axis=1).sum()
    assert result.max_state_deviation is None and result.states is None
    assert result.observation_deviation["robot0_eef_pos"] == pytest.approx(0.25)
    assert result.observation_deviation["robot0_eef_quat"] == result.observation_deviation["object"] == 0


def test_an_arm_that_ends_the_episode_is_sent_nothing_more(
    make_episode: Callable[..., Episode], robot_spec: RobotSpec
) -> None:
    episode = make_episode(6, states=False)
    device = Robot(episode, robot_spec)
    device.ends_after = 2
    result = replay_episode(device, episode)
    assert result.steps == len(device.commands) == 2
    assert set(result.observation_deviation.values()) == {0.0}


def test_an_episode_that_does_not_fit_is_refused(make_episode: Callable[..., Episode], robot_spec: RobotSpec) -> None:
    episode = make_episode(3)
    other = replace(robot_spec, control_rate_hz=10.0, robot="UR5e")
    with pytest.raises(
        SpecMismatchError,
        match=r"x\.zarr does not .* \(robot, log\): robot: Panda, UR5e; control_rate_hz: 20.0, 10.0",
    ):
        check_replayable(Robot(episode, robot_spec), other, episode, "x.zarr")


def test_times_come_from_the_sending_where_it_is_known(make_episode: Callable[..., Episode]) -> None:
    episode = make_episode(3)
    assert sending_offsets(episode).tolist() == [0, 50 * MS, 100 * MS]
    object.__setattr__(episode, "sent_ns", episode.time_ns[:-1] + 7 * MS)
    assert sending_offsets(episode).tolist() == [7 * MS, 57 * MS, 107 * MS]
    object.__setattr__(episode, "sent_ns", np.array([7 * MS, -1, 107 * MS]))
    assert sending_offsets(episode).tolist() == [7 * MS, 50 * MS, 107 * MS]
    with pytest.raises(DataError, match="run backwards"):
        sending_offsets(replace(make_episode(3), time_ns=np.array([0, 50, 40, 60]) * MS))


def test_a_log_with_action_history_replays_on_an_arm_with_any_or_none() -> None:
    seen = make_robot("sim:lift?history=3")
    seen.connect()
    start = seen.begin(3)
    builder = EpisodeBuilder(start, period_ns=seen.spec.period_ns)
    for action in np.random.default_rng(0).uniform(-1, 1, (4, 7)).astype(np.float32):
        seen.command(action, 0)
        builder.add(seen.observe(), action)
    episode, log_robot = builder.build(seed=3), seen.spec
    plain = SimRobot("lift")
    for robot in (seen, plain):
        robot.connect()
        check_replayable(robot, log_robot, episode, "log")
        check_replayable(robot, plain.spec, with_action_history(episode, 0), "log")
        assert replay_episode(robot, episode).max_state_deviation == 0
    other = replace(log_robot, control_rate_hz=10.0)
    with pytest.raises(SpecMismatchError, match="control_rate_hz"):
        check_replayable(seen, other, episode, "log")
    seen.close()
    plain.close()
