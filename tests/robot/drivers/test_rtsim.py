"""The simulated robot on its own clock, real and virtual, through the control loop."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.episode import StepFlag
from sacflow_robot.errors import ConnectionLost, StoppedError, UnknownNameError, UsageError
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.robot.control.action_queue import ActionSource, SyncChunking
from sacflow_robot.robot.control.operator import Operator, OperatorRequests
from sacflow_robot.robot.control.run_config import EpisodeRun, RunConfig
from sacflow_robot.robot.control.session import run_episode
from sacflow_robot.robot.drivers.plant import Plant
from sacflow_robot.robot.drivers.registry import make_robot
from sacflow_robot.robot.drivers.rtsim import ProcessRobot, VirtualRobot
from sacflow_robot.robot.drivers.rtsim_options import RtsimOptions
from sacflow_robot.robot.drivers.sim import SimRobot
from sacflow_robot.robot.safety.filter import SafetyFilter, State
from sacflow_robot.robot.safety.safety_limits import SafetyLimits
from sacflow_robot.spec import FloatArray, Observation

LIFT = Path(__file__).parents[3] / "policies" / "lift.onnx"
MS = 1_000_000


@pytest.fixture(scope="module")
def policy() -> OnnxPolicy:
    return OnnxPolicy(LIFT)


@dataclass
class Scripted:
    """Chosen by the step's number alone, so that two robots are sent the same."""

    action: FloatArray
    joined: bool = False


class Script:
    def __init__(self, steps: int) -> None:
        rng = np.random.default_rng(4)
        self.actions = np.repeat(rng.uniform(-0.4, 0.4, (steps // 4 + 1, 7)), 4, axis=0).astype(np.float32)
        self.begin()

    def begin(self) -> None:
        self.step_number = 0

    def step(self, observation: Observation, noise: FloatArray | None = None) -> Scripted:
        self.step_number += 1
        return Scripted(self.actions[self.step_number - 1])


def virtual(query: str = "") -> VirtualRobot:
    robot = make_robot(f"rtsim:lift?clock=virtual&{query}".rstrip("&"))
    assert isinstance(robot, VirtualRobot)
    robot.connect()
    return robot


def test_without_delays_the_arm_does_what_it_does_in_lockstep(policy: OnnxPolicy) -> None:
    runs = [
        run_episode(robot, policy, 30_001, RunConfig(policy_version="v")) for robot in (SimRobot("lift"), virtual())
    ]
    lockstep, own = (run.episode for run in runs)
    assert lockstep.success and own.success
    common = min(len(lockstep), len(own))
    assert common > 10
    furthest = np.abs(lockstep.observations["robot0_eef_pos"][:common] - own.observations["robot0_eef_pos"][:common])
    assert furthest.max() < 1e-3, "to the rounding of observed goals"


def test_the_virtual_clock_repeats_itself_and_delays_move_what_they_should(policy: OnnxPolicy) -> None:
    query = "obs_delay_ms=20&cmd_delay_ms=30&jitter_ms=15&obs_drop=0.1&cmd_drop=0.1&noise_m=0.001&noise_rad=0.01"
    once, again = (run_episode(virtual(query), policy, 30_002, RunConfig(policy_version="v")).episode for _ in range(2))
    for key, rows in once.observations.items():
        assert np.array_equal(rows, again.observations[key])
    assert np.array_equal(once.action, again.action) and np.array_equal(once.time_ns, again.time_ns)
    assert once.received_ns is not None
    ages = (once.received_ns[1:] - once.time_ns[1:-1]) / MS
    assert ages.min() >= 20 and np.median(ages) > 25, "delay and jitter show in the capture times"


@pytest.mark.realtime
def test_both_clocks_play_the_same_events_in_the_same_order(policy: OnnxPolicy) -> None:
    """Margins are a quarter of a tick, 12 ms: where this machine was busier than that, the episode is played again.

    The robot's process can be late too, which this one does not see: what is looked at is whether events were the same.
    """
    link = {"tick_ms": 50.0, "obs_delay_ms": 50.0, "cmd_delay_ms": 50.0, "obs_drop": 0.1, "cmd_drop": 0.1}
    query = "&".join(f"{name}={value}" for name, value in link.items())
    wanted = run_episode(
        virtual(query), policy, 7, RunConfig(policy_version="v", actions=Script(40), max_steps=40)
    ).episode
    robot = make_robot(f"rtsim:lift?{query}")
    assert isinstance(robot, ProcessRobot)
    robot.connect()
    try:
        for _ in range(20):
            run = run_episode(robot, policy, 7, RunConfig(policy_version="v", actions=Script(40), max_steps=40))
            if all(np.array_equal(rows, run.episode.observations[key]) for key, rows in wanted.observations.items()):
                break
    finally:
        robot.close()
    for key, rows in wanted.observations.items():
        assert np.array_equal(rows, run.episode.observations[key]), key
    assert np.array_equal(wanted.action, run.episode.action)
    assert np.array_equal(np.diff(wanted.time_ns), np.diff(run.episode.time_ns).round(-6))


def test_what_happens_does_not_depend_on_how_often_it_is_looked_at() -> None:
    options = RtsimOptions(30, 25, jitter_ms=15, obs_drop=0.1, cmd_drop=0.1, noise_m=1e-3)
    seen = []
    for look_ms in (1, 7, 50):
        plant = Plant("lift", options, "compiled")
        plant.begin(7, 0)
        rng, arrived = np.random.default_rng(1), []
        for period in range(30):
            plant.send(rng.uniform(-1, 1, 7).astype(np.float32), (50 * period + 120) * MS, 50 * period * MS)
            for time_ms in range(50 * period + look_ms, 50 * period + 50, look_ms):
                plant.advance(time_ms * MS)
            plant.advance(50 * (period + 1) * MS)
            assert plant.arrived is not None
            arrived.append((plant.arrived.time_ns, *plant.arrived.observation["robot0_eef_pos"]))
        seen.append((arrived, plant.applied))
        plant.env.close()
    assert seen[0] == seen[1] == seen[2] and len(seen[0][1]) < 30


def test_an_arm_without_commands_holds_and_goes_nowhere() -> None:
    robot = virtual()
    robot.begin(3)
    push = np.array([0.5, 0, 0, 0, 0, 0, -1], np.float32)
    for _ in range(6):
        robot.command(push, robot.clock.now_ns() + 100 * MS)
        robot.clock.sleep_until(robot.clock.now_ns() + 50 * MS)
    robot.clock.sleep_until(robot.clock.now_ns() + 1500 * MS)  # silence: the last command's validity ends in it
    held = robot.observe().observation["robot0_eef_pos"]
    robot.clock.sleep_until(robot.clock.now_ns() + 2000 * MS)
    assert np.abs(robot.observe().observation["robot0_eef_pos"] - held).max() < 2e-3
    robot.command(push, robot.clock.now_ns() - 100 * MS)
    robot.clock.sleep_until(robot.clock.now_ns() + 500 * MS)
    assert np.abs(robot.observe().observation["robot0_eef_pos"] - held).max() < 2e-3, "an expired command does nothing"
    robot.stop()
    with pytest.raises(StoppedError, match="connect"):
        robot.command(push, robot.clock.now_ns() + 100 * MS)


class Failing:
    """A policy's chunks, until it is gone; then it is back."""

    def __init__(self, policy: OnnxPolicy, gone: range) -> None:
        self._inner, self._gone, self.count = SyncChunking(policy), gone, 0

    def begin(self) -> None:
        self._inner.begin()

    def step(self, observation: Observation, noise: FloatArray | None = None) -> object:
        self.count += 1
        if self.count in self._gone:
            raise ConnectionLost("it is gone")
        return self._inner.step(observation, noise)


def run_with_rearming(robot: VirtualRobot, policy: OnnxPolicy, chooser: ActionSource, said: list[str]) -> EpisodeRun:
    """A person who enables the robot as soon as it is said to hold."""
    requests = OperatorRequests()

    def tell(line: str) -> None:
        said.append(line)
        if line.startswith("hold"):
            requests.enable()

    config = RunConfig(policy_version="v", actions=chooser, tell=tell, operator=Operator(requests))
    return run_episode(robot, policy, 30_003, config)


def test_an_action_chosen_too_late_for_its_deadline_is_dropped(policy: OnnxPolicy) -> None:
    robot = virtual()

    class Slow(Script):
        def step(self, observation: Observation, noise: FloatArray | None = None) -> Scripted:
            chosen = super().step(observation, noise)
            if self.step_number == 6:
                robot.clock.sleep_until(robot.clock.now_ns() + 60 * MS)
            return chosen

    held = {}
    for most_s in (0.05, 0.15):
        safety = SafetyFilter(robot.spec, SafetyLimits(max_action_age_s=most_s))
        run = run_episode(
            robot, policy, 3, RunConfig(policy_version="v", safety=safety, actions=Slow(12), max_steps=10)
        )
        assert run.episode.flags is not None
        held[most_s] = [step for step, flags in enumerate(run.episode.flags) if flags & StepFlag.HELD]
    assert held == {0.05: [5], 0.15: []}


def test_a_server_that_goes_leaves_the_arm_in_hold_within_two_periods_and_it_goes_on_when_armed(
    policy: OnnxPolicy,
) -> None:
    said: list[str] = []
    run = run_with_rearming(virtual(), policy, Failing(policy, range(10, 13)), said)
    assert said[0] == "hold: no action came (it is gone)" and "enabled" in said
    flags, held = run.episode.flags, [t for t, source in enumerate(run.episode.source) if source == 3]
    assert flags is not None and held[0] == 9, "the first step without an action is no step of the policy's"
    assert np.abs(run.episode.action[held, :6]).max() == 0, "without limits of acceleration it is at rest at once"
    assert run.episode.success


def test_a_network_that_fails_leaves_the_arm_in_hold_within_two_periods_and_no_step_is_lost(policy: OnnxPolicy) -> None:
    said: list[str] = []
    limits = SafetyLimits(max_observation_age_s=0.06, patience_s=0.1)
    robot, requests = virtual("down_s=0.5&up_s=1.2"), OperatorRequests()
    safety = SafetyFilter(robot.spec, limits)
    held_at: list[int] = []

    def tell(line: str) -> None:
        said.append(line)
        held_at.append(robot.clock.now_ns())
        requests.enable()

    run = run_episode(
        *(robot, policy, 30_004),
        RunConfig(policy_version="v", safety=safety, tell=tell, max_steps=80, operator=Operator(requests)),
    )
    start = int(run.episode.time_ns[0])
    assert said[0].startswith("hold: the last observation is") and any("cannot enable" in line for line in said)
    # The last observation that arrives is of 490 ms; one older than 60 ms is a missing one.
    assert held_at[0] - start <= (490 + 60 + 2 * 50 + 50) * MS
    assert np.diff(run.timing.sent_ns).max() == 50 * MS and run.timing.missed == 0, "the loop goes on, step by step"


def test_an_emergency_stop_ends_the_episode_and_is_latched(policy: OnnxPolicy) -> None:
    robot, requests = virtual(), OperatorRequests()
    safety = SafetyFilter(robot.spec)

    class Stopping(Script):
        def step(self, observation: Observation, noise: FloatArray | None = None) -> Scripted:
            if self.step_number == 7:
                requests.stop("somebody's hand")
            return super().step(observation, noise)

    run = run_episode(
        robot,
        policy,
        5,
        RunConfig(policy_version="v", actions=Stopping(40), safety=safety, operator=Operator(requests)),
    )
    assert run.stopped == "somebody's hand" and run.episode.info["interrupted"] and len(run.episode) < 12
    assert safety.state is State.STOPPED
    with pytest.raises(StoppedError):
        robot.command(np.zeros(7, np.float32), robot.clock.now_ns() + 100 * MS)


def test_names_and_options_are_checked(tmp_path: Path) -> None:
    (tmp_path / "link.yaml").write_text("obs_delay_ms: 40\njitter_ms: 5\n")
    robot = make_robot(f"rtsim:lift?file={tmp_path / 'link.yaml'}&jitter_ms=7&clock=virtual")
    assert isinstance(robot, VirtualRobot) and (robot.options.obs_delay_ms, robot.options.jitter_ms) == (40, 7)
    for name, error, message in (
        ("rtsim:lift?delay=4", UnknownNameError, "valid names: clock, clock_drift_ppm, clock_offset_ms, cmd_delay_ms"),
        ("rtsim:lift?obs_drop=1.5", UsageError, "expected a share"),
        ("rtsim:lift?obs_delay_ms=soon", UsageError, "expected a number"),
        ("rtsim:lift?clock=sundial", UnknownNameError, "valid names: real, virtual"),
        ("rtsim:juggle?clock=virtual", UnknownNameError, "unknown task 'juggle'"),
        ("rtsim:lift?obs_delay_ms", UsageError, "expected DRIVER:SUBJECT"),
    ):
        with pytest.raises(error, match=message):
            make_robot(name)
    assert replace(robot.options).tick_ns == 10 * MS
