"""Recordings read back with Rerun's own reader and held against the episode."""

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rerun as rr
from PIL import Image

from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError
from sacflow_robot.spec import ArraySpec, RobotSpec
from sacflow_robot.view.recording import SceneColumns, write_recording


class ReadBack:
    """A recording on disk."""

    def __init__(self, path: Path) -> None:
        self._recording = rr.dataframe.load_recording(path)
        self.entities = {column.entity_path for column in self._recording.schema().component_columns()}

    def rows(self, entity: str, component: str = "Scalar", index: str = "step") -> dict[int, Any]:
        """Values by step, or by nanosecond."""
        table = self._recording.view(index=index, contents=entity).select().read_all()
        (name,) = (name for name in table.column_names if name.endswith(f":{component}"))
        at = table[index].cast("int64").to_pylist()
        return {when: value[0] for when, value in zip(at, table[name].to_pylist(), strict=True) if value is not None}

    def curve(self, entity: str) -> list[float]:
        rows = self.rows(entity)
        assert list(rows) == list(range(len(rows))), "a row for every step, from the first"
        return list(rows.values())

    def static(self, entity: str, component: str) -> Any:
        table = self._recording.view(index="step", contents=entity).select_static().read_all()
        return table[f"{entity}:{component}"].to_pylist()[0]


@pytest.fixture
def episode(make_episode: Callable[..., Episode]) -> Episode:
    made = make_episode(6)
    source = np.array([0, 0, 1, 1, 0, 0], np.uint8)
    times = np.array([3, 50, 100, 161, 200, 250, 300]) * 1_000_000
    return replace(made, measured=made.action / 2, source=source, time_ns=times)


def test_every_logged_column_comes_back(episode: Episode, robot: RobotSpec, tmp_path: Path) -> None:
    path = tmp_path / "a.rrd"
    write_recording(path, robot, episode, "lift, episode 0")
    back = ReadBack(path)
    for i, name in enumerate(robot.action_names):
        for part in ("policy_action", "action", "measured"):
            assert back.curve(f"/action/{name}/{part}") == pytest.approx(getattr(episode, part)[:, i], abs=0)
    assert back.curve("/reward") == episode.rewards.tolist()
    assert back.curve("/source") == episode.source.tolist()
    assert back.curve("/timing/period_ms") == pytest.approx(np.diff(episode.time_ns) / 1e6)
    for axis, name in enumerate("xyz"):
        assert (
            back.curve(f"/observation/robot0_eef_pos/{name}")
            == episode.observations["robot0_eef_pos"][:, axis].tolist()
        )
    assert back.curve("/observation/object/7") == episode.observations["object"][:, 7].tolist()
    translations = list(back.rows("/world/eef", "Translation3D").values())
    assert np.array_equal(translations, episode.observations["robot0_eef_pos"])
    assert np.array_equal(back.static("/world/paths/eef", "LineStrip3D")[0], episode.observations["robot0_eef_pos"])
    by_time = back.rows("/action/x/action", index="time")
    assert list(by_time) == pytest.approx(episode.time_ns[:-1] - episode.time_ns[0], abs=1)
    events = back.rows("/events", "Text")
    assert events == {0: "policy acts", 2: "human acts", 4: "policy acts", 6: "terminated, solved"}
    assert "| seed | 0 |" in back.static("/episode", "Text")[0]
    top = {entity.split("/")[1] for entity in back.entities}
    assert top == {"action", "observation", "reward", "source", "timing", "world", "events", "episode", "__properties"}


def test_what_a_person_asked_for_is_shown_where_one_took_over(
    episode: Episode, robot: RobotSpec, tmp_path: Path
) -> None:
    human = np.where(episode.source[:, None] == 1, 0.25, np.nan).repeat(7, axis=1).astype(np.float32)
    write_recording(tmp_path / "a.rrd", robot, replace(episode, intervention_action=human), "lift")
    write_recording(tmp_path / "b.rrd", robot, episode, "lift")
    for i, name in enumerate(robot.action_names):
        assert np.array_equal(
            ReadBack(tmp_path / "a.rrd").curve(f"/action/{name}/intervention_action"), human[:, i], equal_nan=True
        )
    assert not [entity for entity in ReadBack(tmp_path / "b.rrd").entities if entity.endswith("intervention_action")]


def test_what_a_simulator_adds(episode: Episode, robot: RobotSpec, tmp_path: Path) -> None:
    path, rng = tmp_path / "a.rrd", np.random.default_rng(0)
    poses = np.concatenate([rng.standard_normal((7, 3)), np.tile([0.0, 0.0, 0.6, 0.8], (7, 1))], axis=1)
    images = [np.full((48, 64, 3), 30 * step, np.uint8) for step in range(7)]
    joints = {"joint1": rng.standard_normal(7)}
    write_recording(path, robot, episode, "lift", SceneColumns(joints, {"cube": poses}, iter(images)))
    back = ReadBack(path)
    assert back.curve("/joints/joint1") == joints["joint1"].tolist()
    assert np.allclose(list(back.rows("/world/objects/cube", "Translation3D").values()), poses[:, :3], atol=1e-6)
    assert np.allclose(list(back.rows("/world/objects/cube", "RotationQuat").values()), poses[:, 3:], atol=1e-6)
    blobs = back.rows("/camera/agentview", "Blob")
    assert list(blobs) == list(range(7))
    for step, blob in blobs.items():
        with Image.open(io.BytesIO(bytes(blob))) as image:
            assert image.format == "JPEG" and np.abs(np.asarray(image).astype(int) - images[step]).max() <= 2


def test_times_and_flags_where_the_log_keeps_them(episode: Episode, robot: RobotSpec, tmp_path: Path) -> None:
    path, captured = tmp_path / "a.rrd", episode.time_ns[:-1]
    for column, after_ms in (("received_ns", 1), ("inferred_ns", 3), ("sent_ns", 4)):
        object.__setattr__(episode, column, captured + after_ms * 1_000_000)
    object.__setattr__(episode, "inferred_ns", np.where(np.arange(6) == 2, -1, captured + 3_000_000))
    object.__setattr__(episode, "flags", np.array([8, 0, 2, 3, 128, 8], np.uint8))
    write_recording(path, robot, episode, "lift")
    back = ReadBack(path)
    assert back.curve("/timing/received_ms") == [1] * 6 and back.curve("/timing/sent_ms") == [4] * 6
    assert np.isnan(back.curve("/timing/inferred_ms")).tolist() == [False, False, True, False, False, False]
    assert back.curve("/flags") == [8, 0, 2, 3, 128, 8]
    events = back.rows("/events", "Text")
    assert events[3] == "late, clipped" and events[4] == "no longer late, clipped" and 5 not in events


def test_cameras_among_the_observations(episode: Episode, robot: RobotSpec, tmp_path: Path) -> None:
    path, images = tmp_path / "a.rrd", np.zeros((7, 16, 24, 3), np.float32)
    images[3] = 0.5
    spec = replace(robot, observations=(*robot.observations, ArraySpec("wrist_image", (16, 24, 3), "intensity 0 to 1")))
    episode = replace(episode, observations={**episode.observations, "wrist_image": images})
    write_recording(path, spec, episode, "lift")
    blobs = ReadBack(path).rows("/camera/wrist_image", "Blob")
    with Image.open(io.BytesIO(bytes(blobs[3]))) as image:
        assert image.size == (24, 16) and np.asarray(image).mean() == pytest.approx(127, abs=2)


def test_a_recording_that_fails_leaves_what_was_there(episode: Episode, robot: RobotSpec, tmp_path: Path) -> None:
    path = tmp_path / "a.rrd"
    path.write_text("old")

    def breaks() -> Iterator[np.ndarray]:
        yield np.zeros((48, 64, 3), np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_recording(path, robot, episode, "lift", SceneColumns(pictures=breaks()))
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(DataError, match="cannot write a recording at"):
        write_recording(path / "b.rrd", robot, episode, "lift")
