"""Demonstrations from a LeRobotDataset v3.0: a folder of parquet files.

Observations are found by name: a feature ``observation.<key>`` (or ``<key>``), else the dimensions of any feature that
are called ``<key>_0``, ``<key>_1``, ..., as in what is written here. Datasets written here hold whole episodes: the
arm, env_args and masks in ``meta/sacflow_robot.json``, and in each row of ``meta/episodes`` the episode's info and
what follows its last step, under ``last/``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sacflow_robot.data.demos import OBSERVATION_COLUMNS, STEP_COLUMNS, DemoOptions, DemoSet, Losses, human_episode
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, SpecMismatchError, one_line
from sacflow_robot.spec import ArmSpec, FloatArray

OURS = "meta/sacflow_robot.json"
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""Features that every dataset has."""

_UNREADABLE = (OSError, KeyError, ValueError, TypeError, AttributeError, IndexError, pa.ArrowException)
_VISUAL = ("video", "image")


class _Frames(NamedTuple):
    """One episode: its rows of the data, and its row of ``meta/episodes``."""

    columns: Mapping[str, npt.NDArray[Any]]
    row: Mapping[str, Any]


def read_arm(path: Path) -> ArmSpec | None:
    """The arm that a dataset written here was recorded with; None for one from elsewhere.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return ArmSpec.from_dict(json.loads((path / OURS).read_text())["arm"])
    except FileNotFoundError:
        return None
    except _UNREADABLE as error:
        raise _damaged(path, error) from None


def read_lerobot(path: Path, options: DemoOptions) -> DemoSet:
    """Every episode of a dataset.

    Raises:
        DataError: It cannot be read, is of another version, or lacks what the task needs.
        SpecMismatchError: It was written here, of another arm.
    """
    arm = read_arm(path)
    if arm is not None and (different := options.arm.differences(arm)):
        raise SpecMismatchError(f"{path} does not fit (expected, found): {'; '.join(different)}")
    try:
        info = json.loads((path / "meta" / "info.json").read_text())
        version, features = str(info["codebase_version"]), info["features"]
        if not version.startswith("v3."):
            raise DataError(
                f"{path} is a LeRobotDataset {version}; expected v3.0, to which lerobot's own script converts"
            )
        losses, episodes = Losses(), []
        layout = _layout(path, features, options.arm)
        read = _whole if arm is not None else _plain
        wanted = _wanted(features, layout, losses, whole=arm is not None)
        for i, frames in enumerate(_frames(path, info["data_path"], wanted)):
            origin = f"{path}, episode {i}"
            belonging = np.count_nonzero(frames.columns["episode_index"] == frames.row["episode_index"])
            if belonging != frames.row["length"]:
                raise DataError(f"{origin} has {belonging} frames, expected {frames.row['length']}; is it complete?")
            try:
                episode = read(frames, layout, options.arm, losses)
            except DataError as error:
                raise DataError(f"{origin}: {error}") from None
            episode.check_fits(options.arm, origin)
            episodes.append(episode)
        about = json.loads((path / OURS).read_text())["about"] if arm is not None else {}
        return DemoSet(options.arm, episodes, losses=losses, **about)
    except _UNREADABLE as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read as a LeRobotDataset ({one_line(error)}); is it complete?")


def _layout(path: Path, features: Mapping[str, Any], arm: ArmSpec) -> dict[str, tuple[str, list[int] | None]]:
    """Per observation key, the feature that holds it and which of its dimensions; None for all."""
    if list(features.get("action", {}).get("shape", ())) != [arm.action_dim]:
        found = features.get("action", {}).get("shape", "absent")
        raise DataError(f"{path}: feature 'action' is {found}; task {arm.task!r} takes ({arm.action_dim},)")
    named = {
        name: (feature, i)
        for feature, entry in features.items()
        if entry["dtype"] not in _VISUAL
        for i, name in enumerate(_names(entry.get("names")))
    }
    layout: dict[str, tuple[str, list[int] | None]] = {}
    for spec in arm.observations:
        direct = [name for name in (f"observation.{spec.key}", spec.key) if name in features]
        dimensions = [named.get(name) for name in dimension_names(spec.key, spec.size)]
        if direct:
            layout[spec.key] = direct[0], None
        elif all(dimensions) and len({feature for feature, _ in filter(None, dimensions)}) == 1:
            layout[spec.key] = dimensions[0][0], [i for _, i in filter(None, dimensions)]  # type: ignore[index]
        else:
            raise DataError(
                f"{path}: no observation {spec.key!r}, which task {arm.task!r} needs: neither a feature "
                f"observation.{spec.key} nor dimensions named {spec.key}_0 ...; it has {', '.join(features)}"
            )
    return layout


def dimension_names(key: str, size: int) -> list[str]:
    """Names of an observation's dimensions within a feature that joins several observations."""
    return [f"{key}_{i}" for i in range(size)]


def _names(names: Any) -> list[str]:
    """Names of a feature's dimensions, which LeRobot keeps as a list, as a map to lists, or not at all."""
    if isinstance(names, Mapping):
        return [str(name) for group in names.values() for name in (group if isinstance(group, list) else [group])]
    return [str(name) for name in names or ()]


def _wanted(features: Mapping[str, Any], layout: Mapping[str, Any], losses: Losses, *, whole: bool) -> list[str]:
    """The features to read; the others are noted as lost."""
    known = {"action", "next.reward", "next.success", *(f for f, _ in layout.values())}
    if whole:
        known |= {column.lerobot for column in (*STEP_COLUMNS, *OBSERVATION_COLUMNS)}
    else:
        losses.remark("the observation after the last action is not in the dataset and repeats the one before it")
    losses.leave_out(*(name for name in features if name not in {*known, *BOOKKEEPING, "next.done"}))
    return ["index", "episode_index", *(name for name in features if name in known)]


def _frames(path: Path, data_path: str, wanted: list[str]) -> Iterator[_Frames]:
    """Episodes in order; a file of data is read once for all the episodes in it that follow each other."""
    files = sorted((path / "meta" / "episodes").glob("*/*.parquet"))
    rows = [row for file in files for row in _without_stats(file)]
    rows.sort(key=lambda row: row["episode_index"])
    loaded, columns = None, {}
    for row in rows:
        name = data_path.format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
        if name != loaded:
            table = pq.read_table(path / name, columns=wanted)
            columns, loaded = {key: _to_numpy(table[key]) for key in wanted}, name
        first, stop = np.searchsorted(columns["index"], [row["dataset_from_index"], row["dataset_to_index"]])
        yield _Frames({key: values[first:stop] for key, values in columns.items()}, row)


def _without_stats(file: Path) -> list[dict[str, Any]]:
    names = [name for name in pq.read_schema(file).names if not name.startswith("stats/")]
    rows: list[dict[str, Any]] = pq.read_table(file, columns=names).to_pylist()
    return rows


def _to_numpy(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """A column (T,) or, of lists, (T, N)."""
    if not (pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)):
        return np.asarray(column.to_numpy())
    flat = column.combine_chunks().flatten()
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(len(column), -1)


def _observation(
    columns: Mapping[str, npt.NDArray[Any]],
    source: tuple[str, list[int] | None],
    shape: tuple[int, ...],
    losses: Losses,
) -> FloatArray:
    feature, dimensions = source
    rows = columns[feature].reshape(len(columns[feature]), -1)
    return losses.to_float32(rows if dimensions is None else rows[:, dimensions], feature).reshape(len(rows), *shape)


def _plain(frames: _Frames, layout: Mapping[str, Any], arm: ArmSpec, losses: Losses) -> Episode:
    """An episode of which only the published features are known."""
    columns = frames.columns
    observations = {}
    for spec in arm.observations:
        rows = _observation(columns, layout[spec.key], spec.shape, losses)
        observations[spec.key] = np.concatenate([rows, rows[-1:]])
    solved = next((columns[name] for name in ("next.success", "next.reward") if name in columns), None)
    if solved is None:
        losses.remark("no success is recorded")
        solved = np.zeros(frames.row["length"])
    actions = losses.to_float32(columns["action"].reshape(-1, arm.action_dim), "action")
    if not np.isfinite(actions).all():
        raise DataError("NaN or infinity among its actions; leave it out")
    rewards = losses.to_float32(columns.get("next.reward", solved), "next.reward")
    if "next.success" in columns and "next.reward" in columns and not np.array_equal(rewards > 0, solved):
        rewards = solved.astype(np.float32)  # a shaped reward; what solved the task is known better
        losses.remark("next.success replaces next.reward")
    return human_episode(observations, actions, arm, rewards=rewards)


def _whole(frames: _Frames, layout: Mapping[str, Any], arm: ArmSpec, losses: Losses) -> Episode:
    """An episode written here, every column of it."""
    columns, row = frames.columns, frames.row
    last = {name: np.asarray([row[f"last/{name}"]]) for name in {feature for feature, _ in layout.values()}}
    observations = {
        spec.key: np.concatenate([_observation(part, layout[spec.key], spec.shape, losses) for part in (columns, last)])
        for spec in arm.observations
    }
    whole: dict[str, Any] = {}
    for column in STEP_COLUMNS:
        if column.lerobot in columns:
            whole[column.attribute] = column.typed(columns[column.lerobot])
    if np.isnan(whole.get("human", np.nan)).all():  # a person acted in other episodes only
        whole.pop("human", None)
    for column in OBSERVATION_COLUMNS:
        if column.lerobot in columns:
            after = np.asarray([row[f"last/{column.lerobot}"]])
            parts = column.typed(columns[column.lerobot]), column.typed(after)
            whole[column.attribute] = np.concatenate(parts)
    commanded = columns["action"].reshape(-1, arm.action_dim).astype(np.float32, copy=False)
    return human_episode(observations, commanded, arm, **whole, commanded=commanded, info=json.loads(row["info"]))
