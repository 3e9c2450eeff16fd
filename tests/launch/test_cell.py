"""What a launch file says, and which program it starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from sacflow_robot.launch.cell import ProcessPlan, read_cell

COMMANDS = ["log info", "doctor"]


def first(tmp_path: Path, run: str, **other: str) -> ProcessPlan:
    file = tmp_path / "cell.yaml"
    lines = "".join(f"  {key}: {value}\n" for key, value in other.items())
    file.write_text(f"a:\n  run: {run}\n  ready: end\n{lines}b: doctor\n")
    return read_cell(file, COMMANDS)[0]


def test_unless_takes_a_path_with_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "a run's folder"
    made.mkdir()
    monkeypatch.setenv("RUN", str(made))
    for written in ("${RUN}", "${RUN:-runs/x}", str(made), f"${{NOT_SET:-{made}}}"):
        plan = first(tmp_path, "log info x", unless=written)
        assert plan.unless == str(made) and Path(plan.unless).exists()


@pytest.mark.parametrize("value", ["a b", "it's", 'a "b" c', "a\\b", "$(x) ; y", "*", "0"])
def test_what_a_variable_holds_stays_in_its_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("RUN", value)
    for written in ("${RUN}/x", '"${RUN}/x"', "'${RUN}/x'", "${RUN:-no}/x"):
        assert first(tmp_path, f"log info {written}").words == ("log", "info", f"{value}/x")


def test_an_empty_variable_is_no_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXTRA", "")
    assert first(tmp_path, "log info x ${EXTRA} ${MORE:-}").words == ("log", "info", "x")
    assert first(tmp_path, "log info ${NOT_SET:-a b}").words == ("log", "info", "a b")


def test_what_is_started_is_this_package_whatever_the_working_folder_holds(tmp_path: Path) -> None:
    other = tmp_path / "sacflow_robot"
    other.mkdir()
    for name in ("__init__.py", "__main__.py"):
        (other / name).write_text("raise SystemExit('another package of that name')\n")
    (tmp_path / "cell.yaml").write_text("keys: keys new server\n")
    command = [sys.executable, "-P", "-m", "sacflow_robot", "launch", "cell.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "keys" / "server.key_secret").exists()
