"""diffusion_policy's stores and UMI's zip files, written with zarr alone: what is read, and what is refused by name."""

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr

from sacflow_robot.data.formats.agreement import AgreementOptions
from sacflow_robot.data.formats.demonstrations import DemoOptions, DemoSet
from sacflow_robot.data.formats.sources import demo_spec, kind_of, read_demos, says_rate, write_demos
from sacflow_robot.data.log.episode_writer import write_log
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, SpecMismatchError, UsageError
from sacflow_robot.spec import RobotSpec

ENDS = (5, 12)
TOTAL = ENDS[-1]


def real_arrays(rate_hz: float = 10) -> dict[str, Any]:
    """What diffusion_policy's real robot records, in its float64."""
    rng = np.random.default_rng(0)
    return {
        "action": rng.uniform(-1, 1, (TOTAL, 6)),
        "robot_eef_pose": rng.uniform(-1, 1, (TOTAL, 6)),
        "robot_joint": rng.uniform(-3, 3, (TOTAL, 6)),
        "stage": np.zeros(TOTAL, np.int64),
        "timestamp": 1.7e9 + np.arange(TOTAL) / rate_hz,
    }


def umi_arrays(robots: int = 1) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    arrays: dict[str, Any] = {"camera0_rgb": rng.integers(0, 255, (TOTAL, 8, 8, 3), np.uint8)}
    for robot in (f"robot{i}_" for i in range(robots)):
        arrays[f"{robot}eef_pos"] = rng.uniform(0, 1, (TOTAL, 3)).astype(np.float32)
        arrays[f"{robot}eef_rot_axis_angle"] = rng.uniform(-1, 1, (TOTAL, 3)).astype(np.float32)
        arrays[f"{robot}gripper_width"] = rng.uniform(0, 0.08, (TOTAL, 1)).astype(np.float32)
        arrays[f"{robot}demo_start_pose"] = rng.uniform(0, 1, (TOTAL, 6))
        arrays[f"{robot}demo_end_pose"] = rng.uniform(0, 1, (TOTAL, 6))
    return arrays


def store(path: Path, arrays: Mapping[str, Any], ends: Any = ENDS, **group: Any) -> Path:
    """A folder or, by its name, a zip file."""
    target: Any = zarr.storage.ZipStore(path, mode="w") if path.suffix == ".zip" else path
    root = zarr.create_group(target, zarr_format=2, **group)
    data, meta = root.create_group("data"), root.create_group("meta")
    blosc = numcodecs.Blosc("zstd", clevel=5, shuffle=numcodecs.Blosc.BITSHUFFLE)
    for key, rows in arrays.items():
        chunks = (1 if rows.ndim == 4 else 4, *rows.shape[1:])
        data.create_array(key, shape=rows.shape, dtype=rows.dtype, chunks=chunks, compressors=blosc)[:] = rows
    meta.create_array("episode_ends", data=np.asarray(ends))
    if path.suffix == ".zip":
        target.close()
    return path


def read(path: Path, rate: float | None = None) -> DemoSet:
    """Everything, of the robot that the store itself is of."""
    robot = demo_spec(path, rate)
    return read_demos(path, DemoOptions(robot, "", agreement=AgreementOptions(rate=rate)))


def test_a_real_robots_store(tmp_path: Path) -> None:
    arrays = real_arrays()
    path = store(tmp_path / "replay_buffer.zarr", arrays)
    assert kind_of(path) == "diffusion_policy" and says_rate(path)
    demos = read(path)
    robot = demos.robot
    assert (robot.robot, robot.controller, robot.control_rate_hz, robot.action_units[0]) == (
        "unknown",
        "unknown",
        10,
        "unknown",
    )
    assert [(a.key, a.shape, a.unit) for a in robot.observations] == [
        ("robot_eef_pose", (6,), "unknown"),
        ("robot_joint", (6,), "unknown"),
    ]
    assert [len(e) for e in demos.episodes] == [5, 7]
    for episode, rows in zip(demos.episodes, (slice(0, 5), slice(5, 12)), strict=True):
        assert np.array_equal(episode.action, arrays["action"][rows].astype(np.float32))
        found = episode.observations["robot_joint"]
        assert np.array_equal(found[:-1], arrays["robot_joint"][rows].astype(np.float32))
        assert np.array_equal(found[-1], found[-2])
        assert np.array_equal(episode.time_ns, np.arange(len(episode) + 1) * 100_000_000)
    assert "left out: stage; rounded to float32: action" in str(demos.losses)
    assert "no success is recorded" in str(demos.losses)


@pytest.mark.parametrize("robots", [1, 2])
def test_umis_zip_is_read_where_it_is(robots: int, tmp_path: Path) -> None:
    """There are no actions: a step's is the pose and width of the next frame; nothing is unpacked."""
    arrays = umi_arrays(robots)
    path = store(tmp_path / "dataset.zarr.zip", arrays)
    before = sorted(tmp_path.iterdir())
    assert kind_of(path) == "diffusion_policy" and not says_rate(path)
    demos = read(path, rate=59.94)
    assert sorted(tmp_path.iterdir()) == before
    parts = [f"robot{i}_{part}" for i in range(robots) for part in ("eef_pos", "eef_rot_axis_angle", "gripper_width")]
    poses = np.concatenate([arrays[part] for part in parts], axis=1)
    robot = demos.robot
    assert (robot.robot, robot.controller, robot.control_rate_hz) == ("UMI", "EEF_POSE absolute", 59.94)
    assert {a.key: a.unit for a in robot.observations} == dict(zip(parts, ["m", "rad", "m"] * robots, strict=True))
    assert robot.action_names[:3] == ("robot0_eef_pos_0", "robot0_eef_pos_1", "robot0_eef_pos_2")
    assert robot.action_units == (("m",) * 3 + ("rad",) * 3 + ("m",)) * robots
    for episode, rows in zip(demos.episodes, (slice(0, 5), slice(5, 12)), strict=True):
        assert np.array_equal(episode.action, poses[rows][1:])
        assert np.array_equal(episode.observations["robot0_gripper_width"], arrays["robot0_gripper_width"][rows])
    said = str(demos.losses)
    assert "images are left out: camera0_rgb" in said and "robot0_demo_start_pose" in said and "no 'action'" in said


def test_a_zip_of_the_folder_itself(tmp_path: Path) -> None:
    """Zipped by hand, everything in it is in one folder more."""
    store(tmp_path / "a.zarr", real_arrays())
    with zipfile.ZipFile(tmp_path / "b.zarr.zip", "w") as file:
        for part in (tmp_path / "a.zarr").rglob("*"):
            file.write(part, part.relative_to(tmp_path))
    assert [len(e) for e in read(tmp_path / "b.zarr.zip").episodes] == [5, 7]


def unknown_codec(path: Path, key: str = "camera0_rgb") -> None:
    """Say that an array is compressed as UMI's images are, with a codec of a package that is not installed."""
    file = path / "data" / key / ".zarray"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "compressor": {"id": "imagecodecs_jpegxl", "level": 99}})
    )


def test_a_codec_that_is_not_installed(tmp_path: Path) -> None:
    """Images are left out by name, and nothing else suffers; an array that is needed is named with the codec."""
    assert "imagecodecs_jpegxl" not in numcodecs.registry.codec_registry
    path = store(tmp_path / "a.zarr", umi_arrays())
    plain = read(path, rate=60)
    unknown_codec(path)
    demos = read(path, rate=60)
    assert "images are left out: camera0_rgb (imagecodecs_jpegxl)" in str(demos.losses)
    for one, other in zip(plain.episodes, demos.episodes, strict=True):
        assert np.array_equal(one.action, other.action)
    unknown_codec(path, "robot0_eef_pos")
    with pytest.raises(DataError, match=r"data/robot0_eef_pos cannot be read .*imagecodecs_jpegxl"):
        read(path, rate=60)


def test_pusht(tmp_path: Path) -> None:
    """Names that a log's columns have, images in float32, matrices; no timestamps."""
    rng = np.random.default_rng(2)
    arrays = {
        "action": rng.uniform(0, 512, (TOTAL, 2)).astype(np.float32),
        "img": np.zeros((TOTAL, 9, 9, 3), np.float32),
        "keypoint": rng.uniform(0, 512, (TOTAL, 9, 2)).astype(np.float32),
        "n_contacts": np.ones((TOTAL, 1), np.float32),
        "state": rng.uniform(0, 512, (TOTAL, 5)).astype(np.float32),
    }
    path = store(tmp_path / "pusht.zarr", arrays)
    with pytest.raises(UsageError, match="does not say at which rate it was recorded; give --rate HZ"):
        demo_spec(path)
    found = read(path, rate=10)
    shapes = {a.key: a.shape for a in found.robot.observations}
    assert shapes == {"keypoint": (9, 2), "n_contacts": (1,), "observation.state": (5,)}
    first = write_demos(tmp_path / "a.zarr", found)
    for name in ("b.lerobot", "c.zarr", "d.hdf5", "e.zarr"):
        write_demos(tmp_path / name, found)
        found = read(tmp_path / name)
        assert found.robot == first.robot
        for one, other, rows in zip(first.episodes, found.episodes, (slice(0, 5), slice(5, 12)), strict=True):
            assert np.array_equal(other.action, arrays["action"][rows])
            assert np.array_equal(other.observations["observation.state"][:-1], arrays["state"][rows])
            assert np.array_equal(one.observations["keypoint"], other.observations["keypoint"])


def test_an_episode_log_is_no_foreign_store(
    make_episode: Callable[..., Episode], robot: RobotSpec, tmp_path: Path
) -> None:
    """diffusion_policy reads our logs too; they stay logs."""
    write_log(tmp_path / "a.zarr", robot, [make_episode(3)])
    assert kind_of(tmp_path / "a.zarr") == "zarr"
    assert demo_spec(tmp_path / "a.zarr") == robot


def test_times_beside_the_grid_are_kept(tmp_path: Path) -> None:
    arrays = real_arrays()
    arrays["timestamp"][2] += 0.02
    episode = read(store(tmp_path / "a.zarr", arrays)).episodes[0]
    assert abs(int(episode.time_ns[2]) - 220_000_000) < 1000
    assert episode.info["clock"].startswith("timestamps of the store")


def test_another_rate_than_the_tasks(tmp_path: Path) -> None:
    path = store(tmp_path / "a.zarr", real_arrays(rate_hz=15))
    robot = demo_spec(store(tmp_path / "b.zarr", real_arrays(rate_hz=10)))
    with pytest.raises(SpecMismatchError, match=r"15 Hz, the task expects 10 Hz .*--resample"):
        read_demos(path, DemoOptions(robot, ""))


def test_rewards(tmp_path: Path) -> None:
    arrays = {**real_arrays(), "reward": np.isin(np.arange(TOTAL), (4,)).astype(np.float32)}
    demos = read(store(tmp_path / "a.zarr", arrays))
    assert [e.success for e in demos.episodes] == [True, False]


@pytest.mark.parametrize(
    ("changes", "ends", "said"),
    [
        ({}, (5, 3, 12), "episode 1 runs backwards, to 3 after 5"),
        ({}, (5, 5, 12), "episode 1 holds no frames"),
        ({}, (-1, 12), "episode 0 runs backwards, to -1 after 0"),
        ({}, (5, 11), "data/action has 12 rows, meta/episode_ends ends at 11"),
        ({}, (5, 13), "data/action has 12 rows, meta/episode_ends ends at 13"),
        ({"robot_joint": np.zeros((11, 6))}, ENDS, "data/robot_joint has 11 rows, meta/episode_ends ends at 12"),
        ({}, np.zeros(0, np.int64), "holds no episodes"),
        ({}, (5.0, 12.0), "meta/episode_ends is float64 of shape"),
        ({"action": None}, ENDS, "no data/action; it has robot_eef_pose, robot_joint"),
        ({"robot_joint": None, "robot_eef_pose": None}, ENDS, "no low-dimensional observations"),
        ({"action": np.full((12, 2), np.nan)}, ENDS, "an action dimension has no finite value"),
        (
            {"robot_joint": np.where(np.arange(12) == 7, np.inf, 0.0)},
            ENDS,
            "episode 1, step 2: NaN or infinity among the observation 'robot_joint'",
        ),
        ({"timestamp": np.zeros(12)}, ENDS, "data/timestamp does not increase"),
        ({"timestamp": np.r_[0:5, 7, 6, 7:12] / 10}, ENDS, "episode 1, step 1: its timestamp runs backwards"),
        ({"timestamp": np.r_[0:8, 11:15] / 10}, ENDS, "episode 1, frame 3: its timestamp is 0.4 s after"),
    ],
)
def test_stores_that_do_not_agree(changes: dict[str, Any], ends: Any, said: str, tmp_path: Path) -> None:
    arrays = {key: rows for key, rows in {**real_arrays(), **changes}.items() if rows is not None}
    for name in ("a.zarr", "a.zarr.zip"):
        path = store(tmp_path / name, arrays, ends)
        with pytest.raises(DataError) as caught:
            read(path)
        assert said in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_zips(tmp_path: Path) -> None:
    whole = store(tmp_path / "a.zarr.zip", real_arrays()).read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 30):
        (tmp_path / "b.zarr.zip").write_bytes(whole[:cut])
        with pytest.raises(DataError, match="cannot be read as a diffusion_policy store"):
            read(tmp_path / "b.zarr.zip")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as file:
        file.writestr("readme.txt", "nothing")
    with pytest.raises(DataError, match="not a diffusion_policy store: it has no meta/episode_ends"):
        read(tmp_path / "c.zip")


def test_a_damaged_chunk_is_named(tmp_path: Path) -> None:
    path = store(tmp_path / "a.zarr", real_arrays())
    (path / "data/robot_joint/1.0").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"data/robot_joint cannot be read .*is it complete"):
        read(path)


def test_chunks_that_are_not_there_are_named(tmp_path: Path) -> None:
    """Zarr reads zeros there, without a word."""
    path = store(tmp_path / "a.zarr", real_arrays())
    (path / "data/robot_joint/1.0").unlink()
    demos = read(path)
    assert not demos.episodes[0].observations["robot_joint"][4].any()
    assert "1 chunks of robot_joint are not in the store and read as zeros" in str(demos.losses)
