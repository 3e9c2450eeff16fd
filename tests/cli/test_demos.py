"""``demos convert``, ``demos info`` and ``train --demos`` as a user calls them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from sacflow_robot.cli import main
from sacflow_robot.data.formats.demonstrations import DemoSet
from sacflow_robot.data.formats.sources import write_demos
from sacflow_robot.data.log.episode_writer import write_log
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.episode import NOMINAL_CLOCK, Episode
from sacflow_robot.errors import SpecMismatchError, UnknownNameError, UsageError
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.training_data import load_training_episodes
from sacflow_robot.spec import RobotSpec

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def log(make_episode: Callable[..., Episode], robot: RobotSpec, tmp_path: Path) -> Path:
    write_log(tmp_path / "log.zarr", robot, [make_episode(3), make_episode(5, success=False), make_episode(3)])
    return tmp_path / "log.zarr"


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_there_and_back(capsys: Capture, log: Path, tmp_path: Path, env: RobosuiteEnv) -> None:
    assert run("demos", "convert", log, tmp_path / "a.hdf5", "--json") == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert (data["episodes"], data["successes"], data["steps"], data["format"]) == (3, 2, 11, "hdf5")
    assert data["left_out"] == data["rounded"] == data["remarks"] == [] and "not the same" not in captured.err
    with h5py.File(tmp_path / "a.hdf5") as file:
        assert json.loads(file["data"].attrs["env_args"])["env_name"] == "Lift"
        assert "cube_g0" in file["data/demo_2"].attrs["model_file"], "the simulator's model is in it"

    assert run("demos", "convert", tmp_path / "a.hdf5", tmp_path / "b.lerobot") == 0
    assert "not the same" in (said := capsys.readouterr().err) and "left out: model_file" in said
    assert run("demos", "convert", tmp_path / "b.lerobot", tmp_path / "c.zarr") == 0
    before, after = EpisodeLog.open(log), EpisodeLog.open(tmp_path / "c.zarr")
    for mine, theirs in zip(before.episodes(), after.episodes(), strict=True):
        assert np.array_equal(mine.action, theirs.action) and mine.info == theirs.info
    for path in (tmp_path / "a.hdf5", tmp_path / "b.lerobot", tmp_path / "c.zarr"):
        found, _ = load_training_episodes(TrainConfig(demos=str(path)))
        assert [len(e) for e in found] == [3, 5, 3]


def test_info_of_every_format(
    capsys: Capture, log: Path, tmp_path: Path, env: RobosuiteEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    figures = {}
    for suffix in ("hdf5", "lerobot"):
        assert run("demos", "convert", log, tmp_path / f"log.{suffix}") == 0
    for suffix in ("zarr", "hdf5", "lerobot"):
        capsys.readouterr()
        assert run("demos", "info", tmp_path / f"log.{suffix}", "--json") == 0
        captured = capsys.readouterr()
        figures[suffix] = json.loads(captured.out)
        assert figures[suffix].pop("format") == suffix
        assert "success 2/3" in captured.err and "0 = 2" in captured.err and "robot0_gripper_qpos" in captured.err
        assert (tmp_path / figures[suffix]["plots"]).stat().st_size > 10_000
    assert figures["zarr"] == figures["hdf5"] == figures["lerobot"]
    (tmp_path / "log-info.png").unlink()
    assert run("demos", "info", log, "--plots", "none") == 0 and not (tmp_path / "log-info.png").exists()
    assert run("demos", "info", log, "--plots", tmp_path / "page.svg") == 0 and (tmp_path / "page.svg").exists()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("convert", "absent.zarr", "out.zarr"), 1, "no file or folder absent.zarr"),
        (("convert", "log.zarr", "log.zarr"), 2, "exists already"),
        (("convert", "log.zarr", "out"), 2, "or give --to"),
        (("convert", "log.zarr", "out", "--to", "csv"), 2, "invalid choice 'csv'"),
        (("convert", "robomimic:lift/xx", "out.zarr"), 2, "valid names: robomimic:can/mh"),
        (("convert", "unnamed.hdf5", "out.zarr"), 2, "does not say which task it is of; give --env"),
        (("convert", "wipe.hdf5", "out.zarr"), 1, "demonstrations of 'Wipe'; tasks known here: "),
        (("convert", "log.zarr", "out.zarr", "--env", "lfit"), 2, "unknown task 'lfit'"),
        (("convert", "log.zarr", "taken/out.zarr"), 2, "taken is not a folder"),
        (("info", "log.zarr", "--plots", "page.gif"), 2, "expected auto, none, or a .png"),
        (("info", "log.zarr", "--plots", "absent/page.png"), 2, "in a folder that exists"),
        (("info", "empty"), 1, "not an episode log"),
    ],
)
def test_bad_use(
    capsys: Capture,
    log: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, attributes in (("unnamed", {}), ("wipe", {"env": "Wipe"})):
        with h5py.File(f"{name}.hdf5", "w") as file:
            file.create_group("data/demo_0")
            file["data"].attrs.update(attributes)
    (tmp_path / "taken").write_text("")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    assert run("demos", *words) == status
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1 and not captured.out
    assert sorted(tmp_path.iterdir()) == before, "nothing is left behind"


def test_what_a_file_says_is_compared_and_converted_on_demand(capsys: Capture, log: Path, tmp_path: Path) -> None:
    """The same options on demos info, demos convert and train."""
    theirs = replace(EpisodeLog.open(log).robot, robot="Sawyer", control_rate_hz=10.0)
    slow = [replace(e, time_ns=2 * e.time_ns) for e in EpisodeLog.open(log).episodes()]
    write_log(tmp_path / "slow.zarr", theirs, slow)
    for command in (("info", "slow.zarr"), ("convert", "slow.zarr", "out.zarr")):
        words = [tmp_path / word if word.endswith("zarr") else word for word in command]
        assert run("demos", *words, "--env", "lift") == 1
        captured = capsys.readouterr()
        assert "--as-robot Panda" in captured.err and "--resample" in captured.err
        assert len(captured.err.splitlines()) == 1 and not captured.out and not (tmp_path / "out.zarr").exists()
    vouched = ("--env", "lift", "--as-robot", "Panda", "--resample")
    assert run("demos", "info", tmp_path / "slow.zarr", *vouched, "--plots", "none") == 0
    assert run("demos", "convert", tmp_path / "slow.zarr", tmp_path / "out.zarr", *vouched) == 0
    assert "resampled from 10 to 20 Hz" in capsys.readouterr().err
    with pytest.raises(SpecMismatchError, match="--resample"):
        load_training_episodes(TrainConfig(demos=str(tmp_path / "slow.zarr")))
    found, _ = load_training_episodes(TrainConfig(demos=str(tmp_path / "slow.zarr"), as_robot="Panda", resample=True))
    assert [len(e) for e in found] == [6, 10, 6]
    assert ", where: resampled from 10 to 20 Hz" in capsys.readouterr().err
    assert run("demos", "info", log, "--reward", "dense") == 2 and "--success-above" in capsys.readouterr().err


def test_training_on_a_subset_of_the_demonstrations(
    capsys: Capture, make_episode: Callable[..., Episode], robot: RobotSpec, log: Path, tmp_path: Path
) -> None:
    demos = DemoSet(robot, [make_episode(n) for n in (3, 4, 6)], masks={"train": [0, 2]})
    write_demos(tmp_path / "masks.hdf5", demos)
    config = TrainConfig(demos=str(tmp_path / "masks.hdf5"), filter_key="train", replay=(str(log),))
    chosen, logged = load_training_episodes(config)
    assert [len(e) for e in chosen] == [3, 6] and len(logged) == 3, "of logs beside them, everything is taken"
    assert run("demos", "convert", tmp_path / "masks.hdf5", tmp_path / "o.zarr", "--filter-key", "test") == 2
    assert "valid names: train" in capsys.readouterr().err and not (tmp_path / "o.zarr").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--demos", "a.zarr", "--demos", "b.zarr"),
        ("train", "--replay", "a.zarr", "--replay=b.zarr"),
        ("demos", "info", "a.hdf5", "--filter-key", "a", "--filter_key", "b"),
        ("serve", "--policy", "a.onnx", "--policy", "b.onnx"),
    ],
)
def test_an_option_that_names_data_is_refused_when_given_twice(capsys: Capture, words: tuple[str, ...]) -> None:
    assert run(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is given twice" in line and "give it once" in line


def test_rates_are_called_measured_only_where_times_were(
    capsys: Capture, make_episode: Callable[..., Episode], robot: RobotSpec, tmp_path: Path
) -> None:
    jitter = np.cumsum(np.r_[0, 51, 52, 50, 53, 51]) * 1_000_000
    for name, episode, said in (
        (
            "real.zarr",
            replace(make_episode(5), time_ns=jitter),
            "19.46 Hz measured (periods 50 to 53 ms), 20 Hz nominal",
        ),
        ("sim.zarr", replace(make_episode(5), info={"clock": NOMINAL_CLOCK}), "not recorded; nominal 20 Hz"),
    ):
        write_log(tmp_path / name, robot, [episode])
        for command in (("log", "info"), ("demos", "info", "--plots", "none")):
            assert run(*command[:2], tmp_path / name, *command[2:]) == 0
            captured = capsys.readouterr()
            assert said in captured.out + captured.err


def test_robomimics_data_sets_by_name(
    capsys: Capture, log: Path, tmp_path: Path, env: RobosuiteEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the cache; how they get there is tested with the hub."""
    monkeypatch.setenv("SACFLOW_ROBOT_CACHE", str(tmp_path / "cache"))
    cached = tmp_path / "cache" / "demos" / "robomimic" / "v1.5" / "lift" / "mh" / "low_dim_v15.hdf5"
    assert run("demos", "convert", log, cached) == 0
    assert [len(e) for e in load_training_episodes(TrainConfig(demos="robomimic:lift/mh"))[0]] == [3, 5, 3]
    assert run("demos", "convert", "robomimic:lift/mh", tmp_path / "b.lerobot") == 0
    with pytest.raises(UnknownNameError):
        load_training_episodes(TrainConfig(demos="robomimic:lift/best"))
    with pytest.raises(UsageError, match="of another task than --env lift"):
        load_training_episodes(TrainConfig(demos="robomimic:can/ph"))
    capsys.readouterr()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert run("demos", "convert", "robomimic:lift/ph", tmp_path / "c.zarr") == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and "needs internet access" in errors[0]
