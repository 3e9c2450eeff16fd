"""robomimic's layout, and robomimic's own reader."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from sacflow_robot.data.formats.demonstrations import DemoSet
from sacflow_robot.data.formats.sources import write_demos
from sacflow_robot.envs.robomimic_metadata import env_args
from sacflow_robot.episode import Episode
from sacflow_robot.spec import RobotSpec


@pytest.fixture
def episodes(make_episode: Callable[..., Episode]) -> list[Episode]:
    return [make_episode(n, seed=n, success=n != 4) for n in (6, 4, 5)]


@pytest.fixture
def file(episodes: list[Episode], robot: RobotSpec, tmp_path: Path) -> Path:
    path = tmp_path / "demos.hdf5"
    models = ["<mujoco/>"] * 3
    write_demos(path, DemoSet(robot, episodes, env_args("lift"), masks={"train": [0, 2]}, model_files=models))
    return path


def test_layout(file: Path, episodes: list[Episode]) -> None:
    with h5py.File(file) as opened:
        data = opened["data"]
        assert set(opened) == {"data", "mask"} and set(data) == {"demo_0", "demo_1", "demo_2"}
        assert data.attrs["total"] == 15
        args = json.loads(data.attrs["env_args"])
        assert args == json.loads(json.dumps(env_args("lift")))
        assert opened["mask/train"][()].tolist() == [b"demo_0", b"demo_2"]
        for i, episode in enumerate(episodes):
            demo = data[f"demo_{i}"]
            assert demo.attrs["num_samples"] == len(episode) and demo.attrs["model_file"] == "<mujoco/>"
            assert episode.states is not None
            assert np.array_equal(demo["states"], episode.states[:-1]) and demo["states"].dtype == np.float64
            assert np.array_equal(demo["actions"], episode.action)
            assert np.array_equal(demo["rewards"], episode.rewards)
            assert np.array_equal(demo["dones"], episode.terminated) and demo["dones"].dtype == np.int64
            for key, rows in episode.observations.items():
                assert np.array_equal(demo["obs"][key], rows[:-1]) and np.array_equal(demo["next_obs"][key], rows[1:])


@pytest.mark.parametrize("cache", ["all", None])
def test_robomimics_own_dataset_reads_it(
    file: Path, episodes: list[Episode], robot: RobotSpec, cache: str | None
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("robomimic", reason="robomimic is not installed; see requirements-robomimic.txt")
        from robomimic.utils import obs_utils
        from robomimic.utils.dataset import SequenceDataset

    keys = [a.key for a in robot.observations]
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": keys, "rgb": [], "depth": [], "scan": []}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        dataset = SequenceDataset(
            hdf5_path=str(file),
            obs_keys=keys,
            dataset_keys=("actions", "rewards", "dones", "states"),
            frame_stack=1,
            seq_length=3,
            pad_seq_length=True,
            hdf5_cache_mode=cache,
            load_next_obs=True,
            filter_by_attribute="train",
        )
        try:
            assert dataset.n_demos == 2 and len(dataset) == 11
            for index in range(len(dataset)):
                episode, t = (episodes[0], index) if index < 6 else (episodes[2], index - 6)
                sequence = dataset[index]
                window = np.minimum(np.arange(t, t + 3), len(episode) - 1)
                assert np.array_equal(sequence["actions"], episode.action[window])
                assert np.array_equal(sequence["dones"], episode.terminated[window])
                assert episode.states is not None
                states = np.float32(episode.states[window])  # robomimic's cache is float32
                assert np.array_equal(np.float32(sequence["states"]), states)
                for key in keys:
                    assert np.array_equal(sequence["obs"][key], episode.observations[key][window])
                    assert np.array_equal(sequence["next_obs"][key], episode.observations[key][window + 1])
        finally:
            dataset.close_and_delete_hdf5_handle()
