"""Demonstrations from whatever file or folder a user names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from sacflow_robot.data.formats.adapt import adapt
from sacflow_robot.data.formats.agreement import check_robot
from sacflow_robot.data.formats.checks import check_log_times
from sacflow_robot.data.formats.demonstrations import DemoOptions, DemoSet, Losses, end_at_success
from sacflow_robot.data.formats.gripper import gripper_disagreement
from sacflow_robot.data.formats.inferred_spec import with_bounds_of
from sacflow_robot.data.log import remote
from sacflow_robot.data.log.columns import FILLS, STEP_COLUMNS
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.data.log.store import WRITING
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, UnknownNameError, UsageError
from sacflow_robot.spec import RobotSpec
from sacflow_robot.utils.action_history import history_of, robot_with_history, without_history

# Kind: the suffixes that name it
KINDS = {"zarr": (".zarr",), "hdf5": (".hdf5", ".h5"), "lerobot": (".lerobot",)}

LOG_ABOUT = "demonstrations"
"""Attribute of an episode log that was converted from elsewhere: JSON, see ``DemoSet.about``."""


def kind_of(path: Path | str) -> str:
    """Kind of what is at the path: zarr, hdf5, lerobot or diffusion_policy.

    What an address such as ``s3://bucket/episodes.zarr`` names can only be an episode log.

    Raises:
        DataError: Nothing is there, or it is of no kind known here.
    """
    if remote.is_url(path):
        return "zarr"
    path = Path(path)
    if not path.exists():
        raise DataError(f"no file or folder {path}; check the path")
    if path.is_dir():
        return _kind_of_folder(path)
    if path.suffix in KINDS["hdf5"]:
        return "hdf5"
    if path.suffix == ".zip":
        return "diffusion_policy"
    raise DataError(
        f"{path} is neither an episode log, a LeRobotDataset or a diffusion_policy store (folders), nor an HDF5 file "
        f"({', '.join(KINDS['hdf5'])}) or a zipped diffusion_policy store (.zarr.zip)"
    )


def _kind_of_folder(path: Path) -> str:
    if any((path / name).exists() for name in ("meta/info.json", "meta_data/info.json")):
        return "lerobot"
    if (path / ".zattrs").exists() and _is_log(path / ".zattrs"):
        return "zarr"
    if (path / "meta" / "episode_ends").is_dir():
        return "diffusion_policy"
    if (path / ".zgroup").exists() or (path / WRITING).exists():
        return "zarr"
    raise DataError(
        f"{path} is not an episode log, a LeRobotDataset or a diffusion_policy store: looked for .zgroup, meta/info.json "
        "and meta/episode_ends"
    )


def _is_log(attributes: Path) -> bool:
    """Return True if a store's attributes are an episode log's, or damaged, which the log's own reader reports best."""
    try:
        found = json.loads(attributes.read_text())
        return isinstance(found, dict) and "format" in found
    except (OSError, ValueError):
        return True


def kind_to_write(path: Path, kind: str | None = None) -> str:
    """Kind to write at the path: the one given, else the one that its suffix names.

    Raises:
        UsageError: The suffix names none.
    """
    if kind is None:
        kind = next((name for name, suffixes in KINDS.items() if path.suffix in suffixes), None)
    if kind is None:
        suffixes = ", ".join(suffix for each in KINDS.values() for suffix in each)
        raise UsageError(f"{path} does not say which format to write; end its name in {suffixes}, or give --to")
    return kind


class _Format(Protocol):
    """Functions that the module of each format offers, but for episode logs, which hold all of it themselves."""

    def recorded_robot(self, path: Path) -> tuple[RobotSpec | None, str | None]: ...
    def infer_robot(self, path: Path, rate_hz: float | None = None) -> RobotSpec: ...
    def has_observations(self, path: Path) -> bool: ...
    def recorded_rate(self, path: Path) -> float | None: ...
    def read(self, path: Path, options: DemoOptions) -> DemoSet: ...


def _format(kind: str) -> _Format:
    """The module of a format, imported late: h5py and pyarrow take a while."""
    if kind == "hdf5":
        from sacflow_robot.data.formats import hdf5

        return hdf5
    if kind == "lerobot":
        from sacflow_robot.data.formats import lerobot

        return lerobot
    from sacflow_robot.data.formats import diffusion_policy

    return diffusion_policy


def recorded_robot(path: Path | str) -> tuple[RobotSpec | None, str | None]:
    """The robot that a source was recorded with, and robosuite's name of its task; None where it does not say.

    Raises:
        DataError: It cannot be read.
    """
    kind = kind_of(path)
    return (EpisodeLog.open(path).robot, None) if kind == "zarr" else _format(kind).recorded_robot(Path(path))


def demo_spec(path: Path | str, rate_hz: float | None = None) -> RobotSpec:
    """The robot and task that a source is of: as it was recorded with, else as the source's own features describe it.

    Args:
        path: The source.
        rate_hz: Control rate, where the source does not say it.

    Raises:
        DataError: It cannot be read, or has no actions or observations that can be used.
        UsageError: Neither it nor ``rate_hz`` says the control rate.
    """
    recorded, _ = recorded_robot(path)
    return recorded or _format(kind_of(path)).infer_robot(Path(path), rate_hz)


def common_robot(paths: Sequence[Path | str], rate_hz: float | None = None) -> RobotSpec:
    """The robot that several sources are of, without its last actions among its observations.

    It is the one that a source was recorded with, else the one that their features describe; then its actions have the
    bounds of all of them.

    Args:
        paths: Demonstrations and logs.
        rate_hz: Control rate, where a source does not say it.

    Raises:
        UsageError: None says which it is, or at which rate.
        DataError: One cannot be read.
    """
    if not paths:
        raise UsageError(
            "nothing says which robot to learn for; without an environment, --demos or --replay names what it is recorded in"
        )
    recorded = next((robot for path in paths if (robot := recorded_robot(path)[0]) is not None), None)
    if recorded is not None:
        return without_history(recorded)
    first, *others = (demo_spec(path, rate_hz) for path in paths)
    return with_bounds_of(first, others)


def with_recorded_history(options: DemoOptions, path: Path | str) -> DemoOptions:
    """The options for a source whose observations hold as many of the last actions as were recorded."""
    robot, _ = recorded_robot(path)
    return replace(options, robot=robot_with_history(options.robot, 0 if robot is None else history_of(robot)))


def can_infer(path: Path | str) -> bool:
    """Return True if a source holds observations; raw robosuite files hold states, of which the task's simulator makes some.

    Raises:
        DataError: It cannot be read.
    """
    kind = kind_of(path)
    return kind == "zarr" or _format(kind).has_observations(Path(path))


def says_rate(path: Path | str) -> bool:
    """Return True if a source says its control rate; UMI's stores, for one, do not.

    Raises:
        DataError: It cannot be read.
    """
    return recorded_robot(path)[0] is not None or _format(kind_of(path)).recorded_rate(Path(path)) is not None


def read_demos(path: Path | str, options: DemoOptions) -> DemoSet:
    """Read everything at ``path``, or the subset of it that the options name.

    Raises:
        DataError: Nothing is there, or it cannot be read, contradicts itself, or is empty.
        SpecMismatchError: It does not agree with the robot and task, and no option resolves that.
        UnknownNameError: It has no such subset.
    """
    kind = kind_of(path)
    demos = _read_log(path, options) if kind == "zarr" else _format(kind).read(Path(path), options)
    if not demos.episodes:
        raise DataError(f"{path} holds no episodes")
    if options.agreement.filter_key is not None:
        demos = _subset(path, demos, options.agreement.filter_key)
    _check_times(path, demos.episodes, demos.robot.control_rate_hz)
    if disagreement := gripper_disagreement(demos.episodes, demos.robot):
        demos.losses.remark(disagreement)
    return demos


def load_demos(path: Path | str, options: DemoOptions) -> DemoSet:
    """The demonstrations at ``path`` to learn from: each ends where its task is first solved; see :func:`read_demos`."""
    demos = read_demos(path, options)
    episodes = [end_at_success(episode) for episode in demos.episodes]
    if options.sparse_rewards:
        episodes = [_with_sparse_rewards(episode, demos.losses) for episode in episodes]
    return replace(demos, episodes=episodes)


def load_episodes(path: Path | str, options: DemoOptions) -> list[Episode]:
    """The episodes of :func:`load_demos`."""
    return load_demos(path, options).episodes


def _check_times(path: Path | str, episodes: Sequence[Episode], rate_hz: float) -> None:
    """Refuse times that are not those of the control rate; of a robot in lockstep only those that do not increase."""
    for paced, nominal_hz in (True, rate_hz), (False, None):
        check_log_times(str(path), [e.time_ns for e in episodes if e.paced == paced], nominal_hz)


def _with_sparse_rewards(episode: Episode, losses: Losses) -> Episode:
    """The episode with the task's rewards of 1 where solved, else 0, where whatever wrote it kept others."""
    if np.isin(episode.rewards, (0, 1)).all():
        return episode
    losses.remark("rewards other than 0 and 1 become 1 where the episode says that it was solved, else 0")
    return replace(episode, rewards=(episode.terminated & episode.success).astype(np.float32))


def _subset(path: Path | str, demos: DemoSet, key: str) -> DemoSet:
    """The demonstrations of a named subset, in the file's order."""
    if not demos.masks:
        raise DataError(f"{path} names no subsets; leave out --filter-key {key}")
    if key not in demos.masks:
        raise UnknownNameError(f"subset of {path}", key, demos.masks)
    chosen = sorted(set(demos.masks[key]))
    if not chosen:
        raise DataError(f"{path}: its subset {key!r} is empty; give another --filter-key")
    place = {i: new for new, i in enumerate(chosen)}
    return replace(
        demos,
        episodes=[demos.episodes[i] for i in chosen],
        masks={name: [place[i] for i in members if i in place] for name, members in demos.masks.items()},
        model_files=[demos.model_files[i] for i in chosen] if demos.model_files else [],
    )


def _read_log(path: Path | str, options: DemoOptions) -> DemoSet:
    log = EpisodeLog.open(path)
    claims = check_robot(str(path), log.robot, options.robot, options.agreement)
    losses = _unread(log)
    about = log.attributes.get(LOG_ABOUT)
    recorded = list(log.episodes())
    _check_times(path, recorded, log.robot.control_rate_hz)
    return DemoSet(
        robot=options.robot,
        episodes=[adapt(episode, claims, options.robot, options.agreement, losses) for episode in recorded],
        losses=losses,
        **(json.loads(about) if isinstance(about, str) else {}),
    )


def _unread(log: EpisodeLog) -> Losses:
    """Columns beside those of an episode, which other programs may keep in a log."""
    known = {a.key for a in log.robot.observations} | {"time_ns", "state"} | STEP_COLUMNS.keys() | FILLS.keys()
    losses = Losses()
    losses.leave_out(*(name for name in log.arrays("data") if name.removeprefix("data/") not in known))
    return losses
