"""``sacflow-robot replay``, as its users call it."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import rerun as rr

from sacflow_robot.cli import main
from sacflow_robot.data.log.episode_writer import write_log
from sacflow_robot.envs.demonstrations import demonstrate
from sacflow_robot.episode import Episode
from sacflow_robot.robot.conformance import FakeRobot
from sacflow_robot.robot.drivers.registry import DRIVERS
from sacflow_robot.spec import RobotSpec

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def demonstration() -> Episode:
    return demonstrate("lift", "proficient", 5)


@pytest.fixture(scope="module")
def log(demonstration: Episode, robot: RobotSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("logs") / "log.zarr"
    write_log(path, robot, [demonstration])
    return path


def replay(capsys: Capture, *words: object) -> tuple[dict[str, Any], str]:
    """JSON and messages of a replay that must succeed."""
    assert main(["replay", *map(str, words), "--json"]) == 0
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    return json.loads(line), captured.err


def fails(capsys: Capture, status: int, *words: object) -> str:
    """The one line of a replay that must fail with this status."""
    assert main(["replay", *map(str, words)]) == status
    captured = capsys.readouterr()
    (line,) = (line for line in captured.err.splitlines() if line.startswith("sacflow-robot: error: "))
    assert not captured.out
    return line


def limited_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)


def drawn(messages: str) -> None:
    if "no pictures: " in messages:
        pytest.skip("off-screen rendering does not work here")


def test_video_and_recording_of_one_replay(capsys: Capture, tmp_path: Path, log: Path, demonstration: Episode) -> None:
    video, recording = tmp_path / "a.mp4", tmp_path / "a.rrd"
    result, messages = replay(capsys, log, "--video", video, "--rerun", recording)
    assert result["max_state_deviation"] <= 1e-9 and result["success"] == demonstration.success
    assert (result["episode"], result["steps"]) == (0, len(demonstration))
    drawn(messages)
    with av.open(str(video)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert len(frames) == result["steps"] + 1
    first, last = frames[0][:480].astype(int), frames[-1][:480].astype(int)
    assert (np.abs(first - last).max(axis=2) > 40).mean() > 0.02, "the robot has moved"
    table = rr.dataframe.load_recording(recording).view(index="step", contents="/**").select().read_all()
    pictures = [row for row in table["/camera/agentview:Blob"].to_pylist() if row]
    assert len(pictures) == len(frames) and recording.stat().st_size < 60_000 * len(frames)
    assert demonstration.states is not None
    joints = [row[0] for row in table["/joints/robot0_joint2:Scalar"].to_pylist() if row]
    assert joints == pytest.approx(demonstration.states[:, 2]), "time, joint 1, joint 2"
    cube = [row[0] for row in table["/world/objects/cube_main:Translation3D"].to_pylist() if row]
    assert np.allclose(cube, demonstration.observations["object"][:, :3], atol=1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.rrd"}


def test_logged_timing(capsys: Capture, tmp_path: Path, robot: RobotSpec, demonstration: Episode) -> None:
    """What is late depends on the machine; that the states come out equal and the time is taken does not."""
    short = replace(demonstration, time_ns=demonstration.time_ns // 10)
    write_log(tmp_path / "log.zarr", robot, [short])
    result, messages = replay(capsys, tmp_path / "log.zarr", "--timing", "logged")
    assert result["max_state_deviation"] <= 1e-9 and result["timing"] == "logged"
    assert result["max_lateness_ms"] >= 0 and "ms late at most" in messages


def test_a_physical_arm_gets_the_commands_within_its_profile(
    capsys: Capture,
    tmp_path: Path,
    log: Path,
    robot: RobotSpec,
    demonstration: Episode,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = FakeRobot(robot)
    monkeypatch.setitem(DRIVERS, "fake", lambda subject, options: device)
    profile = tmp_path / "gentle.yaml"
    profile.write_text(
        "robot: Panda\nversion: 1\ndate: 2026-11-22\nmethod: test\n"
        "max_translation_per_step_m: 0.01\nmax_rotation_per_step_rad: 0.05\n"
    )
    result, messages = replay(capsys, log, "--robot", "fake:0", "--profile", profile)
    sent = np.stack(device.commands)
    assert np.array_equal(sent[:, :3], np.clip(demonstration.action[:, :3], -0.2, 0.2)) and device.closed
    assert result["limited_steps"] > 0 and result["max_state_deviation"] is None
    furthest = np.abs(demonstration.observations["robot0_eef_pos"]).max()
    assert result["max_observation_deviation"]["robot0_eef_pos"] == pytest.approx(furthest)
    assert "largest deviation of observations: robot0_eef_pos" in messages

    device.commands.clear()
    assert "fake:0 is not one" in fails(capsys, 2, log, "--robot", "fake:0", "--video", tmp_path / "a.mp4")
    device.spec = replace(robot, robot="UR5e")
    assert "(robot, log): robot: UR5e, Panda" in fails(capsys, 1, log, "--robot", "fake:0")
    assert not device.commands, "nothing moved"


def test_a_log_without_states_is_exported_and_not_replayed(
    capsys: Capture, tmp_path: Path, make_episode: Callable[..., Episode], robot: RobotSpec
) -> None:
    log, recording = tmp_path / "log.zarr", tmp_path / "a.rrd"
    write_log(log, robot, [make_episode(3, states=False), make_episode(4, states=False)])
    result, messages = replay(capsys, log, "--episode", -1, "--rerun", recording)
    assert "not replayed, exported as logged: this episode has no simulator states" in messages
    assert (result["episode"], result["steps"], result["replayed"]) == (1, 4, False)
    assert result["max_state_deviation"] is None and recording.exists()
    for option in (["--robot", "sim:lift"], ["--timing", "logged"], ["--video", tmp_path / "a.mp4"]):
        assert "no simulator states" in fails(capsys, 1, log, "--rerun", tmp_path / "b.rrd", *option)
    assert "no simulator states" in fails(capsys, 1, log)
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"} == {"log.zarr", "a.rrd"}


def test_a_recording_without_a_simulator_and_what_is_not_installed(tmp_path: Path, log: Path) -> None:
    call = f"from sacflow_robot.cli import main; sys.exit(main(['replay', {str(log)!r}, "
    blocked = "import sys; sys.modules.update(dict.fromkeys(('mujoco', 'robosuite'))); "
    done = limited_python(f"{blocked}{call}'--rerun', 'a.rrd', '--json']))", tmp_path)
    assert done.returncode == 0 and "the simulator is not installed" in done.stderr, done.stderr
    assert json.loads(done.stdout)["replayed"] is False
    schema = rr.dataframe.load_recording(tmp_path / "a.rrd").schema()
    assert "/action/x/action" in {column.entity_path for column in schema.component_columns()}
    for module, option, file, extra in (("rerun", "--rerun", "b.rrd", "viz"), ("av", "--video", "b.mp4", "sim")):
        blocked = f"import sys; sys.modules[{module!r}] = None; "
        done = limited_python(f"{blocked}{call}{option!r}, {file!r}]))", tmp_path)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and f"pip install 'sacflow-robot[{extra}]'" in line and f"error: {option}" in line
        assert not (tmp_path / file).exists()


@pytest.mark.parametrize("option", ["--rerun", "--video"])
def test_a_disk_that_fills_is_one_line_and_half_a_file_is_none(tmp_path: Path, log: Path, option: str) -> None:
    file = "a.rrd" if option == "--rerun" else "a.mp4"
    code = (
        "import resource, signal, sys\nfrom sacflow_robot.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        f"sys.exit(main(['replay', {str(log)!r}, {option!r}, {file!r}]))"
    )
    done = limited_python(code, tmp_path)
    if option == "--video":
        drawn(done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("sacflow-robot: error: ")]
    assert done.returncode == 1 and len(lines) == 1 and "cannot write a" in lines[0], done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_bad_use(capsys: Capture, tmp_path: Path, log: Path) -> None:
    absent = tmp_path / "absent"
    assert "there is no episode 7" in fails(capsys, 2, log, "--episode", 7)
    assert "no episode log" in fails(capsys, 1, absent)
    for option, suffix in (("--video", ".mp4"), ("--rerun", ".rrd")):
        assert f"ends in {suffix}" in fails(capsys, 2, log, option, tmp_path / "a.gif")
        assert "folder that exists" in fails(capsys, 2, log, option, absent / f"a{suffix}")
    assert "unknown robot driver" in fails(capsys, 2, log, "--robot", "foo:bar", "--rerun", tmp_path / "a.rrd")
    assert "profile" in fails(capsys, 1, log, "--profile", absent)
    assert "invalid choice" in fails(capsys, 2, log, "--timing", "fast")
    assert not list(tmp_path.iterdir())
