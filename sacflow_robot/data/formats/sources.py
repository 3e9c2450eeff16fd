"""Demonstrations from whatever file or folder a user names."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import zarr

from sacflow_robot.data.formats.adapt import adapt
from sacflow_robot.data.formats.agreement import check_robot
from sacflow_robot.data.formats.checks import check_log_times
from sacflow_robot.data.formats.demonstrations import (
    DemoOptions,
    DemoSet,
    Description,
    Losses,
    end_at_success,
    gripper_disagreement,
)
from sacflow_robot.data.formats.inferred_spec import with_bounds_of
from sacflow_robot.data.log import remote
from sacflow_robot.data.log.columns import LOG_DTYPES
from sacflow_robot.data.log.episode_writer import write_log
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.data.log.store import WRITING
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, LogWriteError, UnknownNameError, UsageError, one_line, reason_of
from sacflow_robot.spec import RobotSpec
from sacflow_robot.utils.action_history import history_of, robot_with_history, without_history
from sacflow_robot.utils.atomic_files import check_output, replacing

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


class Format(Protocol):
    """Functions that the module of each format offers, except for episode logs, which hold all of it themselves.

    All raise DataError for what cannot be read, or has nothing that can be used. ``write`` raises LogWriteError where it
    cannot, and there is none for diffusion_policy; ``read`` is :func:`read_demos` without what that does for every format.
    """

    def describe(self, path: Path) -> Description: ...
    def infer_robot(self, path: Path, rate_hz: float) -> RobotSpec: ...
    def read(self, path: Path, options: DemoOptions) -> DemoSet: ...
    def write(self, path: Path, demos: DemoSet) -> None: ...


def format_of(kind: str) -> Format:
    """The module of a format, imported late: h5py and pyarrow take a while."""
    return cast(Format, import_module(f"sacflow_robot.data.formats.{kind}"))


def describe(path: Path | str) -> Description:
    """What a source says of itself.

    Raises:
        DataError: It cannot be read.
    """
    kind = kind_of(path)
    return Description(EpisodeLog.open(path).robot) if kind == "zarr" else format_of(kind).describe(Path(path))


def recorded_robot(path: Path | str) -> tuple[RobotSpec | None, str | None]:
    """The robot that a source was recorded with, and robosuite's name of its task; see :func:`describe`."""
    return describe(path)[:2]


def demo_spec(path: Path | str, rate_hz: float | None = None) -> RobotSpec:
    """The robot and task that a source is of: as it was recorded with, else as the source's own features describe it.

    Raises:
        DataError: It cannot be read, or has no actions or observations that can be used.
        UsageError: Neither it nor ``rate_hz`` says the control rate.
    """
    said = describe(path)
    if said.robot is not None:
        return said.robot
    rate_hz = said.rate_hz or rate_hz
    if rate_hz is None:
        raise UsageError(f"{path} does not say at which rate it was recorded; give --rate HZ")
    try:
        return format_of(kind_of(path)).infer_robot(Path(path), rate_hz)
    except DataError as error:
        raise error if str(error).startswith(str(path)) else DataError(f"{path}: {error}") from None


def common_robot(paths: Sequence[Path | str], rate_hz: float | None = None) -> RobotSpec:
    """The robot that several sources are of, without its last actions among its observations.

    It is the one that a source was recorded with, else the one that their features describe; then its actions have the
    bounds of all of them.

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


def says_rate(path: Path | str) -> bool:
    """Return True if a source says its control rate; UMI's stores, for one, do not. See :func:`describe`."""
    said = describe(path)
    return said.robot is not None or said.rate_hz is not None


def read_demos(path: Path | str, options: DemoOptions) -> DemoSet:
    """Read everything at ``path``, or the subset of it that the options name.

    Raises:
        DataError: Nothing is there, or it cannot be read, contradicts itself, or is empty.
        SpecMismatchError: It does not agree with the robot and task, and no option resolves that.
        UnknownNameError: It has no such subset.
    """
    kind = kind_of(path)
    demos = _read_log(path, options) if kind == "zarr" else format_of(kind).read(Path(path), options)
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
    known = {a.key for a in log.robot.observations} | LOG_DTYPES.keys()
    losses = Losses()  # beside the columns of an episode, other programs may keep some in a log
    losses.leave_out(*(name for name in log.arrays("data") if name.removeprefix("data/") not in known))
    about = log.attributes.get(LOG_ABOUT)
    recorded = list(log.episodes())
    _check_times(path, recorded, log.robot.control_rate_hz)
    return DemoSet(
        robot=options.robot,
        episodes=[adapt(episode, claims, options.robot, options.agreement, losses) for episode in recorded],
        losses=losses,
        **(json.loads(about) if isinstance(about, str) else {}),
    )


def check_free(path: Path) -> None:
    """Raise UsageError if something is at the path already, or nothing can be written there."""
    if os.path.lexists(path):
        raise UsageError(f"{path} exists already; give another path or remove it")
    check_output(path, "DST")


def write_demos(path: Path, demos: DemoSet, kind: str | None = None) -> DemoSet:
    """Write demonstrations at a path where nothing is yet, as the kind that is given, or that its suffix names.

    Returns what was written, and in its ``losses`` all that reading and writing together left out.

    Raises:
        UsageError: Something is there already, or the path says no kind.
        LogWriteError: It cannot be written there; nothing is left behind.
    """
    kind = kind_to_write(path, kind)
    check_free(path)
    if kind != "hdf5" and demos.model_files:
        demos.losses.leave_out("model_file")
        demos = replace(demos, model_files=[])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            if kind == "zarr":
                _write_log(partial, demos)
            else:
                format_of(kind).write(partial, demos)
            check_free(path)
    except (OSError, LogWriteError) as error:  # the writers name the partial file, which nobody will find
        raise LogWriteError(f"cannot write {path}: {one_line(reason_of(error))}; nothing is left of it") from None
    return demos


def _write_log(path: Path, demos: DemoSet) -> None:
    having = [episode.states is not None for episode in demos.episodes]
    episodes = demos.episodes
    if any(having) and not all(having):
        demos.losses.leave_out("states (not every episode has them)")
        episodes = [replace(episode, states=None) for episode in episodes]
    write_log(path, demos.robot, episodes)
    if about := demos.about():
        zarr.open_group(path, mode="r+", zarr_format=2).attrs[LOG_ABOUT] = json.dumps(about)
