"""Data sets of robots that are not known here, by command line alone: ``demos info``, ``demos convert``, ``train``."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sacflow_robot.cli import main
from sacflow_robot.export.onnx_policy import OnnxPolicy
from tests.data.formats.lerobot_data import JOINTS, Recorded, edit_frames
from tests.data.formats.test_diffusion_policy import real_arrays, store, umi_arrays

Capture = pytest.CaptureFixture[str]
TINY = (
    "--offline-steps",
    40,
    "--learner.batch-size",
    16,
    "--algo",
    "bc",
    "--compile",
    "off",
    "--flow.width",
    32,
    "--flow.depth",
    2,
    "--json",
)


def run(*words: object) -> int:
    return main([str(word) for word in words])


def robot_data(path: Path, version: str = "v2.1", columns: dict[str, Any] | None = None) -> Path:
    """A SO-101 that always goes to the same place, in degrees."""
    goal = np.tile(np.float32([40, -80, 60, 0, 0, 50]), (24, 1)) + np.random.default_rng(0).normal(0, 1, (24, 6))
    return Recorded(version, lengths=(12, 12), columns={"action": goal.astype(np.float32), **(columns or {})}).write(
        path
    )


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_info(version: str, capsys: Capture, tmp_path: Path) -> None:
    assert run("demos", "info", robot_data(tmp_path / "so101", version), "--plots", tmp_path / "a.png", "--json") == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out[captured.out.index("{") :])
    assert data["format"] == "lerobot" and data["rate"]["nominal_hz"] == 30
    assert data["arm"] == {"robot": "so101_follower", "task": "Pick up the cube", "controller": "unknown"}
    assert {key["key"]: key["unit"] for key in data["keys"]}.items() >= {
        "action": "unknown",
        "observation.state": "unknown",
    }.items()
    said = captured.out + captured.err
    assert (
        "controller unknown" in said
        and "success not recorded" in said
        and "images are left out: observation.images.front" in said
    )
    assert "no success is recorded" in said and (tmp_path / "a.png").stat().st_size > 10_000


def test_a_rate_that_is_not_said(capsys: Capture, tmp_path: Path) -> None:
    """UMI's stores do not say theirs: there is something to see all the same, and nothing is made of it unsaid."""
    path = store(tmp_path / "umi.zarr.zip", umi_arrays())
    assert run("demos", "info", path, "--plots", "none", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out[captured.out.index("{") :])["rate"]["nominal_hz"] is None
    assert "give --rate HZ" in captured.out + captured.err
    for words in (
        ("demos", "convert", path, tmp_path / "a.zarr"),
        ("train", "--demos", path, "--out", tmp_path / "run"),
    ):
        assert run(*words) == 2
        assert "umi.zarr.zip does not say at which rate it was recorded; give --rate HZ" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [path]
    assert run("demos", "convert", path, tmp_path / "a.zarr", "--rate", -1) == 2
    assert "--rate -1; expected a control rate in Hz" in capsys.readouterr().err
    assert run("demos", "convert", path, tmp_path / "a.zarr", "--rate", 59.94) == 0
    assert run("demos", "info", tmp_path / "a.zarr", "--plots", "none") == 0
    assert "59.94 Hz" in "".join(capsys.readouterr())


def test_convert_says_what_was_left_out(capsys: Capture, tmp_path: Path) -> None:
    path = store(tmp_path / "real.zarr", real_arrays())
    assert run("demos", "convert", path, tmp_path / "a.lerobot", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["episodes"], data["steps"], data["left_out"]) == (2, 12, ["stage"])
    info = json.loads((tmp_path / "a.lerobot/meta/info.json").read_text())
    assert info["fps"] == 10 and info["features"]["action"]["shape"] == [6]


def test_bad_data_leaves_nothing_behind(capsys: Capture, tmp_path: Path) -> None:
    path = robot_data(tmp_path / "so101")
    edit_frames(path / "data/chunk-000/episode_000001.parquet", timestamp=lambda t: t[::-1])
    before = sorted(tmp_path.iterdir())
    for words in (
        ("demos", "info", path, "--plots", "none"),
        ("demos", "convert", path, tmp_path / "a.zarr"),
        ("train", "--demos", path, "--out", tmp_path / "run"),
    ):
        assert run(*words) == 1
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if "error:" in line]
        assert len(lines) == 1 and "episode_000001.parquet, episode 1, step 1: its timestamp runs backwards" in lines[0]
        assert sorted(tmp_path.iterdir()) == before


def test_train_in_the_units_of_the_data(capsys: Capture, tmp_path: Path) -> None:
    """Actions are degrees in the data, and degrees come out of the policy file, which takes what is committed in degrees too."""
    path = robot_data(tmp_path / "so101")
    assert run("train", "--demos", path, "--out", tmp_path / "run", *TINY) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert "so101_follower, Pick up the cube" in captured.err and "no success is recorded" in captured.err
    policy = OnnxPolicy(Path(result["policy"]))
    robot = policy.spec.robot
    assert robot.action_names == tuple(JOINTS) and robot.control_rate_hz == 30 and max(robot.action_high) > 60
    noise = np.random.default_rng(0).standard_normal((64, *policy.spec.noise_shape)).astype(np.float32)
    observation = {"observation.state": np.zeros((64, 6), np.float32)}
    actions = policy.infer(observation, noise)
    low, high = robot.action_bounds
    assert (actions >= low).all() and (actions <= high).all()
    assert np.abs(actions.mean((0, 1)) - [40, -80, 60, 0, 0, 50]).max() < 3, "the place that the robot always goes to"
    prefix = np.broadcast_to(np.float32([41, -81, 61, 1, -1, 49]), actions.shape)
    mask = np.zeros(actions.shape[:2], np.float32)
    mask[:, :2] = 1
    assert np.abs(policy.infer(observation, noise, prefix, mask)[:, :2] - prefix[:, :2]).max() < 1e-4
    assert run("export", tmp_path / "run", "--out", tmp_path / "again.onnx", "--weights", "float16") == 0
    assert np.abs(OnnxPolicy(tmp_path / "again.onnx").infer(observation, noise) - actions).max() < 0.5
