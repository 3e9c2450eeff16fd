"""robomimic files of robots and tasks that are not known here: the specification comes from env_args and arrays."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from sacflow_robot.data.formats.demonstrations import DemoOptions
from sacflow_robot.data.formats.sources import demo_spec, read_demos, recorded_robot, says_rate, write_demos
from sacflow_robot.errors import DataError, UsageError

OUTPUT = [0.05] * 3 + [0.5] * 3
BASIC = {
    "type": "OSC_POSE",
    "input_max": 1,
    "input_min": -1,
    "control_delta": True,
    "output_max": OUTPUT,
    "output_min": [-x for x in OUTPUT],
}
COMPOSITE = {
    "type": "BASIC",
    "body_parts": {"right": {"type": "JOINT_VELOCITY", "input_type": "delta", "input_max": 1}},
}


def kwargs(**changes: Any) -> dict[str, Any]:
    known = {"robots": ["UR5e"], "control_freq": 25, "controller_configs": BASIC, **changes}
    return {key: value for key, value in known.items() if value is not None}


def demonstrations(path: Path, env_kwargs: Any, actions: Any = None, **obs: Any) -> Path:
    """Two demonstrations of 4 steps."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "ToolHang", "type": 1, "env_kwargs": env_kwargs})
        for i in range(2):
            demo = data.create_group(f"demo_{i}")
            demo["actions"] = rng.uniform(-1, 1, (4, 7)) if actions is None else actions
            demo["rewards"] = np.array([0, 0, 0, i], np.float64)
            demo["dones"] = np.array([0, 0, 0, 1])
            demo["obs/robot0_eef_pos"] = rng.uniform(0, 1, (4, 3))
            demo["obs/robot0_eef_quat"] = np.tile([0.0, 0, 0, 1], (4, 1))
            demo["obs/object"] = rng.uniform(0, 1, (4, 44))
            demo["obs/agentview_image"] = np.zeros((4, 8, 8, 3), np.uint8)
            for key, rows in obs.items():
                demo[f"obs/{key}"] = rows
    return path


def test_a_task_that_is_not_known_here(tmp_path: Path) -> None:
    path = demonstrations(tmp_path / "a.hdf5", kwargs(), gripper=np.arange(4.0))
    assert recorded_robot(path) == (None, "ToolHang") and says_rate(path)
    robot = demo_spec(path)
    assert (robot.robot, robot.task, robot.controller, robot.control_rate_hz) == (
        "UR5e",
        "ToolHang",
        "OSC_POSE delta",
        25,
    )
    assert set(robot.action_low) == {-1} and set(robot.action_high) == {1} and set(robot.action_units) == {"unknown"}
    units = {a.key: (a.shape, a.unit) for a in robot.observations}
    assert units == {
        "gripper": ((1,), "unknown"),
        "object": ((44,), "unknown"),
        "robot0_eef_pos": ((3,), "m"),
        "robot0_eef_quat": ((4,), "unit quaternion xyzw"),
    }
    demos = read_demos(path, DemoOptions(robot, "ToolHang"))
    assert [e.success for e in demos.episodes] == [False, True]
    assert "obs/agentview_image" in str(demos.losses)
    with h5py.File(path) as file:
        for i, episode in enumerate(demos.episodes):
            assert np.array_equal(episode.action, file[f"data/demo_{i}/actions"][()].astype(np.float32))
            assert np.array_equal(episode.observations["gripper"][:4, 0], np.arange(4))
    write_demos(tmp_path / "b.lerobot", demos)
    again = read_demos(tmp_path / "b.lerobot", DemoOptions(demo_spec(tmp_path / "b.lerobot"), ""))
    assert again.robot == robot and np.array_equal(again.episodes[1].action, demos.episodes[1].action)


def test_controllers(tmp_path: Path) -> None:
    """A composite one of robosuite 1.5; absolute actions, which go beyond the range of a delta; none at all."""
    robot = demo_spec(demonstrations(tmp_path / "a.hdf5", kwargs(controller_configs=COMPOSITE)))
    assert robot.controller == "JOINT_VELOCITY delta" and max(robot.action_high) <= 1.1
    absolute = {**BASIC, "control_delta": False}
    actions = np.linspace(-3, 3, 28).reshape(4, 7)
    robot = demo_spec(demonstrations(tmp_path / "b.hdf5", kwargs(controller_configs=absolute), actions))
    assert robot.controller == "OSC_POSE absolute" and robot.action_low[0] < -3 < 1 < robot.action_high[-1]
    robot = demo_spec(demonstrations(tmp_path / "c.hdf5", kwargs(controller_configs=None, robots=None), actions))
    assert (robot.robot, robot.controller) == ("unknown", "unknown")


def test_without_a_rate(tmp_path: Path) -> None:
    """As files of robomimic's own real robots are."""
    path = demonstrations(tmp_path / "a.hdf5", kwargs(control_freq=None))
    assert not says_rate(path)
    with pytest.raises(UsageError, match="does not say at which rate it was recorded; give --rate HZ"):
        demo_spec(path)
    assert demo_spec(path, 30).control_rate_hz == 30


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    path = demonstrations(tmp_path / "a.hdf5", kwargs())
    with h5py.File(path, "a") as file:
        del file["data/demo_1/actions"]
    with pytest.raises(DataError, match=r"a\.hdf5 cannot be read as demonstrations"):
        demo_spec(path)
    with h5py.File(path, "a") as file:
        del file["data/demo_0/obs"], file["data/demo_1"]
    with pytest.raises(DataError, match="no low-dimensional observations"):
        demo_spec(path)
