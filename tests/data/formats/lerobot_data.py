"""LeRobotDatasets as LeRobot itself lays them out, written from the description of the layout and not by this package."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sacflow_robot.data.formats.agreement import AgreementOptions
from sacflow_robot.data.formats.demonstrations import DemoOptions, DemoSet
from sacflow_robot.data.formats.sources import demo_spec, read_demos
from sacflow_robot.errors import DataError

VERSIONS = ("v2.0", "v2.1", "v3.0")
JOINTS = ["shoulder_pan.pos", "shoulder_lift.pos", "elbow_flex.pos", "wrist_flex.pos", "wrist_roll.pos", "gripper.pos"]
CAMERA = {"dtype": "video", "shape": [48, 64, 3], "names": ["height", "width", "channels"], "info": {"video.fps": 30.0}}


@dataclass
class Recorded:
    """A dataset to be: what differs from one test to the next.

    Attributes:
        version: codebase_version.
        fps: Frames per second.
        lengths: Frames of each episode.
        robot_type: As ``meta/info.json`` has it.
        tasks: Task of each episode; the first of them where there are fewer.
        columns: Features to add, by name, each (T_total, ...).
        names: Names of the dimensions of features, by feature.
        info: What else to say in ``meta/info.json``.
    """

    version: str = "v2.1"
    fps: float = 30
    lengths: Sequence[int] = (5, 3)
    robot_type: str | None = "so101_follower"
    tasks: Sequence[str] = ("Pick up the cube",)
    columns: dict[str, Any] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.lengths)

    def task(self, episode: int) -> str:
        return self.tasks[episode % len(self.tasks)]

    def frames(self) -> dict[str, Any]:
        """Every column (T_total, ...)."""
        rng = np.random.default_rng(0)
        state = rng.uniform(-90, 90, (self.total, 6)).astype(np.float32)
        action = rng.uniform(-90, 90, (self.total, 6)).astype(np.float32)
        frame = np.concatenate([np.arange(n) for n in self.lengths])
        episode = np.repeat(np.arange(len(self.lengths)), self.lengths)
        unique = list(dict.fromkeys(self.task(i) for i in range(len(self.lengths))))
        return {
            "action": action,
            "observation.state": state,
            **self.columns,
            "timestamp": (frame / self.fps).astype(np.float32),
            "frame_index": frame,
            "episode_index": episode,
            "index": np.arange(self.total),
            "task_index": np.array([unique.index(self.task(i)) for i in episode]),
        }

    def features(self, frames: dict[str, Any]) -> dict[str, Any]:
        names = {"action": JOINTS, "observation.state": JOINTS, **self.names}
        found = {
            key: {"dtype": rows.dtype.name, "shape": list(rows.shape[1:]) or [1], "names": names.get(key)}
            for key, rows in frames.items()
        }
        return {"observation.images.front": CAMERA, **found}

    def write(self, path: Path) -> Path:
        """Write the dataset, by its version."""
        frames = self.frames()
        parts = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        joined = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        info = {
            "codebase_version": self.version,
            "robot_type": self.robot_type,
            "total_episodes": len(self.lengths),
            "total_frames": self.total,
            "total_tasks": len(set(self.tasks)),
            "chunks_size": 1000,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self.lengths)}"},
            "data_path": parts if self.version < "v3" else joined,
            "features": self.features(frames),
            **self.info,
        }
        _write_json(path / "meta/info.json", info)
        (self._write_v2 if self.version < "v3" else self._write_v3)(path, frames)
        return path

    def _write_v2(self, path: Path, frames: dict[str, Any]) -> None:
        tasks = list(dict.fromkeys(self.task(i) for i in range(len(self.lengths))))
        _write_lines(path / "meta/tasks.jsonl", [{"task_index": i, "task": task} for i, task in enumerate(tasks)])
        rows = [{"episode_index": i, "tasks": [self.task(i)], "length": n} for i, n in enumerate(self.lengths)]
        _write_lines(path / "meta/episodes.jsonl", rows)
        start = 0
        for i, length in enumerate(self.lengths):
            part = {key: rows[start : start + length] for key, rows in frames.items()}
            write_frames(path / f"data/chunk-000/episode_{i:06d}.parquet", part)
            start += length

    def _write_v3(self, path: Path, frames: dict[str, Any]) -> None:
        ends = np.cumsum(self.lengths).tolist()
        rows = {
            "episode_index": list(range(len(self.lengths))),
            "tasks": [[self.task(i)] for i in range(len(self.lengths))],
            "length": list(self.lengths),
            "data/chunk_index": [0] * len(self.lengths),
            "data/file_index": [0] * len(self.lengths),
            "dataset_from_index": [0, *ends[:-1]],
            "dataset_to_index": ends,
        }
        (path / "meta/episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.table(rows), path / "meta/episodes/chunk-000/file-000.parquet")
        write_frames(path / "data/chunk-000/file-000.parquet", frames)


def write_frames(path: Path, frames: dict[str, Any]) -> None:
    """One parquet file; vectors as lists of fixed size, as LeRobot's Sequence(length=...) is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({key: _column(rows) for key, rows in frames.items()}), path)


def _column(rows: Any) -> pa.Array:
    if not isinstance(rows, np.ndarray) or rows.ndim == 1:
        return pa.array(rows)
    values = pa.array(rows.reshape(-1))
    for extent in rows.shape[:0:-1]:
        values = pa.FixedSizeListArray.from_arrays(values, extent)
    return values


def edit_frames(file: Path, **changes: Callable[[Any], Any]) -> None:
    """Change columns of a parquet file, each by a function of its values; a name's dots are given as ``__``."""
    table = pq.read_table(file)
    for name, change in changes.items():
        name = name.replace("__", ".")
        nested = pa.types.is_fixed_size_list(table[name].type)
        old = table[name].to_pylist() if nested else table[name].to_numpy().copy()
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(change(old)))
    pq.write_table(table, file)


def edit_info(path: Path, **changes: Any) -> None:
    """Change ``meta/info.json``."""
    info = json.loads((path / "meta/info.json").read_text())
    _write_json(path / "meta/info.json", {**info, **changes})


def _write_json(file: Path, data: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, indent=4))


def _write_lines(file: Path, rows: list[Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path, **agreement: Any) -> DemoSet:
    """Everything, of the robot that the dataset itself is of."""
    return read_demos(path, DemoOptions(demo_spec(path), "", agreement=AgreementOptions(**agreement)))


def refusal(path: Path) -> str:
    """The one line that a dataset is refused with."""
    with pytest.raises(DataError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def data_file(path: Path, episode: int = 0) -> Path:
    """The file that holds an episode, in either layout."""
    own = path / f"data/chunk-000/episode_{episode:06d}.parquet"
    return own if own.exists() else path / "data/chunk-000/file-000.parquet"
