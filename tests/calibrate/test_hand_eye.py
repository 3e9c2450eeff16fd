"""A camera found from rendered pictures of a board in the gripper."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from sacflow_robot.calibrate.hand_eye import Board, Pictures, measure_handeye
from sacflow_robot.calibrate.profile import load_profile
from sacflow_robot.cli import main
from sacflow_robot.errors import DataError, UsageError

CAMERA = np.array([[900.0, 0, 640], [0, 900, 480], [0, 0, 1]])
POSITION, ROTATION = np.array([1.2, 0.1, 0.6]), cv2.Rodrigues(np.array([1.25, 1.2, -1.2]))[0]
SHIPPED = Path(__file__).parents[2] / "calibration" / "sim_panda.yaml"


def pictures(count: int, turn: float = 0.5) -> tuple[list[np.ndarray], list[tuple[np.ndarray, np.ndarray]]]:  # type: ignore[type-arg]
    """Pictures of a board held by a gripper in front of the camera, and the gripper's poses."""
    rng, board = np.random.default_rng(0), Board()
    flat = board.make().generateImage((1000, 1400), marginSize=0)
    size = board.columns * board.square_m, board.rows * board.square_m
    in_grip = cv2.Rodrigues(np.array([0.1, 0.2, -0.1]))[0], np.array([0.02, -0.01, 0.05])
    corners = np.array([[0, 0, 0], [size[0], 0, 0], [size[0], size[1], 0], [0, size[1], 0]])
    images, grips = [], []
    for _ in range(count):
        in_camera = cv2.Rodrigues(rng.uniform(-turn, turn, 3))[0], np.append(rng.uniform(-0.12, 0.05, 2), 0.45)
        world = ROTATION @ in_camera[0], ROTATION @ in_camera[1] + POSITION
        grip_turn = world[0] @ in_grip[0].T
        grips.append((world[1] - grip_turn @ in_grip[1], grip_turn))
        seen = cv2.projectPoints(corners, cv2.Rodrigues(in_camera[0])[0], in_camera[1], CAMERA, np.zeros(5))[0]
        ends = np.array([[0, 0], [1000, 0], [1000, 1400], [0, 1400]], np.float32)
        warp = cv2.getPerspectiveTransform(ends, seen.reshape(4, 2).astype(np.float32))
        images.append(cv2.warpPerspective(flat, warp, (1280, 960), borderValue=255, flags=cv2.INTER_AREA))
    return images, grips


def test_the_camera_is_found_to_a_millimeter() -> None:
    images, grips = pictures(12)
    found = measure_handeye(Pictures(images, grips, CAMERA, np.zeros(5)), Board())
    assert found.position_m == pytest.approx(POSITION, abs=2e-3)
    assert np.abs(cv2.Rodrigues(found.rotation_rad)[0].T @ ROTATION - np.eye(3)).max() < 5e-3
    assert found.reprojection_px < 1.0 and found.spread_m.max() < 5e-3


def test_poor_pictures_are_refused_with_a_reason() -> None:
    images, grips = pictures(8)
    with pytest.raises(DataError, match="3 of 8 pictures show the board well"):
        shown = [*images[:3], *[np.full_like(images[0], 255)] * 5]
        measure_handeye(Pictures(shown, grips, CAMERA, np.zeros(5)), Board())
    with pytest.raises(DataError, match="px from where the robot's poses put them"):
        measure_handeye(Pictures(images, grips[::-1], CAMERA, np.zeros(5)), Board())
    alike, still = pictures(8, turn=0.05)
    with pytest.raises(DataError, match="turns by"):
        measure_handeye(Pictures(alike, still, CAMERA, np.zeros(5)), Board())
    with pytest.raises(UsageError, match="no such board"):
        Board(dictionary="DICT_OF_NOTHING").make()


def test_the_command_writes_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images, grips = pictures(8)
    entries = []
    for i, (image, (position, turn)) in enumerate(zip(images, grips, strict=True)):
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
        rotation = cv2.Rodrigues(turn)[0].reshape(3).tolist()
        entries.append({"file": f"{i}.png", "grip_position_m": position.tolist(), "grip_rotation_rad": rotation})
    told = {"camera_matrix_px": CAMERA.tolist(), "distortion": [0.0] * 5, "pictures": entries}
    (tmp_path / "poses.yaml").write_text(yaml.safe_dump(told))
    monkeypatch.chdir(tmp_path)
    words = ["calibrate", "handeye", "--images", ".", "--profile", str(SHIPPED), "--out", "arm.yaml", "--json"]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    made = load_profile(tmp_path / "arm.yaml").measured["hand_eye.camera_position_m"]
    assert made.value == pytest.approx(tuple(POSITION), abs=3e-3) and "ChArUco" in made.method
    assert printed["pictures"] == 8 and (tmp_path / "calibrate-handeye.png").exists()
