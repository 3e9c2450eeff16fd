"""Demonstrations as a LeRobotDataset v3.0.

Features: an observation called ``observation.*`` is a feature of that name. Of the others, ``object`` is
``observation.environment_state``, and the rest joined is ``observation.state``, as LeRobot's policies expect them;
``action`` is the one sent; ``next.reward``, ``next.done`` and ``next.success`` are
LeRobot's own. What an episode has beyond these stands beside them (see :mod:`sacflow_robot.data.formats.demonstrations` for names, and
:mod:`sacflow_robot.data.formats.lerobot` for what follows an episode's last step).

Layout and statistics as in huggingface/lerobot, src/lerobot/datasets (dataset_metadata.py, utils.py, compute_stats.py).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sacflow_robot.data.formats.demonstrations import DemoSet
from sacflow_robot.data.formats.lerobot_files import BOOKKEEPING, OURS, dimension_names
from sacflow_robot.data.log.columns import OBSERVATION_COLUMNS, STEP_COLUMNS
from sacflow_robot.episode import Episode
from sacflow_robot.errors import LogWriteError, one_line
from sacflow_robot.spec import RobotSpec

FEATURE_NAMES = "lerobot_feature_names"
"""Attribute of a set: JSON with the names of the dimensions of each feature, which a specification has no place for."""

CHUNK_PATH = "chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
CHUNKS_SIZE, DATA_FILE_MB, VIDEO_FILE_MB = 1000, 100, 200  # LeRobot's defaults: files per folder, MB per file
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}

Columns = dict[str, npt.NDArray[Any]]


def write(path: Path, demos: DemoSet, *, chunks_size: int = CHUNKS_SIZE, data_file_mb: float = DATA_FILE_MB) -> None:
    """Write the dataset; what not every episode has is left out, and noted in ``demos.losses``."""
    robot = demos.robot
    optional = _columns_of_all(demos)
    tasks = list(dict.fromkeys(_task(episode, robot) for episode in demos.episodes))
    frames, lasts, start = [], [], 0
    for i, episode in enumerate(demos.episodes):
        columns, last = _episode_columns(episode, robot, optional)
        frame = np.arange(len(episode), dtype=np.int64)
        # LeRobot's own columns; its timestamps stand on the grid of the frame rate, time_ns says when it was.
        columns["timestamp"] = (frame / robot.control_rate_hz).astype(np.float32)
        columns["frame_index"] = frame
        columns["episode_index"] = np.full_like(frame, i)
        columns["index"] = start + frame
        columns["task_index"] = np.full_like(frame, tasks.index(_task(episode, robot)))
        frames.append(columns)
        lasts.append(last)
        start += len(episode)
    features = _features(frames[0], demos)
    files = list(_files(frames, chunks_size, data_file_mb * 2**20))
    everything = {key: np.concatenate([each[key] for each in frames]) for key in frames[0]}
    try:
        for chunk, file, first, stop in files:
            target = path / "data" / CHUNK_PATH.format(chunk_index=chunk, file_index=file)
            _write_table(target, frames[first:stop], features)
        rows = _episode_rows(demos, frames, lasts, files)
        episodes_file = path / "meta" / "episodes" / CHUNK_PATH.format(chunk_index=0, file_index=0)
        episodes_file.parent.mkdir(parents=True)
        names = dict.fromkeys(name for row in rows for name in row)
        table = pa.Table.from_pydict({name: [row.get(name) for row in rows] for name in names})
        pq.write_table(table, episodes_file, compression="snappy")
        _write_tasks(path / "meta" / "tasks.parquet", tasks)
        _write_json(path / "meta" / "stats.json", _statistics(everything))
        layout = {"chunks_size": chunks_size, "data_files_size_in_mb": data_file_mb}
        _write_json(path / "meta" / "info.json", _info(demos, features, len(tasks), layout))
        _write_json(path / OURS, {"arm": asdict(robot), "about": demos.about()})
    except OSError as error:
        raise LogWriteError(f"cannot write {path}: {one_line(error)}") from None


def _columns_of_all(demos: DemoSet) -> set[str]:
    """Features beyond LeRobot's own that every episode has; ``measured`` only if some robot could tell, and
    ``intervention_action``, NaN where there is none, if a person acted in any."""
    present = set()
    for column in (*STEP_COLUMNS, *OBSERVATION_COLUMNS):
        having = [getattr(episode, column.attribute) is not None for episode in demos.episodes]
        if column.attribute == "measured" and all(np.isnan(e.measured).all() for e in demos.episodes):
            continue
        if all(having) or (column.attribute == "intervention_action" and any(having)):
            present.add(column.lerobot)
        elif any(having):
            demos.losses.leave_out(f"{column.lerobot} (not every episode has it)")
    return present


def _task(episode: Episode, robot: RobotSpec) -> str:
    """An episode's task in words."""
    return str(episode.info.get("task", robot.task))


def _joined(robot: RobotSpec) -> dict[str, list[str]]:
    """Observation features: feature to the keys that it joins."""
    keys = [a.key for a in robot.observations]
    own = [key for key in keys if key.startswith("observation.")]
    if own:
        return {key if key in own else f"observation.{key}": [key] for key in keys}
    joined = {
        "observation.state": [key for key in keys if key != "object"],
        "observation.environment_state": [key for key in keys if key == "object"],
    }
    return {feature: members for feature, members in joined.items() if members}


def _episode_columns(episode: Episode, robot: RobotSpec, optional: set[str]) -> tuple[Columns, Columns]:
    """An episode's features (T, ...), and what follows its last step."""
    columns: Columns = {}
    last: Columns = {}
    for feature, keys in _joined(robot).items():
        rows = np.concatenate([episode.observations[key].reshape(len(episode) + 1, -1) for key in keys], axis=1)
        columns[feature], last[feature] = rows[:-1], rows[-1]
    ends = np.arange(len(episode)) == len(episode) - 1
    columns["next.done"], columns["next.success"] = ends, ends & episode.success
    for column in STEP_COLUMNS:
        if column.lerobot in optional:
            known = getattr(episode, column.attribute)
            columns[column.lerobot] = np.full_like(episode.action, np.nan) if known is None else known
    for column in OBSERVATION_COLUMNS:
        if column.lerobot in optional:
            values = getattr(episode, column.attribute)
            columns[column.lerobot], last[column.lerobot] = values[:-1], values[-1]
    return columns, last


def _features(columns: Columns, demos: DemoSet) -> dict[str, dict[str, Any]]:
    """The map ``features`` of ``meta/info.json``."""
    robot = demos.robot
    sizes = {a.key: a.size for a in robot.observations}
    recorded = json.loads(str(demos.attributes.get(FEATURE_NAMES, "{}")))
    names: dict[str, list[str]] = {
        key: list(robot.action_names) for key in ("action", "policy_action", "measured", "intervention_action")
    }
    for feature, keys in _joined(robot).items():
        own = [name for key in keys for name in dimension_names(key, sizes[key])]
        theirs = recorded.get(feature, ())
        names[feature] = list(theirs) if len(theirs) == len(own) else own
    return {
        key: {"dtype": values.dtype.name, "shape": list(values.shape[1:]) or [1], "names": names.get(key)}
        for key, values in columns.items()
    }


def _files(frames: list[Columns], chunks_size: int, most_bytes: float) -> Iterator[tuple[int, int, int, int]]:
    """Divide the episodes into files: chunk, file, first episode, and the one after the last."""
    first, size, number = 0, 0, 0
    for i, columns in enumerate(frames):
        weight = sum(values.nbytes for values in columns.values())
        if i > first and size + weight > most_bytes:
            yield *divmod(number, chunks_size), first, i
            first, size, number = i, 0, number + 1
        size += weight
    yield *divmod(number, chunks_size), first, len(frames)


def _write_table(path: Path, episodes: list[Columns], features: Mapping[str, Any]) -> None:
    """One file of frames, a row group per episode, as LeRobot writes them."""
    fields = [pa.field(key, _arrow_type(feature)) for key, feature in features.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, pa.schema(fields), compression="snappy") as writer:
        for columns in episodes:
            arrays = [_to_arrow(columns[field.name], field.type) for field in fields]
            writer.write_table(pa.Table.from_arrays(arrays, schema=pa.schema(fields)))


def _arrow_type(feature: Mapping[str, Any]) -> pa.DataType:
    scalar = pa.bool_() if feature["dtype"] == "bool" else pa.from_numpy_dtype(np.dtype(feature["dtype"]))
    return scalar if feature["shape"] == [1] else pa.list_(scalar, feature["shape"][0])


def _to_arrow(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, kind.list_size) if pa.types.is_fixed_size_list(kind) else flat


def _episode_rows(
    demos: DemoSet, frames: list[Columns], lasts: list[Columns], files: list[tuple[int, int, int, int]]
) -> list[dict[str, Any]]:
    """Rows of ``meta/episodes``."""
    places = {i: (chunk, file) for chunk, file, first, stop in files for i in range(first, stop)}
    rows = []
    for i, (episode, columns, last) in enumerate(zip(demos.episodes, frames, lasts, strict=True)):
        row: dict[str, Any] = {
            "episode_index": i,
            "tasks": [_task(episode, demos.robot)],
            "length": len(episode),
            "data/chunk_index": places[i][0],
            "data/file_index": places[i][1],
            "dataset_from_index": int(columns["index"][0]),
            "dataset_to_index": int(columns["index"][-1]) + 1,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        for key, stats in _statistics(columns).items():
            row |= {f"stats/{key}/{name}": value for name, value in stats.items()}
        row |= {f"last/{key}": value.tolist() for key, value in last.items()}
        row["info"] = json.dumps(dict(episode.info))
        rows.append(row)
    return rows


def _statistics(columns: Columns) -> dict[str, dict[str, list[Any]]]:
    """Statistics per feature, over the frames; what is not finite (an unknown ``measured``, an overflow) has none."""
    found = {}
    for key, values in columns.items():
        rows = values.reshape(len(values), -1)
        exact = rows.astype(np.float64)
        with np.errstate(all="ignore"):
            stats = {"mean": exact.mean(0), "std": exact.std(0)}
            stats |= dict(zip(QUANTILES, np.quantile(exact, list(QUANTILES.values()), axis=0), strict=True))
        if all(np.isfinite(each).all() for each in stats.values()):
            stats = {"min": rows.min(0), "max": rows.max(0), **stats, "count": np.array([len(rows)])}
            found[key] = {name: each.tolist() for name, each in stats.items()}
    return found


def _write_tasks(path: Path, tasks: list[str]) -> None:
    """LeRobot reads this with pandas, the task's text being the index; the schema's metadata tells pandas so."""
    columns = [("task_index", "int64", "int64"), ("task", "unicode", "object")]
    about = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
            for name, kind, numpy in columns
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": tasks})
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(about)}), path)


def _info(demos: DemoSet, features: Mapping[str, Any], tasks: int, layout: Mapping[str, float]) -> dict[str, Any]:
    rate = demos.robot.control_rate_hz
    return {
        "codebase_version": "v3.0",
        "robot_type": demos.robot.robot,
        "total_episodes": len(demos.episodes),
        "total_frames": sum(map(len, demos.episodes)),
        "total_tasks": tasks,
        **layout,
        "video_files_size_in_mb": VIDEO_FILE_MB,
        "fps": int(rate) if rate.is_integer() else rate,
        "splits": {"train": f"0:{len(demos.episodes)}"},
        "data_path": f"data/{CHUNK_PATH}",
        "video_path": None,
        "features": dict(sorted(features.items(), key=lambda item: item[0] in BOOKKEEPING)),
    }


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=4, allow_nan=False))
