"""Datasets from elsewhere for a task: where rate, robot, actions or rewards are not the task's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sacflow_robot.data.formats.agreement import AgreementOptions
from sacflow_robot.data.formats.demonstrations import DemoOptions
from sacflow_robot.data.formats.sources import read_demos
from sacflow_robot.errors import DataError, SpecMismatchError
from sacflow_robot.spec import RobotSpec
from tests.data.formats.lerobot_data import VERSIONS, Recorded


def observed(robot: RobotSpec) -> dict[str, Any]:
    """Observations of 8 frames: zeros, with orientations that are the identity."""
    columns: dict[str, Any] = {f"observation.{a.key}": np.zeros((8, *a.shape), np.float32) for a in robot.observations}
    for a in robot.observations:
        for start in a.quaternions:
            columns[f"observation.{a.key}"][:, start + 3] = 1
    return columns


@pytest.mark.parametrize("fps", [10, 30, 40])
@pytest.mark.parametrize("version", VERSIONS)
def test_another_rate_than_the_tasks(version: str, fps: int, robot: RobotSpec, tmp_path: Path) -> None:
    columns = observed(robot)
    recorded = Recorded(
        version, fps=fps, robot_type="panda", columns={**columns, "action": np.zeros((8, 7), np.float32)}
    )
    path = recorded.write(tmp_path / "a")
    with pytest.raises(SpecMismatchError, match=rf"{fps} Hz, the task expects 20 Hz .*--resample"):
        read_demos(path, DemoOptions(robot, "Lift"))
    demos = read_demos(path, DemoOptions(robot, "Lift", agreement=AgreementOptions(resample=True)))
    assert [len(e) for e in demos.episodes] == [-(-n * 20 // fps) for n in (5, 3)]
    assert demos.episodes[0].time_ns[1] == 50_000_000 and f"resampled from {fps} to 20 Hz" in str(demos.losses)


def test_another_robot_than_the_tasks(robot: RobotSpec, tmp_path: Path) -> None:
    columns = observed(robot)
    path = Recorded(fps=20, columns={**columns, "action": np.zeros((8, 7), np.float32)}).write(tmp_path / "a")
    wrong = Recorded().write(tmp_path / "b")  # other features too, of which the robot is the reason
    with pytest.raises(SpecMismatchError, match=r"robot so101_follower, the task expects Panda .*30 Hz, the task"):
        read_demos(wrong, DemoOptions(robot, "Lift"))
    with pytest.raises(SpecMismatchError, match=r"robot so101_follower, the task expects Panda .*--as-robot Panda"):
        read_demos(path, DemoOptions(robot, "Lift"))
    options = DemoOptions(robot, "Lift", agreement=AgreementOptions(as_robot="Panda"))
    assert len(read_demos(path, options).episodes) == 2


def test_absolute_poses_are_no_deltas(robot: RobotSpec, tmp_path: Path) -> None:
    """Actions that are the poses to go to, under the names and in the shape of deltas."""
    rng = np.random.default_rng(0)
    columns = observed(robot)
    columns["observation.robot0_eef_pos"] = (0.5 + 0.01 * rng.standard_normal((8, 3))).astype(np.float32)
    columns["observation.robot0_eef_quat"] = np.tile(np.float32([1, 0, 0, 0]), (8, 1))
    turn = np.tile(np.float32([np.pi, 0, 0, 1]), (8, 1))
    columns["action"] = np.concatenate([columns["observation.robot0_eef_pos"] + 0.02, turn], axis=1)
    path = Recorded(fps=20, robot_type="panda", columns=columns).write(tmp_path / "a")
    with pytest.raises(SpecMismatchError, match=r"absolute poses, the task expects OSC_POSE delta .*--controller-map"):
        read_demos(path, DemoOptions(robot, "Lift"))
    demos = read_demos(path, DemoOptions(robot, "Lift", agreement=AgreementOptions(controller_map=True)))
    assert np.abs(demos.episodes[0].action[:, :3] - 0.02 / 0.05).max() < 1e-5


def test_rewards_that_do_not_say_success(robot: RobotSpec, tmp_path: Path) -> None:
    """Shaped rewards are no successes; the user says what is."""
    columns = observed(robot)
    columns |= {"action": np.zeros((8, 7), np.float32), "next.reward": np.linspace(0.1, 0.8, 8, dtype=np.float32)}
    path = Recorded(fps=20, robot_type="panda", columns=columns).write(tmp_path / "a")
    with pytest.raises(DataError, match="dense rewards, which do not tell when the task was solved; give --reward"):
        read_demos(path, DemoOptions(robot, "Lift"))
    options = AgreementOptions(reward="dense", success_above=0.65)
    demos = read_demos(path, DemoOptions(robot, "Lift", agreement=options))
    assert [e.success for e in demos.episodes] == [False, True]


def test_actions_beyond_the_robots_range_are_named(robot: RobotSpec, tmp_path: Path) -> None:
    columns = observed(robot)
    columns["action"] = np.float32(np.where(np.arange(8) % 2, 3, 0.5))[:, None].repeat(7, 1)
    path = Recorded(fps=20, robot_type="panda", columns=columns).write(tmp_path / "a")
    demos = read_demos(path, DemoOptions(robot, "Lift"))
    assert "50% of the actions are beyond the robot's range and are clipped" in str(demos.losses)
