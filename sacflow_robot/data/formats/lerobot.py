"""Demonstrations from a LeRobotDataset v2.0, v2.1 or v3.0: a folder of parquet files.

For a task, observations are found by name: a feature ``observation.<key>`` (or ``<key>``), else the dimensions of any
feature that are called ``<key>_0``, ``<key>_1``, ..., as in what is written here. For any other robot the observations
are the dataset's own, see :func:`infer_robot`. Images and videos are left out.

Datasets written here hold whole episodes: the robot, env_args and masks in ``meta/sacflow_robot.json``, and in each row
of ``meta/episodes`` the episode's info and what follows its last step, under ``last/``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.data.formats.adapt import adapt
from sacflow_robot.data.formats.agreement import AgreementOptions, Claims, check_agreement, check_robot
from sacflow_robot.data.formats.checks import capture_times
from sacflow_robot.data.formats.demonstrations import DemoOptions, DemoSet, Description, Losses, human_episode
from sacflow_robot.data.formats.foreign_episodes import ForeignEpisode, Recorded, make_episodes
from sacflow_robot.data.formats.inferred_spec import UNKNOWN, infer_spec, observation_key
from sacflow_robot.data.formats.lerobot_files import (
    BOOKKEEPING,
    DAMAGE,
    INFO,
    OURS,
    VISUAL,
    Dataset,
    Feature,
    Frames,
    dimension_names,
    open_dataset,
    read_frames,
)
from sacflow_robot.data.formats.lerobot_writer import FEATURE_NAMES, write
from sacflow_robot.data.log.columns import OBSERVATION_COLUMNS, STEP_COLUMNS, stored_name
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, one_line
from sacflow_robot.spec import FloatArray, RobotSpec

__all__ = ["describe", "infer_robot", "read", "write"]

_ACTIONS = ("action", "actions")
_OUTCOMES = ("next.reward", "next.success", "next.done")
_FILE_CLOCK = "timestamps of the dataset, from the start of the episode"

Layout = Mapping[str, tuple[str, list[int] | None]]
"""Per observation key, the feature that holds it and which of its dimensions; None for all."""


def describe(path: Path) -> Description:
    """The robot of a dataset written here, and the frames per second; it names no robosuite task."""
    return Description(_own_robot(path), rate_hz=open_dataset(path).fps)


def _own_robot(path: Path) -> RobotSpec | None:
    try:
        return RobotSpec.from_dict(json.loads((path / OURS).read_text())["arm"])
    except FileNotFoundError:
        return None
    except DAMAGE as error:
        raise _damaged(path, error) from None


def infer_robot(path: Path, rate_hz: float) -> RobotSpec:
    """The specification of the robot of a dataset from elsewhere.

    Its observations are the features ``observation.*`` that are not images, or all that are neither actions nor outcomes
    where there are none of that name; units are unknown, and the actions' bounds are those of the recorded ones.
    """
    dataset = open_dataset(path)
    action = dataset.features.get(_action_name(dataset))
    if action is None:
        raise DataError(f"{path}: no feature 'action'; it has {', '.join(dataset.features)}")
    tasks = dataset.tasks
    return infer_spec(
        robot=dataset.robot_type or UNKNOWN,
        task=tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks" if tasks else UNKNOWN,
        rate_hz=rate_hz,
        observations={observation_key(f.name): f.shape for f in _observation_features(dataset)},
        actions=(
            frames.columns[action.name].reshape(frames.row.length, -1).astype(np.float64)
            for frames in read_frames(dataset, [action.name])
        ),
        action_names=action.names,
    )


def read(path: Path, options: DemoOptions) -> DemoSet:
    """Every episode of a dataset."""
    robot, dataset, losses = _own_robot(path), open_dataset(path), Losses()
    said = Claims(dataset.robot_type, dataset.fps)
    if robot is None:  # before its features, which differ if the robot does
        check_agreement(str(path), said, options.robot, options.agreement)
    try:
        layout = _layout(dataset, options.robot)
        frames = read_frames(dataset, _wanted(dataset, layout, losses, whole=robot is not None))
        if robot is None:
            found = [_foreign(dataset, each, layout, options.robot, losses) for each in frames]
            episodes = make_episodes(str(path), found, said, options, losses)
            names = {feature.name: list(feature.names) for feature in dataset.features.values() if feature.names}
            about: dict[str, Any] = {"attributes": {FEATURE_NAMES: json.dumps(names)}} if names else {}
        else:
            check_agreement(f"{path}/{INFO}", said, robot, AgreementOptions())
            claims = check_robot(str(path), robot, options.robot, options.agreement)
            whole = [_own(each, layout, robot, losses) for each in frames]
            episodes = [adapt(each, claims, options.robot, options.agreement, losses) for each in whole]
            about = json.loads((path / OURS).read_text())["about"]
        return DemoSet(options.robot, episodes, losses=losses, **about)
    except DAMAGE as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read as a LeRobotDataset ({one_line(error)}); is it complete?")


def _action_name(dataset: Dataset) -> str:
    return next((name for name in _ACTIONS if name in dataset.features), _ACTIONS[0])


def _observation_features(dataset: Dataset) -> list[Feature]:
    """Features that the robot observes, without images."""
    known = {*_ACTIONS, *_OUTCOMES, *BOOKKEEPING}
    numeric = [f for f in dataset.features.values() if f.is_numeric and f.name not in known and "/" not in f.name]
    named = [f for f in numeric if f.name.startswith("observation")]
    return named or [f for f in numeric if not f.name.startswith(("next.", "action"))]


def _layout(dataset: Dataset, robot: RobotSpec) -> dict[str, tuple[str, list[int] | None]]:
    """Find the feature of each of the robot's observations."""
    features = dataset.features
    action = features.get(_action_name(dataset))
    if action is None or action.shape != (robot.action_dim,):
        found = "absent" if action is None else list(action.shape)
        raise DataError(f"{dataset.path}: feature 'action' is {found}; task {robot.task!r} takes ({robot.action_dim},)")
    named = {
        name: (feature.name, i)
        for feature in features.values()
        if feature.dtype not in VISUAL
        for i, name in enumerate(feature.names)
    }
    layout: dict[str, tuple[str, list[int] | None]] = {}
    for spec in robot.observations:
        candidates = f"observation.{spec.key}", spec.key, spec.key.removeprefix("observation.")
        direct = [name for name in candidates if name in features and features[name].is_numeric]
        dimensions = [named.get(name) for name in dimension_names(spec.key, spec.size)]
        if direct:
            layout[spec.key] = direct[0], None
        elif all(dimensions) and len({feature for feature, _ in filter(None, dimensions)}) == 1:
            layout[spec.key] = dimensions[0][0], [i for _, i in filter(None, dimensions)]  # type: ignore[index]
        else:
            raise DataError(
                f"{dataset.path}: no observation {spec.key!r}, which task {robot.task!r} needs: neither a feature "
                f"observation.{spec.key} nor dimensions named {spec.key}_0 ...; it has {', '.join(features)}"
            )
    return layout


def _wanted(dataset: Dataset, layout: Layout, losses: Losses, *, whole: bool) -> list[str]:
    """The features to read; the others are noted as lost."""
    known = {_action_name(dataset), "next.reward", "next.success", *(f for f, _ in layout.values())}
    if whole:
        known |= {stored_name(column.lerobot, dataset.features) for column in (*STEP_COLUMNS, *OBSERVATION_COLUMNS)}
    else:
        losses.remark("the observation after the last action is not in the dataset and repeats the one before it")
    others = [f for f in dataset.features.values() if f.name not in {*known, *BOOKKEEPING, "next.done"}]
    losses.leave_out(*(f.name for f in others if f.dtype not in VISUAL))
    if cameras := [f.name for f in others if f.dtype in VISUAL]:
        losses.remark(f"images are left out: {', '.join(cameras)}")
    return [name for name in dataset.features if name in known]


def _observation(
    columns: Mapping[str, npt.NDArray[Any]],
    source: tuple[str, list[int] | None],
    shape: tuple[int, ...],
    losses: Losses,
) -> FloatArray:
    feature, dimensions = source
    rows = columns[feature].reshape(len(columns[feature]), -1)
    return losses.to_float32(rows if dimensions is None else rows[:, dimensions], feature).reshape(len(rows), *shape)


def _foreign(dataset: Dataset, frames: Frames, layout: Layout, robot: RobotSpec, losses: Losses) -> ForeignEpisode:
    columns, row = frames.columns, frames.row
    observations = {}
    for spec in robot.observations:
        rows = _observation(columns, layout[spec.key], spec.shape, losses)
        observations[spec.key] = np.concatenate([rows, rows[-1:]])
    action = _action_name(dataset)
    flat = {name: columns[name].reshape(-1) for name in ("next.reward", "next.success") if name in columns}
    rewards = losses.to_float32(flat["next.reward"], "next.reward") if "next.reward" in flat else None
    times = None
    if "timestamp" in columns:
        times = capture_times(columns["timestamp"].reshape(-1), dataset.fps)
    recorded = {} if times is None else {"time_ns": times}
    task = "; ".join(row.tasks) or robot.task
    return ForeignEpisode(
        origin=frames.origin,
        observations=observations,
        actions=losses.to_float32(columns[action].reshape(-1, robot.action_dim), action),
        outcome=Recorded(rewards, flat["next.success"].astype(bool) if "next.success" in flat else None),
        columns=recorded,
        info={"task": task, "clock": _FILE_CLOCK} if recorded else {"task": task},
    )


def _own(frames: Frames, layout: Layout, robot: RobotSpec, losses: Losses) -> Episode:
    """An episode written here, every column of it."""
    columns, row, origin = frames.columns, frames.row.row, frames.origin
    last = {name: np.asarray([row[f"last/{name}"]]) for name in {feature for feature, _ in layout.values()}}
    observations = {
        spec.key: np.concatenate([_observation(part, layout[spec.key], spec.shape, losses) for part in (columns, last)])
        for spec in robot.observations
    }
    whole: dict[str, Any] = {}
    for column in STEP_COLUMNS:
        name = stored_name(column.lerobot, columns)
        if name in columns:
            whole[column.attribute] = column.typed(columns[name])
    if np.isnan(whole.get("intervention_action", np.nan)).all():  # a person acted in other episodes only
        whole.pop("intervention_action", None)
    for column in OBSERVATION_COLUMNS:
        if column.lerobot in columns:
            after = np.asarray([row[f"last/{column.lerobot}"]])
            parts = column.typed(columns[column.lerobot]), column.typed(after)
            whole[column.attribute] = np.concatenate(parts)
    try:
        episode = human_episode(observations, whole["action"], robot, **whole, info=json.loads(row["info"]))
    except DataError as error:
        raise DataError(f"{origin}: {error}") from None
    episode.check_fits(robot, origin)
    return episode
