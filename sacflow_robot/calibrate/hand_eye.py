"""Pose of a camera, from pictures of a ChArUco board in the gripper (camera beside the robot): OpenCV does the geometry."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import yaml

from sacflow_robot.calibrate.recording import Values
from sacflow_robot.errors import DataError, UsageError, one_line
from sacflow_robot.spec import Array
from sacflow_robot.utils.rotations import matrix_to_vector, vector_to_matrix

Image = npt.NDArray[np.uint8]
_LEAST_PICTURES, _LEAST_CORNERS, _LEAST_TURN_RAD = 6, 6, 0.35
_WORST_PX = 3.0


# A grip, the board in the camera's frame (rotation, position), its corners in the picture (n, 2) and on the board (n, 3).
_Seen = tuple[tuple[Array, Array], Array, Array, Array, Array]


@dataclass(frozen=True)
class Board:
    """A ChArUco board."""

    columns: int = 5  # squares
    rows: int = 7
    square_m: float = 0.03  # side of a square
    marker_m: float = 0.022  # side of a marker
    dictionary: str = "DICT_4X4_50"  # OpenCV's name of the markers' dictionary

    def make(self) -> Any:
        number = getattr(cv2.aruco, self.dictionary, None)
        if number is None or self.columns < 3 or self.rows < 3 or not 0 < self.marker_m < self.square_m:
            raise UsageError(
                f"no such board: {self}; squares are larger than markers, and dictionaries are named DICT_4X4_50"
            )
        dictionary = cv2.aruco.getPredefinedDictionary(number)
        return cv2.aruco.CharucoBoard((self.columns, self.rows), self.square_m, self.marker_m, dictionary)


@dataclass(frozen=True)
class HandEye:
    """A camera's pose in the robot's base frame."""

    position_m: Array  # (3,)
    rotation_rad: Array  # rotation vector (3,) from camera to base frame
    spread_m: Array  # one standard deviation of the position, over leaving out one picture at a time
    spread_rad: Array  # likewise
    reprojection_px: float  # root mean square over all corners, through the robot's poses
    corners: list[tuple[Array, Array]]  # per picture, corners as seen and as they would be seen (n, 2), (n, 2)

    def measured(self) -> Values:
        """Value and one standard deviation of each quantity of a profile, by name."""
        return {
            "hand_eye.camera_position_m": (self.position_m, self.spread_m),
            "hand_eye.camera_rotation_rad": (self.rotation_rad, self.spread_rad),
            "hand_eye.reprojection_error_px": (np.array([self.reprojection_px]), np.zeros(1)),
        }


@dataclass(frozen=True)
class Pictures:
    """Pictures of a board in the gripper."""

    images: Sequence[Image]  # gray pictures
    grips: Sequence[tuple[Array, Array]]  # the gripper's pose at each: position (3,) m and rotation (3, 3) in base
    camera: Array  # the camera's matrix (3, 3), px
    distortion: Array  # its distortion (5,), OpenCV's


def read_pictures(folder: Path) -> Pictures:
    """Read the pictures of a folder and its poses.yaml: ``camera_matrix_px``, ``distortion`` and ``pictures``.

    Each entry of ``pictures`` has ``file``, ``grip_position_m`` (3) and ``grip_rotation_rad`` (rotation vector in base, 3).

    Raises:
        DataError: One of the files cannot be read.
    """
    try:
        told = yaml.safe_load((folder / "poses.yaml").read_text())
        camera, distortion = (np.array(told[n], np.float64) for n in ("camera_matrix_px", "distortion"))
        images: list[Image] = []
        grips: list[tuple[Array, Array]] = []
        for entry in told["pictures"]:
            image = cv2.imread(str(folder / entry["file"]), cv2.IMREAD_GRAYSCALE)
            if image is None:
                raise DataError(f"{folder / entry['file']} is not a picture that OpenCV reads")
            images.append(np.asarray(image, np.uint8))
            turn = vector_to_matrix(np.array(entry["grip_rotation_rad"], np.float64).reshape(3))
            grips.append((np.array(entry["grip_position_m"], np.float64), turn))
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder}/poses.yaml cannot be read: {one_line(error)}; see 'calibrate handeye --help'"
        ) from None
    return Pictures(images, grips, camera, distortion)


def measure_handeye(pictures: Pictures, board: Board) -> HandEye:
    """The pose of a camera that stands beside the robot, from pictures of a board that the gripper holds.

    Raises:
        DataError: Too few pictures show the board, from poses too much alike, or the poses do not agree with the pictures.
    """
    seen = _board_poses(pictures, board)
    turn = max((float(np.linalg.norm(matrix_to_vector(a[0][1].T @ b[0][1]))) for a in seen for b in seen), default=0.0)
    if turn < _LEAST_TURN_RAD:
        raise DataError(
            f"the gripper turns by {turn:.2f} rad at most between the pictures; at least {_LEAST_TURN_RAD} are needed"
        )

    def solve(some: list[_Seen]) -> tuple[Array, Array]:
        # The board in the hand: OpenCV's "gripper" is the base then, so that it is given the grips the other way round.
        turns, places = zip(*((g[1].T, -g[1].T @ g[0]) for g, *_ in some), strict=True)
        rotation, position = cv2.calibrateHandEye(
            turns, places, [s[1] for s in some], [s[2] for s in some], method=cv2.CALIB_HAND_EYE_PARK
        )
        return np.asarray(rotation, np.float64), np.asarray(position, np.float64).reshape(3)

    rotation, position = solve(seen)
    spreads = [solve(seen[:i] + seen[i + 1 :]) for i in range(len(seen))]
    scale = np.sqrt((len(seen) - 1) / len(seen))
    away = np.array([p - position for _, p in spreads])
    turned = np.array([matrix_to_vector(rotation.T @ r) for r, _ in spreads])
    error, corners = _reprojection(seen, rotation, position, pictures)
    if error > _WORST_PX:
        raise DataError(
            f"the corners are {error:.1f} px from where the robot's poses put them, {_WORST_PX:g} at most are fine; "
            "are pictures and poses of the same moments, and the board's measures right?"
        )
    return HandEye(
        *(position, matrix_to_vector(rotation)),
        *(scale * np.sqrt(np.sum(away**2, axis=0)), scale * np.sqrt(np.sum(turned**2, axis=0))),
        *(error, corners),
    )


def _board_poses(pictures: Pictures, board: Board) -> list[_Seen]:
    """Of every picture that shows enough of the board: grip, board in camera (rotation, position), corners and their places."""
    made = board.make()
    detector = cv2.aruco.CharucoDetector(made)
    seen: list[_Seen] = []
    for image, grip in zip(pictures.images, pictures.grips, strict=True):
        corners, ids, _, _ = detector.detectBoard(image)
        if ids is None or len(ids) < _LEAST_CORNERS:
            continue
        places, points = made.matchImagePoints(corners, ids)
        fine, turn, place = cv2.solvePnP(places, points, pictures.camera, pictures.distortion)
        if fine:
            parts = cv2.Rodrigues(turn)[0], place.reshape(3), points.reshape(-1, 2), places.reshape(-1, 3)
            a, b, c, d = (np.asarray(part, np.float64) for part in parts)
            seen.append((grip, a, b, c, d))
    if len(seen) < _LEAST_PICTURES:
        raise DataError(
            f"{len(seen)} of {len(pictures.images)} pictures show the board well; at least {_LEAST_PICTURES} are needed"
        )
    return seen


def _reprojection(
    seen: list[_Seen], rotation: Array, position: Array, pictures: Pictures
) -> tuple[float, list[tuple[Array, Array]]]:
    held = []
    for (at, turn), board_turn, board_at, *_ in seen:
        held.append((turn.T @ (rotation @ board_at + position - at), turn.T @ rotation @ board_turn))
    in_grip = np.mean([p for p, _ in held], axis=0)
    u, _, v = np.linalg.svd(np.sum([r for _, r in held], axis=0))
    turned = u @ v
    corners: list[tuple[Array, Array]] = []
    squares: list[Array] = []
    for (at, turn), _, _, points, places in seen:
        world = (places @ turned.T + in_grip) @ turn.T + at
        in_camera, still = (world - position) @ rotation, np.zeros(3)
        made, _ = cv2.projectPoints(in_camera, still, still, pictures.camera, pictures.distortion)
        made = made.reshape(-1, 2)
        corners.append((points, made.astype(np.float64)))
        squares.append(np.sum((points - made) ** 2, axis=1))
    return float(np.sqrt(np.mean(np.concatenate(squares)))), corners
