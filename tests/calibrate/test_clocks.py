"""Two clocks compared by what a run tells in both directions, on robots whose clock is known to the test alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sacflow_robot.calibrate.clocks import fastest_way, measure_offset
from sacflow_robot.calibrate.excitation import Excitation, record
from sacflow_robot.calibrate.latency import measure_latency
from sacflow_robot.calibrate.noise import measure_noise
from sacflow_robot.calibrate.profile import load_profile
from sacflow_robot.calibrate.recording import Recording
from sacflow_robot.cli import main
from sacflow_robot.envs.randomization import FRANKA
from sacflow_robot.envs.robot_parameters import RobotParameters
from sacflow_robot.errors import DataError
from sacflow_robot.robot.drivers.registry import make_robot
from sacflow_robot.robot.drivers.rtsim import VirtualRobot
from sacflow_robot.robot.drivers.rtsim_options import RtsimOptions
from sacflow_robot.robot.drivers.wrappers import by_loop_clock
from sacflow_robot.robot.safety.filter import SafetyFilter
from sacflow_robot.robot.safety.safety_limits import SafetyLimits

SHIPPED = Path(__file__).parents[2] / "calibration" / "sim_panda.yaml"
LIMITS = SafetyLimits(max_observation_age_s=0.5, max_action_age_s=0.5, patience_s=0.2, max_command_delay_s=0.4)
OBSERVATION_MS, COMMAND_MS = 12.0, 20.0


def recorded(offset_ms: float, drift_ppm: float = 0.0) -> Recording:
    model: RobotParameters = FRANKA.having({"sensors.robot0_joint_pos.noise_rad": 1e-4})
    link = RtsimOptions(
        OBSERVATION_MS, COMMAND_MS, tick_ms=2.0, joints=1, model=model, clock_offset_ms=offset_ms,
        clock_drift_ppm=drift_ppm,
    )  # fmt: skip
    robot = VirtualRobot("lift", link)
    robot.connect()
    made = record(robot, SafetyFilter(robot.spec, LIMITS), Excitation(robot.spec, 20.0, 5), 5)
    robot.close()
    return made


@pytest.mark.parametrize(("offset_ms", "drift_ppm"), [(-86_400_000.0, 0.0), (3_000.0, 60.0), (-45.0, 0.0)])
def test_an_arm_of_another_clock(offset_ms: float, drift_ppm: float, tmp_path: Path) -> None:
    made = recorded(offset_ms, drift_ppm)
    found = measure_latency(made)
    clock = found.clock
    assert clock is not None and clock.differs
    began_ms = drift_ppm * 1e-6 * 1e3  # the virtual clock begins at one second
    assert 1e3 * clock.low_s - 2 <= offset_ms + began_ms <= 1e3 * clock.high_s + 2, "the truth lies within the bounds"
    assert 1e3 * (clock.high_s - clock.low_s) == pytest.approx(OBSERVATION_MS + COMMAND_MS, abs=3)
    assert clock.way.drift_ppm == pytest.approx(drift_ppm, abs=5)
    together = 1e3 * (found.command_mean_s + found.observation_median_s)
    assert together == pytest.approx(OBSERVATION_MS + COMMAND_MS, abs=3), "the sum is told, whatever the clocks"
    assert 1e3 * found.unsure_s > (OBSERVATION_MS + COMMAND_MS) / 4, "each is not"
    back = clock.by_loop(made)
    late = (back.received_ns - back.time_ns) / 1e6
    assert late.min() >= 0 and np.ptp(late) < 4
    assert measure_noise(made).rows > 1000, "the rest at the beginning is found"
    made.save(tmp_path / "run.npz")
    words = ["--profile", str(SHIPPED), "--recording", str(tmp_path / "run.npz"), "--out", str(tmp_path / "arm.yaml")]
    assert main(["calibrate", "latency", *words, "--plot", str(tmp_path / "latency.png")]) == 0
    assert "transport.clock_offset_ms" in load_profile(tmp_path / "arm.yaml").measured


def test_an_arm_of_the_same_clock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = recorded(0.0)
    clock = measure_latency(made).clock
    assert clock is not None and not clock.differs and clock.offset_s == 0 and clock.way.drift_ppm == 0
    assert clock.by_loop(made) is made
    assert -1e3 * clock.low_s == pytest.approx(OBSERVATION_MS, abs=2)
    made.save(tmp_path / "run.npz")
    words = ["--profile", str(SHIPPED), "--recording", str(tmp_path / "run.npz"), "--json"]
    assert main(["calibrate", "latency", *words, "--plot", str(tmp_path / "latency.png")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["clock"]["differs"] is False and "transport.clock_offset_ms" not in printed["values"]


@settings(max_examples=40, deadline=None)
@given(
    offset_ms=st.floats(-1e9, 1e9), here_ms=st.floats(0, 200), there_ms=st.floats(0, 200), drift_ppm=st.floats(-200, 200),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_the_truth_lies_within_the_bounds(
    offset_ms: float, here_ms: float, there_ms: float, drift_ppm: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    true_ns = np.arange(0, 60_000_000_000, 10_000_000) + 10**15
    stamps = true_ns + round(1e6 * offset_ms) + np.round(1e-6 * drift_ppm * (true_ns - true_ns[0])).astype(np.int64)
    received = true_ns + np.round(1e6 * (here_ms + rng.exponential(3.0, len(true_ns)))).astype(np.int64)
    way = fastest_way(stamps, received)
    assert way.drift_ppm == pytest.approx(drift_ppm, abs=max(10.0, 5 * way.spread_ppm))
    late = received - way.arrival_ns(stamps)
    assert late.min() >= -100_000, "nothing arrives before the fastest"
    clock = measure_offset(way, (here_ms + there_ms) / 1e3)
    slack = 1.5  # the drift's own uncertainty over a minute
    assert 1e3 * clock.low_s - slack <= offset_ms <= 1e3 * clock.high_s + slack
    if clock.differs:
        assert clock.low_s <= clock.offset_s <= clock.high_s


def test_clocks_that_cannot_be_compared_are_refused() -> None:
    stamps = np.arange(0, 30_000_000_000, 10_000_000)
    with pytest.raises(DataError, match="30 observations with times of capture and arrival are too few"):
        fastest_way(stamps[:30], stamps[:30] + 1)
    with pytest.raises(DataError, match=r"one of the two clocks was set by 40 ms some 1[34]"):
        fastest_way(stamps, stamps + 5_000_000 + np.where(stamps > 14_500_000_000, 40_000_000, 0))
    with pytest.raises(DataError, match="do the driver's times count nanoseconds"):
        fastest_way(stamps // 1000 + 7, stamps)


def test_a_profiles_offset_is_taken_off() -> None:
    robot = make_robot("rtsim:lift?clock=virtual&obs_delay_ms=30&clock_offset_ms=-500")
    robot.connect()
    assert by_loop_clock(robot, 0.0) is robot
    mended = by_loop_clock(robot, -500.0)
    start = mended.begin(1)
    late = mended.clock.now_ns() - (start.time_ns or 0)
    assert 30_000_000 <= late <= 50_000_000
    assert (robot.observe().time_ns or 0) + 500_000_000 == mended.observe().time_ns
    assert mended.spec == robot.spec and mended.lockstep is False
    mended.close()
