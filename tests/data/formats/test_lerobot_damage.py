"""Datasets from elsewhere that are damaged or contradict themselves: they are refused in one line that says where."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sacflow_robot.data.formats.sources import kind_of
from sacflow_robot.errors import DataError
from tests.data.formats.lerobot_data import (
    VERSIONS,
    Recorded,
    data_file,
    edit_frames,
    edit_info,
    read,
    refusal,
    write_frames,
)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("column", "change", "said"),
    [
        ("timestamp", lambda t: t * 0.6, "50 Hz apart, and the file says 30 Hz"),
        ("timestamp", lambda t: np.concatenate([t[:2], t[2:4][::-1], t[4:]]), "step 3: its timestamp runs backwards"),
        ("timestamp", lambda t: t * 0, "its timestamps are all 0"),
        ("timestamp", lambda t: np.where(np.arange(len(t)) == 2, np.nan, t), "step 2: its timestamp is nan"),
        (
            "timestamp",
            lambda t: np.where(np.arange(len(t)) > 2, t + 0.1, t),
            "frame 3: its timestamp is 0.1333 s after",
        ),
        ("timestamp", lambda t: t + 1.7e9, "timestamps are all 1.7e+09"),  # wall-clock time in float32
        ("frame_index", lambda t: np.concatenate([t[:1], t[2:0:-1], t[3:]]), "frame 1: frame_index is 2, expected 1"),
        ("index", lambda t: np.concatenate([t[:3], t[3:5][::-1], t[5:]]), "frame 3: index is 4, expected 3"),
        ("episode_index", lambda t: t + 1, "frame 0: episode_index is 1, expected 0"),
    ],
)
def test_bookkeeping_that_does_not_agree(
    version: str, column: str, change: Callable[[Any], Any], said: str, tmp_path: Path
) -> None:
    path = Recorded(version).write(tmp_path / "a")
    edit_frames(data_file(path), **{column: lambda t: change(t).astype(t.dtype)})  # float32 again, as it was
    message = refusal(path)
    assert said in message and "episode" in message and str(path / "data/chunk-000") in message


def test_an_index_beside_the_episodes_table(tmp_path: Path) -> None:
    """The table of v3.0 names the first index of each episode; before, only overlaps tell."""
    path = Recorded("v3.0").write(tmp_path / "a")
    edit_frames(data_file(path), index=lambda t: t + 7)
    assert "frame 0: index is 7, expected 0" in refusal(path)
    path = Recorded("v2.1").write(tmp_path / "b")
    edit_frames(data_file(path, 1), index=lambda t: t - 5)
    assert "episode_000001.parquet, episode 1, frame 0: index is 0, expected 5" in refusal(path)
    edit_frames(data_file(path, 1), index=lambda t: t + 100)  # episodes between them were deleted
    assert len(read(path).episodes) == 2


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: [*rows[:2], rows[2][:5], *rows[3:]], "frame 2: observation.state has 5 values, expected 6"),
        (lambda rows: [rows[0] * 2, *rows[1:]], "frame 0: observation.state has 12 values, expected 6"),
        # As many values in all as there should be: nothing but the rows themselves tells.
        (lambda rows: [rows[0], rows[1][:4], rows[2] + rows[1][4:], *rows[3:]], "frame 1: observation.state has 4"),
        (
            lambda rows: [row[:5] for row in rows],
            "frame 0: observation.state has 5 values, expected 6 as meta/info.json",
        ),
        (lambda rows: [*rows[:3], None, *rows[4:]], "frame 3: observation.state has no value"),
        (
            lambda rows: [[*row[:5], None] if i == 4 else row for i, row in enumerate(rows)],
            "frame 4: observation.state has",
        ),
        (lambda rows: [[*row[:5], np.nan] if i == 4 else row for i, row in enumerate(rows)], "step 4: NaN or infinity"),
        (lambda rows: [["a"] * 6 for _ in rows], "observation.state holds string"),
    ],
)
def test_ragged_rows(version: str, change: Callable[[Any], Any], said: str, tmp_path: Path) -> None:
    path = Recorded(version).write(tmp_path / "a")
    edit_frames(data_file(path), observation__state=change)
    message = refusal(path)
    assert said in message and "episode 0" in message


def test_what_is_missing_or_damaged(tmp_path: Path) -> None:
    for number, (version, change, said) in enumerate(
        [
            (
                "v2.1",
                lambda path: data_file(path, 1).unlink(),
                "episode_000001.parquet is missing, which holds episode 1",
            ),
            ("v3.0", lambda path: data_file(path).unlink(), "file-000.parquet is missing, which holds episode 0"),
            ("v2.1", lambda path: truncate(data_file(path, 1)), "episode_000001.parquet cannot be read"),
            ("v3.0", lambda path: truncate(data_file(path)), "file-000.parquet cannot be read"),
            ("v2.1", lambda path: truncate(path / "meta/episodes.jsonl"), "episodes.jsonl, line 2 is damaged"),
            (
                "v2.1",
                lambda path: (path / "meta/episodes.jsonl").unlink(),
                "has no meta/episodes.jsonl, which v2.1 has",
            ),
            ("v3.0", lambda path: truncate(path / "meta/episodes/chunk-000/file-000.parquet"), "is it complete"),
            ("v3.0", lambda path: (path / "meta/episodes/chunk-000/file-000.parquet").unlink(), "holds no chunk-"),
            ("v2.1", lambda path: edit_info(path, total_episodes=3), "says 3 episodes, the episodes table has 2"),
            ("v2.1", lambda path: truncate(path / "meta/info.json"), "info.json cannot be read"),
            (
                "v2.1",
                lambda path: edit_info(path, fps=0),
                "info.json cannot be read as part of a LeRobotDataset (fps 0)",
            ),
            ("v2.1", lambda path: edit_info(path, features=None), "info.json cannot be read"),
            ("v2.1", lambda path: edit_info(path, codebase_version="v1.6"), "v1.6; supported are v2.0, v2.1 and v3.0"),
            ("v3.0", lambda path: edit_info(path, codebase_version="v4.0"), "v4.0; supported are v2.0, v2.1 and v3.0"),
            ("v2.1", drop_column, "episode_000000.parquet has no column action"),
            ("v2.1", shorten, "episode 0 has 4 frames, expected 5"),
            ("v3.0", shorten, "episode 1 has 2 frames, expected 3"),
        ]
    ):
        path = Recorded(version).write(tmp_path / str(number))
        change(path)
        message = refusal(path)
        assert said in message and str(path) in message


def truncate(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) - len(whole) // 3])


def drop_column(path: Path) -> None:
    table = pq.read_table(data_file(path))
    pq.write_table(table.drop_columns("action"), data_file(path))


def shorten(path: Path) -> None:
    table = pq.read_table(data_file(path))
    pq.write_table(table.slice(0, len(table) - 1), data_file(path))


def test_frames_that_no_episode_names(tmp_path: Path) -> None:
    path = Recorded("v3.0").write(tmp_path / "a")
    frames = Recorded("v3.0", lengths=(5, 3, 2)).frames()
    write_frames(data_file(path), frames)
    assert "file-000.parquet has 10 frames, the episodes table names 8" in refusal(path)


def test_images_alone_are_not_enough(tmp_path: Path) -> None:
    recorded = Recorded()
    frames = {k: v for k, v in recorded.frames().items() if k != "observation.state"}
    recorded.frames = lambda: frames  # type: ignore[method-assign]
    assert "no low-dimensional observations" in refusal(recorded.write(tmp_path / "a"))


def test_a_folder_that_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not an episode log, a LeRobotDataset or .* looked for .*meta/info\.json"):
        kind_of(tmp_path)
