"""Verify finds damage of every kind, repair saves the rest."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sacflow_robot.cli import main
from sacflow_robot.data.log.episode_writer import write_log
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.data.log.repair import repair, verify
from sacflow_robot.episode import Episode
from sacflow_robot.errors import UsageError
from sacflow_robot.spec import RobotSpec

MakeEpisode = Callable[..., Episode]


@pytest.fixture
def log(make_episode: MakeEpisode, robot: RobotSpec, tmp_path: Path) -> Path:
    """Three episodes, of which the last one alone reaches into the second chunk of every step column."""
    write_log(tmp_path / "log.zarr", robot, [make_episode(n, seed=n) for n in (2000, 2000, 500)])
    return tmp_path / "log.zarr"


def files(log: Path) -> dict[str, bytes]:
    return {str(f.relative_to(log)): f.read_bytes() for f in log.rglob("*") if f.is_file()}


def test_a_sound_log(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(log) == []
    assert main(["log", "verify", str(log), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"sound": True, "problems": []}


def test_a_lost_chunk_costs_its_episodes_only(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (log / "data" / "action" / "1.0").unlink()
    before = files(log)
    (problem,) = verify(log)
    assert (problem.where, problem.what) == ("episode 2", "data/action lacks its chunk 1.0")
    assert main(["log", "verify", str(log)]) == 1
    assert "log repair" in capsys.readouterr().err
    out = log.with_name("out.zarr")
    assert main(["log", "repair", str(log), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["saved"] == 2
    assert verify(out) == [] and files(log) == before
    assert [dict(e.info)["seed"] for e in EpisodeLog.open(out).episodes()] == [2000, 2000]
    with pytest.raises(UsageError, match="exists already"):
        repair(log, out)


@pytest.mark.parametrize(
    ("damage", "where", "what"),
    [
        (lambda log: (log / "data" / "policy_action" / "1.0").write_bytes(b"junk"), "episode 2", ""),
        (lambda log: shutil.rmtree(log / "data" / "sent_ns"), "data/sent_ns", "is missing"),
        (lambda log: resize(log / "data" / "reward", 4400), "data/reward", "has 4400 rows, expected 4500"),
        (lambda log: resize(log / "data" / "reward", 5000), "data/reward", "has 5000 rows, expected 4500"),
        (lambda log: retype(log / "data" / "action"), "data/action", "holds int32"),
        (lambda log: (log / ".writing").mkdir(), ".writing", "its writer was killed"),
    ],
)
def test_damage_is_named(log: Path, damage: Callable[[Path], object], where: str, what: str) -> None:
    damage(log)
    problems = verify(log)
    assert any(p.where == where and what in p.what for p in problems), problems


def resize(array: Path, rows: int) -> None:
    description = json.loads((array / ".zarray").read_text())
    description["shape"][0] = rows
    (array / ".zarray").write_text(json.dumps(description))


def retype(array: Path) -> None:
    text = (array / ".zarray").read_text()
    (array / ".zarray").write_text(text.replace("<f4", "<i4"))


def test_values_that_make_no_sense_are_named(make_episode: MakeEpisode, robot: RobotSpec, tmp_path: Path) -> None:
    sound = make_episode(5)
    times = np.arange(5) * 50_000_000
    for change, what in (
        ({"action": sound.action * 3}, "beyond the robot's bounds"),
        ({"time_ns": sound.time_ns[::-1].copy()}, "time_ns does not increase"),
        ({"received_ns": times[::-1].copy()}, "received_ns goes back"),
        ({"received_ns": times + 9, "sent_ns": times + 3}, "out of order"),
        ({"source": np.full(5, 77, np.uint8)}, "source holds values"),
        ({"info": {"spec_fingerprint": 3}}, "SHA-256"),
    ):
        shutil.rmtree(tmp_path / "log.zarr", ignore_errors=True)
        write_log(tmp_path / "log.zarr", robot, [sound, replace(sound, **change), replace(sound, **change)])
        problems = verify(tmp_path / "log.zarr")
        assert any(what in p.what for p in problems) and {p.where for p in problems} == {"episodes 1 to 2"}


def test_lost_ends_are_told_from_the_steps(log: Path) -> None:
    (log / "meta" / "episode_ends" / "0").unlink()
    out = log.with_name("out.zarr")
    saved, lost = repair(log, out)
    assert saved == 3 and "meta/episode_ends" in lost[0].where
    assert [len(e) for e in EpisodeLog.open(out).episodes()] == [2000, 2000, 500]
