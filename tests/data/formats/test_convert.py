"""Round trips between all formats, bit for bit, and what happens when a conversion cannot be made."""

import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sacflow_robot.data.formats import lerobot_writer
from sacflow_robot.data.formats.demonstrations import DemoOptions, DemoSet, end_at_success
from sacflow_robot.data.formats.sources import load_demos, read_demos, recorded_robot, write_demos
from sacflow_robot.data.log.episode_writer import write_log
from sacflow_robot.episode import STEP_TIMES, Episode
from sacflow_robot.errors import DataError, LogWriteError, SpecMismatchError, UsageError
from sacflow_robot.spec import ArraySpec, RobotSpec


def load_episodes(path: Path, options: DemoOptions) -> list[Episode]:
    return load_demos(path, options).episodes


SUFFIXES = (".zarr", ".hdf5", ".lerobot")
ROBOT = RobotSpec(
    robot="UR5e",
    task="peg",
    controller="joint positions",
    control_rate_hz=12.5,
    observations=(
        ArraySpec("q", (2,), "rad"),
        ArraySpec("object", (1,), "m", "world"),
        ArraySpec("camera_pose", (2, 3), "m"),
    ),
    action_names=("a",),
    action_units=("rad",),
    action_low=(-2.0,),
    action_high=(2.0,),
)
FLOAT32 = {"dtype": np.float32, "elements": st.floats(width=32, allow_nan=False, allow_infinity=False)}
FLOAT64 = {"dtype": np.float64, "elements": st.floats(allow_nan=False, allow_infinity=False)}
PERIODS_NS = st.integers(75_000_000, 85_000_000)  # of about 12.5 Hz; times that contradict it are refused


@st.composite
def episodes(draw: st.DrawFn, *, states: int, timed: bool) -> Episode:
    """Any valid episode of ``ARM``; ``states`` is S, 0 for none; ``timed`` has every step's times and flags."""
    steps = draw(st.integers(1, 5))

    def rows(count: int, *shape: int, **kind: Any) -> Any:
        return draw(hnp.arrays(shape=(count, *shape), **kind))

    end = np.arange(steps) == steps - 1
    terminated = end & draw(st.booleans())
    return Episode(
        observations={a.key: rows(steps + 1, *a.shape, **FLOAT32) for a in ROBOT.observations},
        action=rows(steps, 1, **FLOAT32),
        policy_action=rows(steps, 1, dtype=np.float32, elements=st.floats(width=32)),
        measured=np.full((steps, 1), np.nan, np.float32) if draw(st.booleans()) else rows(steps, 1, **FLOAT32),
        source=rows(steps, dtype=np.uint8),
        rewards=rows(steps, **FLOAT32),
        terminated=terminated,
        truncated=end & draw(st.booleans()),
        time_ns=draw(st.integers(0, 2**61)) + np.cumsum(rows(steps + 1, dtype=np.int64, elements=PERIODS_NS)),
        states=rows(steps + 1, states, **FLOAT64) if states else None,
        **{name: rows(steps, dtype=np.int64, elements=st.integers(0, 2**62)) for name in STEP_TIMES if timed},
        **({"intervention_action": rows(steps, 1, **FLOAT32)} if draw(st.booleans()) else {}),
        **({"flags": rows(steps, dtype=np.uint8, elements=st.integers(0, 15))} if timed else {}),
        info=draw(
            st.dictionaries(st.text(max_size=5), st.booleans() | st.integers() | st.text(max_size=9), max_size=3)
        ),
    )


@st.composite
def demo_sets(draw: st.DrawFn) -> DemoSet:
    found = draw(st.lists(episodes(states=draw(st.integers(0, 3)), timed=draw(st.booleans())), min_size=1, max_size=3))
    env_args = draw(st.none() | st.just({"env_name": "Peg", "env_kwargs": {"control_freq": 12.5}}))
    masks = draw(st.sampled_from([{}, {"train": [0], "valid": []}]))
    return DemoSet(ROBOT, found, env_args, draw(st.sampled_from([{}, {"lang": "put it in", "size": 0.04}])), masks)


def assert_same(found: DemoSet, expected: DemoSet) -> None:
    assert found.robot == expected.robot and found.about() == expected.about() and not str(found.losses)
    assert len(found.episodes) == len(expected.episodes)
    for mine, theirs in zip(found.episodes, expected.episodes, strict=True):
        assert dict(mine.info) == dict(theirs.info)
        for name in (f.name for f in fields(Episode) if f.name not in ("info", "observations")):
            assert_same_bits(getattr(mine, name), getattr(theirs, name), name)
        assert mine.observations.keys() == theirs.observations.keys()
        for key, values in theirs.observations.items():
            assert_same_bits(mine.observations[key], values, key)


def assert_same_bits(found: Any, expected: Any, name: str) -> None:
    if expected is None:
        assert found is None, name
        return
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    if found.dtype.kind == "f":  # one NaN is as good as another; all else must be the same bits, -0.0 included
        assert np.array_equal(np.isnan(found), np.isnan(expected)), name
        found, expected = np.nan_to_num(found, nan=1.0), np.nan_to_num(expected, nan=1.0)
    assert found.tobytes() == expected.tobytes(), name


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(route=st.permutations(SUFFIXES), demos=demo_sets())
def test_every_format_gives_back_every_column_bit_for_bit(route: list[str], demos: DemoSet) -> None:
    options = DemoOptions(ROBOT, "Peg")
    with tempfile.TemporaryDirectory() as folder:
        found = demos
        for i, suffix in enumerate((*route, route[0])):
            path = Path(folder) / f"{i}{suffix}"
            write_demos(path, found)
            assert recorded_robot(path)[0] == ROBOT
            found = read_demos(path, options)
            assert_same(found, demos)
        assert not [path for path in Path(folder).iterdir() if "partial" in path.name]


def test_model_files_live_in_hdf5_alone(make_episode: Callable[..., Episode], robot: RobotSpec, tmp_path: Path) -> None:
    options = DemoOptions(robot, "Lift")
    demos = DemoSet(robot, [make_episode(3), make_episode(2)], model_files=["<mujoco/>", None])
    write_demos(tmp_path / "a.hdf5", demos)
    assert read_demos(tmp_path / "a.hdf5", options).model_files == ["<mujoco/>", None]
    for name in ("a.zarr", "a.lerobot"):
        written = write_demos(tmp_path / name, read_demos(tmp_path / "a.hdf5", options))
        assert str(written.losses) == "left out: model_file"


def test_a_column_that_some_episodes_lack_is_named(
    make_episode: Callable[..., Episode], robot: RobotSpec, tmp_path: Path
) -> None:
    mixed = [make_episode(3), make_episode(3, states=False)]
    options = DemoOptions(robot, "Lift")
    for name, said in (("a.zarr", "states (not every episode has them)"), ("a.lerobot", "sim_state (not every")):
        assert said in str(write_demos(tmp_path / name, DemoSet(robot, mixed)).losses)
        assert all(e.states is None for e in read_demos(tmp_path / name, options).episodes)
    assert not str(write_demos(tmp_path / "a.hdf5", DemoSet(robot, mixed)).losses)
    assert [e.states is None for e in read_demos(tmp_path / "a.hdf5", options).episodes] == [False, True]


def test_columns_that_others_keep_in_a_log_are_named(
    make_episode: Callable[..., Episode], robot: RobotSpec, tmp_path: Path
) -> None:
    write_log(tmp_path / "a.zarr", robot, [make_episode(3)])
    zarr.open_group(tmp_path / "a.zarr", mode="r+").create_array("data/stage", data=np.arange(1, 4))
    assert str(read_demos(tmp_path / "a.zarr", DemoOptions(robot, "Lift")).losses) == "left out: data/stage"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_exists_is_never_written_over(
    make_episode: Callable[..., Episode], robot: RobotSpec, tmp_path: Path, suffix: str
) -> None:
    path, demos = tmp_path / f"a{suffix}", DemoSet(robot, [make_episode(3)])
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        write_demos(path, demos)
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists already"):
        write_demos(path, demos)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_conversion_that_fails_leaves_nothing(
    make_episode: Callable[..., Episode],
    robot: RobotSpec,
    tmp_path: Path,
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each writer fails half way: at the second episode, or its last file."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    targets = {
        ".zarr": ("sacflow_robot.data.log.episode_writer.EpisodeWriter.extend", fail),
        ".hdf5": ("sacflow_robot.data.formats.hdf5._write_episode", fail),
        ".lerobot": ("sacflow_robot.data.formats.lerobot_writer._write_json", fail),
    }
    monkeypatch.setattr(*targets[suffix])
    with pytest.raises(LogWriteError, match=r"No space left.*nothing is left of it") as refusal:
        write_demos(tmp_path / f"a{suffix}", DemoSet(robot, [make_episode(3)]))
    assert str(tmp_path / f"a{suffix}") in str(refusal.value) and "partial" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_names_that_say_no_format(make_episode: Callable[..., Episode], robot: RobotSpec, tmp_path: Path) -> None:
    demos = DemoSet(robot, [make_episode(3)])
    with pytest.raises(UsageError, match=r"end its name in \.zarr, \.hdf5, \.h5, \.lerobot, or give --to"):
        write_demos(tmp_path / "demos", demos)
    write_demos(tmp_path / "demos", demos, "lerobot")
    assert load_episodes(tmp_path / "demos", DemoOptions(robot, "Lift"))[0].action.shape == (3, 7)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_another_arm_is_refused(
    make_episode: Callable[..., Episode], robot: RobotSpec, tmp_path: Path, suffix: str
) -> None:
    write_demos(tmp_path / f"a{suffix}", DemoSet(replace(robot, robot="UR5e"), [make_episode(3)]))
    with pytest.raises(SpecMismatchError, match="UR5e"):
        read_demos(tmp_path / f"a{suffix}", DemoOptions(robot, "Lift"))


def test_learning_ends_an_episode_at_its_first_success(make_episode: Callable[..., Episode]) -> None:
    whole = make_episode(6)
    cut = end_at_success(replace(whole, info={"success": True, "first_success": 2}))
    assert len(cut) == 3 and cut.terminated.tolist() == [False, False, True] and not cut.truncated.any()
    assert cut.info == {"success": True}
    for name in ("action", "policy_action", "rewards", "source"):
        assert np.array_equal(getattr(cut, name), getattr(whole, name)[:3])
    assert np.array_equal(cut.time_ns, whole.time_ns[:4])
    for key, rows in whole.observations.items():
        assert np.array_equal(cut.observations[key], rows[:4])
    assert end_at_success(whole) is whole


def test_raw_robosuite_becomes_every_format(human_demos: Path, env: Any, robot: RobotSpec, tmp_path: Path) -> None:
    raw = DemoOptions(robot, "Lift", env.observe_state, trim_idle=False)
    demos = read_demos(human_demos, raw)
    with h5py.File(human_demos) as file:
        for episode, name in zip(demos.episodes, ("demo_1", "demo_2", "demo_3"), strict=True):
            demo = file["data"][name]
            assert np.array_equal(episode.states, demo["states"][()])  # type: ignore[arg-type]
            assert np.array_equal(episode.policy_action, demo["actions"][:-1].astype(np.float32))
    learned = load_episodes(human_demos, raw)
    assert [len(e) for e in learned] == [471, 499, 381]
    for suffix in SUFFIXES:
        path = tmp_path / f"human{suffix}"
        write_demos(path, demos)
        for found, expected in zip(load_episodes(path, DemoOptions(robot, "Lift")), learned, strict=True):
            assert np.array_equal(found.action, expected.action) and np.array_equal(found.states, expected.states)  # type: ignore[arg-type]
        assert read_demos(path, DemoOptions(robot, "Lift")).attributes["repository_version"] == "1.4.0"


def test_big_sets_take_several_files(make_episode: Callable[..., Episode], robot: RobotSpec, tmp_path: Path) -> None:
    demos = DemoSet(robot, [make_episode(4, seed=i) for i in range(7)])
    lerobot_writer.write(tmp_path / "a.lerobot", demos, chunks_size=2, data_file_mb=0.004)
    files = sorted(str(p.relative_to(tmp_path / "a.lerobot" / "data")) for p in tmp_path.rglob("data/*/*.parquet"))
    assert files[:3] == ["chunk-000/file-000.parquet", "chunk-000/file-001.parquet", "chunk-001/file-000.parquet"]
    assert_same(read_demos(tmp_path / "a.lerobot", DemoOptions(robot, "Lift")), demos)


def test_an_empty_source_is_refused(robot: RobotSpec, tmp_path: Path) -> None:
    write_log(tmp_path / "a.zarr", robot, [])
    with pytest.raises(DataError, match="holds no episodes"):
        read_demos(tmp_path / "a.zarr", DemoOptions(robot, "Lift"))
