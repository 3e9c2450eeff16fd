"""Results go to stdout, progress and remarks to stderr; ``--json`` has stdout for itself."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sacflow_robot.cli import main
from sacflow_robot.data.log.episode_writer import write_log
from sacflow_robot.episode import Episode
from sacflow_robot.spec import RobotSpec


@pytest.fixture
def log(tmp_path: Path, robot: RobotSpec, make_episode: Callable[..., Episode]) -> Path:
    path = tmp_path / "log.zarr"
    write_log(path, robot, [make_episode(5, seed=seed) for seed in range(2)])
    return path


# command, a word of its answer; LOG and NEW are replaced
ANSWERS = [
    ("log info LOG", "robot0_eef_quat"),
    ("log info LOG --plot NEW.png", "plot: "),
    ("log verify LOG", "sound"),
    ("log repair LOG --out NEW.zarr", "2 episodes saved"),
    ("log copy LOG NEW.zarr", "2 episodes copied"),
    ("demos info LOG --plots none", "robot0_eef_pos"),
    ("demos convert LOG NEW.zarr", "wrote "),
    ("eval --policy POLICY --episodes 1", "success 0/1"),
]


@pytest.mark.parametrize(("command", "answer"), ANSWERS, ids=[command for command, _ in ANSWERS])
def test_the_answer_is_on_stdout_and_json_has_stdout_for_itself(
    command: str, answer: str, log: Path, policy_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for extra in ([], ["--json"]):
        words = command.replace("LOG", str(log)).replace("POLICY", str(policy_file))
        words = words.replace("NEW", str(tmp_path / f"new{len(extra)}"))
        assert main([*words.split(), *extra]) == 0
        said = capfd.readouterr()
        if extra:
            assert isinstance(json.loads(said.out), dict) and answer in said.err
        else:
            assert answer in said.out and answer not in said.err


def test_what_is_wrong_with_a_log_is_the_answer_to_whether_it_is(log: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (log / "data" / "action" / "0.0").unlink()
    assert main(["log", "verify", str(log)]) == 1
    said = capfd.readouterr()
    assert "what is wrong" in said.out and "log repair" in said.err


def test_the_keys_made_are_named_on_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "new", "server", "--out", str(tmp_path)]) == 0
    assert "secret, stays here" in capfd.readouterr().out


def test_doctor_reports_on_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capfd.readouterr()
    assert "onnxruntime" in said.out and "onnxruntime" not in said.err


def test_off_a_terminal_no_line_of_an_answer_is_folded(log: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["log", "info", str(log)]) == 0
    (line,) = (line for line in capfd.readouterr().out.splitlines() if line.startswith("observations"))
    assert len(line) > 80 and "object (10,)" in line


def test_a_stdout_that_cannot_say_it_all_is_no_failure(log: Path, tmp_path: Path) -> None:
    """A file's name that is no UTF-8, and a terminal of ASCII only."""
    name = os.fsdecode(b"l\xff\xc3\xa9.zarr")
    (tmp_path / name).symlink_to(log)
    for encoding in ("ascii", "utf-8"):
        done = subprocess.run(
            [sys.executable, "-m", "sacflow_robot", "log", "verify", tmp_path / name],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 0 and b"sound" in done.stdout, done.stderr


def test_a_reader_that_leaves_early_is_no_failure_to_tell_of(log: Path) -> None:
    command = f"{sys.executable} -m sacflow_robot log info {log} | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
