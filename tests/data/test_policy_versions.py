"""Success by policy version."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sacflow_robot.cli import main
from sacflow_robot.data.log.episode_writer import write_log
from sacflow_robot.data.report import stretches
from sacflow_robot.episode import Episode
from sacflow_robot.spec import RobotSpec


@pytest.fixture
def logged(make_episode: Callable[..., Episode]) -> list[Episode]:
    episode = make_episode(4)
    told = [("a", True), ("a", False), ("b", True), ("a", True)]
    return [replace(episode, info={**episode.info, "policy_version": v, "success": s}) for v, s in told]


def test_a_version_that_comes_back_is_a_stretch_of_its_own(logged: list[Episode]) -> None:
    found = [(part.version, part.first, part.solved) for part in stretches(logged)]
    assert found == [("a", 0, (True, False)), ("b", 2, (True,)), ("a", 3, (True,))]
    (unknown,) = stretches([replace(logged[0], info={"success": True})])
    assert unknown.version == "unknown"


def test_log_info_draws_them(
    logged: list[Episode], robot: RobotSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path / "log.zarr", robot, logged * 8)
    picture = tmp_path / "success.png"
    assert main(["log", "info", str(tmp_path / "log.zarr"), "--plot", str(picture), "--json"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    by_policy = json.loads(capsys.readouterr().out.splitlines()[-1])["by_policy"]
    assert [(row["policy_version"], row["successes"], row["episodes"]) for row in by_policy] == [
        ("a", 16, 24),
        ("b", 8, 8),
    ]
    assert main(["log", "info", str(tmp_path / "log.zarr"), "--plot", str(tmp_path / "no" / "x.png")]) == 2
    assert "give a file in a folder that exists" in capsys.readouterr().err
