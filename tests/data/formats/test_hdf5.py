import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from sacflow_robot.data.formats.demonstrations import DemoOptions
from sacflow_robot.data.formats.sources import load_demos, read_demos
from sacflow_robot.data.log.episode_writer import write_log
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.episode import Episode, Source
from sacflow_robot.errors import DataError, SpecMismatchError
from sacflow_robot.spec import RobotSpec


def load_episodes(path: Path, options: DemoOptions) -> list[Episode]:
    return load_demos(path, options).episodes


@pytest.fixture
def options(robot: RobotSpec) -> DemoOptions:
    return DemoOptions(robot, "Lift")


def write_robomimic(path: Path, robot: RobotSpec, lengths: list[int], env_name: str = "Lift", **changes: Any) -> Path:
    """A file laid out as robomimic's low-dim ones; ``changes`` replaces datasets of the first demonstration."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": env_name, "type": 1, "env_kwargs": {}})
        data.attrs["total"] = sum(lengths)
        for i, steps in enumerate(lengths):
            demo = data.create_group(f"demo_{i}")
            arrays: dict[str, Any] = {
                "actions": rng.uniform(-1, 1, (steps, 7)),
                "rewards": np.arange(steps) == steps - 1,
                "dones": np.arange(steps) == steps - 1,
            }
            for spec in robot.observations:
                whole = rng.standard_normal((steps + 1, *spec.shape))
                for start in spec.quaternions:
                    whole[:, start : start + 4] /= np.linalg.norm(whole[:, start : start + 4], axis=1, keepdims=True)
                arrays[f"obs/{spec.key}"], arrays[f"next_obs/{spec.key}"] = whole[:-1], whole[1:]
            if i == 0:
                arrays |= {k.replace("__", "/"): v for k, v in changes.items()}
            for name, array in arrays.items():
                if array is not None:
                    demo[name] = array
    return path


def test_robomimic_low_dim(robot: RobotSpec, options: DemoOptions, tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "low_dim.hdf5", robot, [4, 12])
    episodes = load_episodes(path, options)
    assert [len(e) for e in episodes] == [4, 12]
    assert all(e.success and e.source[0] == Source.HUMAN for e in episodes)
    with h5py.File(path) as file:
        for i, episode in enumerate(episodes):
            demo = file[f"data/demo_{i}"]
            assert np.array_equal(episode.action, demo["actions"][()].astype(np.float32))
            for key, rows in episode.observations.items():
                assert np.array_equal(rows[:-1], demo["obs"][key][()].astype(np.float32))
                assert np.array_equal(rows[-1], demo["next_obs"][key][-1].astype(np.float32))


def test_an_episode_ends_at_its_first_success(robot: RobotSpec, options: DemoOptions, tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "a.hdf5", robot, [6], rewards=np.array([0, 0, 1, 1, 1, 1]))
    (episode,) = load_episodes(path, options)
    assert len(episode) == 3 and episode.terminated.tolist() == [False, False, True]


def test_reading_for_another_format_keeps_what_came_after_success(
    robot: RobotSpec, options: DemoOptions, tmp_path: Path
) -> None:
    rewards = np.array([0, 0, 1, 1, 0, 1])
    path = write_robomimic(tmp_path / "a.hdf5", robot, [6], rewards=rewards)
    demos = read_demos(path, options)
    (episode,) = demos.episodes
    assert episode.rewards.tolist() == rewards.tolist() and episode.success
    assert episode.info["first_success"] == 2
    assert demos.env_args == {"env_name": "Lift", "type": 1, "env_kwargs": {}}


def test_a_readers_losses_are_named(robot: RobotSpec, options: DemoOptions, tmp_path: Path) -> None:
    extra = {
        "obs__robot0_joint_pos": np.zeros((4, 7)),
        "actions_abs": np.zeros((4, 7)),
        "dones": np.array([0, 1, 1, 1]),
    }
    states = np.random.default_rng(0).standard_normal((4, 32))
    states[:, 0] = np.arange(4) / 20  # the simulator's time
    path = write_robomimic(tmp_path / "a.hdf5", robot, [4], states=states, actions=np.full((4, 7), 0.1), **extra)
    demos = read_demos(path, options)
    assert set(demos.losses.left_out) == {"dones before the last step", "actions_abs", "obs/robot0_joint_pos"}
    assert set(demos.losses.rounded) == {"actions", *(f"obs/{a.key}" for a in robot.observations)}
    assert "the state after the last action" in str(demos.losses) and "\n" not in str(demos.losses)
    assert demos.episodes[0].states is not None
    assert np.array_equal(demos.episodes[0].states, states[[0, 1, 2, 3, 3]])


@pytest.mark.parametrize("sign", [1, -1])
def test_the_cube_relative_to_the_gripper_as_robosuite_before_and_since_1_5(
    robot: RobotSpec, options: DemoOptions, tmp_path: Path, sign: int
) -> None:
    rng = np.random.default_rng(0)
    eef, cube = rng.uniform(-0.3, 0.3, (2, 5, 3)).astype(np.float32)
    upright = np.tile([0, 0, 0, 1], (5, 1))
    rows = np.concatenate([cube, upright, sign * (cube - eef) + 1e-3], axis=1).astype(np.float32)
    arrays = {"robot0_eef_pos": eef, "object": rows}
    changes = {
        f"{group}__{key}": a[i : i + 4] for key, a in arrays.items() for i, group in enumerate(("obs", "next_obs"))
    }
    demos = read_demos(write_robomimic(tmp_path / "a.hdf5", robot, [4], **changes), options)
    found = demos.episodes[0].observations["object"]
    assert np.abs(found[:, 7:] - (cube - eef)).max() < 2e-3 and np.array_equal(found[:, :7], rows[:, :7])
    assert ("turned around" in str(demos.losses)) == (sign < 0)


def test_masks_and_other_attributes_are_read(robot: RobotSpec, options: DemoOptions, tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "a.hdf5", robot, [2, 2, 2])
    with h5py.File(path, "a") as file:
        file["mask/train"] = np.array([b"demo_2", b"demo_0"])
        file["data"].attrs["lang"] = "lift the cube"
        file.move("data/demo_1", "data/demo_11")  # now the last one
    demos = read_demos(path, options)
    assert demos.masks == {"train": [1, 0]} and demos.attributes == {"lang": "lift the cube"}


def test_actions_are_clipped_to_the_controllers_range(robot: RobotSpec, options: DemoOptions, tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "a.hdf5", robot, [2], actions=np.full((2, 7), 3.75))
    episode = load_episodes(path, options)[0]
    assert episode.action.max() == 1 and episode.policy_action.max() == 3.75


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": np.zeros((4, 6))}, r"actions of shape \(4, 6\); task 'lift' takes \(T, 7\)"),
        ({"actions": np.full((4, 7), np.nan)}, "NaN"),
        ({"actions": None}, "no actions"),
        ({"obs__object": None}, "no observation 'object'"),
        ({"obs__object": np.zeros((4, 14)), "next_obs__object": np.zeros((4, 14))}, r"'object' has shape \(14,\)"),
        ({"obs__object": np.zeros((3, 10))}, "obs/object has 3 rows for 4 actions"),
        (
            {"obs__object": np.full((4, 10), np.nan)},
            "a.hdf5, demo_0, step 0: NaN or infinity among the observation 'object'",
        ),
        ({"states": np.zeros((3, 32))}, r"states has 3 rows for 4 actions"),
        ({"rewards": np.zeros(3)}, r"rewards has 3 rows for 4 actions"),
        ({"actions": np.array([b"x"] * 4)}, "cannot be read as demonstrations"),
    ],
)
def test_demonstrations_that_do_not_fit(
    robot: RobotSpec, options: DemoOptions, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_robomimic(tmp_path / "a.hdf5", robot, [4], **changes)
    with pytest.raises(DataError, match=message):
        load_episodes(path, options)


def test_unreadable_files(robot: RobotSpec, options: DemoOptions, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        load_episodes(tmp_path / "absent.hdf5", options)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="neither an episode log"):
        load_episodes(tmp_path / "a.txt", options)
    whole = write_robomimic(tmp_path / "whole.hdf5", robot, [40]).read_bytes()
    for part in (0, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "part.hdf5").write_bytes(whole[:part])
        with pytest.raises(DataError, match="is it complete"):
            load_episodes(tmp_path / "part.hdf5", options)
    path = write_robomimic(tmp_path / "can.hdf5", robot, [4], env_name="PickPlaceCan")
    with pytest.raises(DataError, match="'PickPlaceCan', not of 'Lift'"):
        load_episodes(path, options)
    with h5py.File(tmp_path / "dataset.hdf5", "w") as file:
        file["data"] = np.zeros(3)
    with pytest.raises(DataError, match="no group 'data' with demonstrations"):
        load_episodes(tmp_path / "dataset.hdf5", options)
    with h5py.File(tmp_path / "empty.hdf5", "w") as file:
        file.create_group("data")
    with pytest.raises(DataError, match="no group 'data' with demonstrations"):
        load_episodes(tmp_path / "empty.hdf5", options)


def test_a_log_of_another_arm_is_refused(
    make_episode: Callable[..., Episode], robot: RobotSpec, options: DemoOptions, tmp_path: Path
) -> None:
    write_log(tmp_path / "log.zarr", replace(robot, robot="UR5e"), [make_episode(3)])
    with pytest.raises(SpecMismatchError, match="says robot UR5e, the task expects Panda"):
        load_episodes(tmp_path / "log.zarr", options)


def test_human_demonstrations(human_demos: Path, robot: RobotSpec, env: RobosuiteEnv) -> None:
    def read(trim: bool) -> list[Episode]:
        return load_episodes(human_demos, DemoOptions(robot, "Lift", env.observe_state, trim_idle=trim))

    whole, trimmed = read(False), read(True)
    assert [len(e) for e in whole] == [471, 499, 381]
    assert all(e.success for e in whole + trimmed)
    for long, short in zip(whole, trimmed, strict=True):
        assert len(short) < len(long) / 2
        moving = np.abs(long.action[:, :6]).max(1) > 0
        assert (np.abs(short.action[:, :6]).max(1) > 0).sum() == moving.sum(), "every commanded motion is kept"
        assert np.abs(short.action).max() <= 1
        assert short.states is not None and long.states is not None
        assert np.array_equal(short.states[-1], long.states[-1])
        # Observations are those of the states, key by key.
        observation, _ = env.observe_state(short.states[7])
        for key, value in observation.items():
            assert np.array_equal(short.observations[key][7], value)
    with pytest.raises(DataError, match="can be regenerated where the simulator is installed"):
        load_episodes(human_demos, DemoOptions(robot, "Lift"))
