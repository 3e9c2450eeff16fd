"""Latency, noise, dynamics and the gap's causes, measured on a twin whose parameters are known to the test alone."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.calibrate.dynamics import identify
from sacflow_robot.calibrate.excitation import Excitation, record
from sacflow_robot.calibrate.gap import measure_gap
from sacflow_robot.calibrate.latency import measure_latency
from sacflow_robot.calibrate.noise import measure_noise
from sacflow_robot.calibrate.predict import Predictors, make_windows
from sacflow_robot.calibrate.problem import DELAY
from sacflow_robot.calibrate.recording import Recording, bursts, of_episode, read_log
from sacflow_robot.cli import main
from sacflow_robot.data.log.episode_writer import write_log
from sacflow_robot.envs.randomization import FRANKA
from sacflow_robot.envs.robot_parameters import RobotParameters
from sacflow_robot.episode import EpisodeBuilder, Step, StepResult
from sacflow_robot.errors import DataError, RobotError, UsageError
from sacflow_robot.robot.drivers.registry import make_robot
from sacflow_robot.robot.drivers.rtsim import VirtualRobot
from sacflow_robot.robot.drivers.rtsim_options import RtsimOptions
from sacflow_robot.robot.drivers.sim import SimRobot
from sacflow_robot.robot.safety.filter import SafetyFilter
from sacflow_robot.robot.safety.safety_limits import Box, SafetyLimits
from sacflow_robot.spec import RobotSpec

LIMITS = SafetyLimits(max_observation_age_s=0.5, max_action_age_s=0.5, patience_s=0.2, max_command_delay_s=0.4)
SHIPPED = Path(__file__).parents[2] / "calibration" / "sim_panda.yaml"
TRUTH = FRANKA.having(
    {
        "controller.translation_stiffness_per_s2": 190.0,
        "sensors.robot0_eef_pos.noise_m": 5e-4,
        "sensors.robot0_eef_pos.bias_m": [0.006, -0.003, 0.002],
        "sensors.robot0_joint_pos.noise_rad": 1.5e-4,
    }
)
COMMAND_MS, OBSERVATION_MS = 63.0, 41.0


@pytest.fixture(scope="module")
def recording() -> Recording:
    link = RtsimOptions(OBSERVATION_MS, COMMAND_MS, tick_ms=2.0, joints=1, model=TRUTH)
    robot = VirtualRobot("lift", link)
    robot.connect()
    shares: list[float] = []
    made = record(robot, SafetyFilter(robot.spec, LIMITS), Excitation(robot.spec, 30.0, 5), 5, shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0
    robot.close()
    return made


@pytest.fixture(scope="module")
def predictors() -> Iterator[Predictors]:
    made = Predictors("lift", 2)
    yield made
    made.close()


@pytest.mark.parametrize("joints", [True, False])
def test_latency_to_a_few_milliseconds(recording: Recording, joints: bool) -> None:
    seen = {key: rows for key, rows in recording.observations.items() if joints or key != "robot0_joint_pos"}
    found = measure_latency(replace(recording, observations=seen))
    assert 1e3 * found.observation_median_s == pytest.approx(OBSERVATION_MS, abs=1)
    assert 1e3 * found.command_mean_s == pytest.approx(COMMAND_MS, abs=3 if joints else 5)
    assert 1e3 * found.round_trip_s == pytest.approx(COMMAND_MS + OBSERVATION_MS, abs=3.5 if joints else 5.5)
    assert found.jitter_s == 0.0 and 1e-3 <= found.command_spread_s < 3e-3


def test_latency_without_times_of_arrival(recording: Recording) -> None:
    found = measure_latency(replace(recording, received_ns=np.full_like(recording.received_ns, -1)))
    assert 1e3 * found.command_mean_s == pytest.approx(COMMAND_MS, abs=3)
    assert found.clock is None and not len(found.observation_s)


def test_noise_and_the_poses_bias(recording: Recording, predictors: Predictors) -> None:
    found = measure_noise(recording, predictors.first.forward)
    values = {name: value for name, (value, _) in found.values.items()}
    assert values["sensors.robot0_eef_pos.noise_m"][0] == pytest.approx(5e-4, rel=0.1)
    assert values["sensors.robot0_joint_pos.noise_rad"][0] == pytest.approx(1.5e-4, rel=0.1)
    assert values["sensors.robot0_eef_pos.bias_m"] == pytest.approx([0.006, -0.003, 0.002], abs=2e-4)
    assert found.dropped == 0 and found.rate_hz == pytest.approx(500)
    alone = measure_noise(recording)
    assert not any("bias" in name for name in alone.values), "one sensor cannot tell its own bias"


def test_poor_data_are_refused_with_a_reason(recording: Recording) -> None:
    few = replace(
        recording, sent_ns=recording.sent_ns[:80], valid_ns=recording.valid_ns[:80], actions=recording.actions[:80]
    )
    with pytest.raises(DataError, match="motions after a rest could be used, 8 are needed"):
        measure_latency(few)
    rng = np.random.default_rng(0)
    shaken = {k: v + (k in ("robot0_eef_pos", "robot0_joint_pos")) * rng.normal(0, 0.05, v.shape).astype(np.float32)
              for k, v in recording.observations.items()}  # fmt: skip
    with pytest.raises(DataError, match=r"noise|scatter"):
        measure_latency(replace(recording, observations=shaken))
    sparse = replace(
        recording, time_ns=recording.time_ns[::100], received_ns=recording.received_ns[::100],
        observations={k: v[::100] for k, v in recording.observations.items()},
    )  # fmt: skip
    with pytest.raises(DataError, match="too few to tell noise"):
        measure_noise(sparse)
    with pytest.raises(DataError, match="do not increase"):
        replace(recording, time_ns=recording.time_ns[::-1])


def test_the_predictor_is_the_twin_where_it_knows_its_parameters(recording: Recording, predictors: Predictors) -> None:
    windows = make_windows(recording, bursts(recording), predictors.first, COMMAND_MS / 1e3)
    assert len(windows) >= 8
    known, nominal = predictors.predict([(TRUTH, COMMAND_MS / 1e3), (RobotParameters(), 0.0)], windows)

    def error(made: list) -> list[float]:  # type: ignore[type-arg]
        return [float(np.sqrt(np.mean((p.joints - w.joints) ** 2))) for p, w in zip(made, windows, strict=True)]

    assert np.median(error(known)) < 1e-3 < 5e-3 < np.median(error(nominal))


def test_dynamics_bring_the_held_out_error_down_and_say_what_they_do_not_know(
    recording: Recording, predictors: Predictors
) -> None:
    windows = make_windows(recording, bursts(recording), predictors.first, COMMAND_MS / 1e3)
    start = RobotParameters().having({DELAY: 60.0, "sensors.robot0_eef_pos.bias_m": [0.006, -0.003, 0.002]})
    fit = identify(predictors, windows, start, (5e-4, 1e-3, 1.5e-4))
    assert fit.held_out_rmse_m * 5 < fit.held_out_before_m
    values = dict(zip(fit.labels, fit.values, strict=True))
    told = dict(zip(fit.labels, fit.identified, strict=True))
    assert told["controller.translation_stiffness_per_s2"]
    assert values["controller.translation_stiffness_per_s2"] == pytest.approx(190, rel=0.1)
    assert values[DELAY] == pytest.approx(COMMAND_MS, abs=5)
    assert not told["payload.moment_kg_m[2]"], "where a load of no weight is cannot be told"
    moved = fit.moved(fit.labels.index("controller.translation_stiffness_per_s2"), float(np.log(1.3)))
    known, other = predictors.predict([(fit.model, fit.delay_ms / 1e3), moved], windows[3::4])

    def error(made: list) -> float:  # type: ignore[type-arg]
        return float(np.mean([np.mean((p.joints - w.joints) ** 2) for p, w in zip(made, windows[3::4], strict=True)]))

    assert error(other) > 4 * error(known), "nothing makes up for a stiffness that is known"
    assert "payload.center_m" not in fit.measured and "controller.translation_stiffness_per_s2" in fit.measured
    with pytest.raises(DataError, match="3 motions after a rest are too few"):
        identify(predictors, windows[:3], start, (5e-4, 1e-3, 1.5e-4))
    with pytest.raises(DataError, match="too little to identify a robot"):
        identify(predictors, windows, start, (0.5, 1e-3, 1.5e-4))


def test_the_gap_names_what_differs(recording: Recording, predictors: Predictors) -> None:
    mended = TRUTH.having({"controller.translation_stiffness_per_s2": 150.0, DELAY: COMMAND_MS})
    mended = mended.having({"transport.observation_delay_ms": OBSERVATION_MS})
    gap = measure_gap([recording], predictors, mended)
    assert gap.causes[0].name == "gain" and gap.causes[0].explains > 0.5
    now, found = gap.causes[0].change["controller.translation_stiffness_per_s2"]
    assert now == pytest.approx(150) and found == pytest.approx(190, rel=0.1)
    assert gap.joint_rmse_rad is not None and len(gap.joint_rmse_rad) == 7


def test_commands_on_a_recording(
    recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recording.save(tmp_path / "run.npz")
    back = Recording.load(tmp_path / "run.npz")
    assert back.robot == recording.robot and np.array_equal(back.actions, recording.actions)
    words = ["--profile", str(SHIPPED), "--recording", "run.npz", "--out", "arm.yaml", "--json"]
    assert main(["calibrate", "latency", *words]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["values"]["transport.command_delay_ms"]["value"][0] == pytest.approx(COMMAND_MS, abs=5)
    assert main(["calibrate", "noise", "--profile", "arm.yaml", *words[2:]]) == 0
    shown = capsys.readouterr().err
    assert "sensors.robot0_eef_pos.bias_m" in shown and "version 5" in shown
    assert (tmp_path / "calibrate-noise.png").exists() and (tmp_path / "calibrate-latency.png").exists()
    assert main(["calibrate", "latency", "--robot", "sim:lift", "--profile", str(SHIPPED)]) == 2
    assert "time stands still" in capsys.readouterr().err
    assert main(["gap", "--log", "absent.npz", "--profile", str(SHIPPED)]) == 1


def test_an_excitation_run_keeps_to_its_limits(robot_spec: RobotSpec) -> None:
    robot = make_robot("rtsim:lift?clock=virtual")
    robot.connect()
    with pytest.raises(UsageError, match="from 7 to 120"):
        Excitation(robot.spec, 300, 0)
    box = Box((-0.13, -0.03, 0.98), (-0.07, 0.03, 1.08))
    limits = replace(LIMITS, workspace=box, speed_m_per_s=(0.2,) * 3)
    made = record(robot, SafetyFilter(robot.spec, limits), Excitation(robot.spec, 8.0, 1), 1)
    assert np.abs(made.actions[:, :3]).max() <= 0.2 / 20 / 0.05 + 1e-6
    seen = made.observations["robot0_eef_pos"]
    assert (seen > np.array(box.low) - 0.01).all() and (seen < np.array(box.high) + 0.01).all()
    with pytest.raises(UsageError, match="stands still"):
        record(SimRobot("lift"), SafetyFilter(robot_spec), Excitation(robot_spec, 8.0, 1), 1)
    robot.close()
    late = make_robot("rtsim:lift?clock=virtual&obs_delay_ms=700")
    late.connect()
    with pytest.raises(RobotError):
        record(late, SafetyFilter(late.spec, LIMITS), Excitation(late.spec, 8.0, 1), 1)
    late.close()


def test_logged_episodes_are_recordings_too(tmp_path: Path, robot_spec: RobotSpec) -> None:
    robot = make_robot("rtsim:lift?clock=virtual&cmd_delay_ms=20")
    robot.connect()
    start = robot.begin(2)
    builder = EpisodeBuilder(start, start.time_ns or 0)
    push = np.array([0.2, 0, 0, 0, 0, 0, -1], np.float32)
    for _ in range(30):
        sent = robot.clock.now_ns()
        robot.command(push, sent + 200_000_000)
        robot.clock.sleep_until(sent + robot_spec.period_ns)
        seen = robot.observe()
        builder.append(Step(seen, push, seen.time_ns or 0, received_ns=robot.clock.now_ns(), sent_ns=sent))
    robot.close()
    episode = builder.build(seed=2)
    write_log(tmp_path / "log.zarr", robot_spec, [episode])
    (read,) = read_log(tmp_path / "log.zarr")
    assert np.array_equal(read.actions, episode.action) and (np.diff(read.time_ns) > 0).all()
    untimed = EpisodeBuilder(StepResult(start.observation), period_ns=50_000_000)
    untimed.add(StepResult(start.observation), push)
    with pytest.raises(DataError, match="does not say when its actions were sent"):
        of_episode(robot_spec, untimed.build())
