"""Demonstrations from diffusion_policy's Zarr stores, and UMI's (``.zarr.zip``, which are read where they are).

Layout: ``data/<key>`` (T_total, ...) and ``meta/episode_ends``, the exclusive end of each episode. The actions are
``data/action``; UMI keeps none and takes the robot's poses and gripper widths for them, as is done here. All other arrays
of low dimension are observations except those that judge or number the steps. Images are left out, whatever their codec.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count, pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from sacflow_robot.data.formats.agreement import Claims, check_agreement
from sacflow_robot.data.formats.checks import capture_times, check_frames
from sacflow_robot.data.formats.demonstrations import DemoOptions, DemoSet, Description, Losses
from sacflow_robot.data.formats.foreign_episodes import ForeignEpisode, Recorded, make_episodes
from sacflow_robot.data.formats.inferred_spec import UNKNOWN, infer_spec, observation_key
from sacflow_robot.data.log.columns import UNREADABLE
from sacflow_robot.errors import DataError, one_line
from sacflow_robot.spec import FloatArray, RobotSpec

_ENDS = "meta/episode_ends"
_METADATA = (".zarray", "zarr.json")
_NO_OBSERVATIONS = {"action", "timestamp", "stage", "reward", "rewards", "done", "dones", "terminated", "truncated"}
_UMI_GOALS = ("_demo_start_pose", "_demo_end_pose")  # where an episode begins and ends, of use to UMI's training only
_UMI_ACTION = {"eef_pos": "m", "eef_rot_axis_angle": "rad", "gripper_width": "m"}

_DAMAGE = (*UNREADABLE, EOFError, MemoryError, SystemError, zipfile.BadZipFile)

_SAME_RATE = 5e-4  # relative; NTSC's 59.94 Hz is not 60

_FILE_CLOCK = "timestamps of the store, from the start of the episode"


def describe(path: Path) -> Description:
    """The rate (Hz) that the timestamps of a store say, if it keeps any: no store names its robot, or its task."""
    with _open(path) as store:
        return Description(rate_hz=_recorded_rate(store))


def infer_robot(path: Path, rate_hz: float) -> RobotSpec:
    """The specification of a store's robot: its arrays are the observations, and units are unknown except UMI's."""
    with _open(path) as store:
        umi = [] if "action" in store.low_dim else store.umi_keys
        sizes = {key: int(np.prod(store.arrays[key].shape[1:])) for key in umi}
        return infer_spec(
            robot="UMI" if store.umi_keys else UNKNOWN,
            task=UNKNOWN,
            controller="EEF_POSE absolute" if umi else UNKNOWN,
            rate_hz=rate_hz,
            observations={observation_key(key): store.arrays[key].shape[1:] or (1,) for key in store.observation_keys},
            actions=[_actions(store).astype(np.float64)],
            action_names=[key if size == 1 else f"{key}_{i}" for key, size in sizes.items() for i in range(size)],
            action_units=[_UMI_ACTION[key.partition("_")[2]] for key, size in sizes.items() for _ in range(size)],
        )


def read(path: Path, options: DemoOptions) -> DemoSet:
    """Every episode of a store."""
    losses, robot = Losses(), options.robot
    with _open(path) as store:
        recorded = _recorded_rate(store)
        rate_hz = options.agreement.rate if recorded is None else recorded
        claims = Claims(rate_hz=rate_hz)
        check_agreement(str(path), claims, robot, options.agreement)
        if rate_hz is None:
            losses.remark(
                f"the store does not say its rate, which is taken to be the task's, {robot.control_rate_hz:g} Hz"
            )
            rate_hz = robot.control_rate_hz
        actions = losses.to_float32(_actions(store), "action")
        if actions.shape[1:] != (robot.action_dim,):
            raise DataError(
                f"{path}: data/action has shape {actions.shape}; task {robot.task!r} takes (T, {robot.action_dim})"
            )
        columns = {spec.key: _observation(store, spec.key, spec.shape, robot, losses) for spec in robot.observations}
        seconds = store.read("timestamp").reshape(-1) if "timestamp" in store.low_dim else None
        judged = next((store.read(key).reshape(-1) for key in ("rewards", "reward") if key in store.low_dim), None)
        has_next = "action" not in store.low_dim  # then an episode's last row is the observation after its last action
        _note_losses(store, robot, losses, has_next=has_next)
        found = []
        for number, rows in store.episodes():
            origin, steps, times = f"{path}, episode {number}", rows.stop - rows.start - has_next, None
            if not steps:
                raise DataError(f"{origin}: a single frame, of which no action can be told; leave the episode out")
            if seconds is not None:
                check_frames(seconds[rows], rate_hz, origin)
                times = capture_times(seconds[rows], rate_hz)
            observations = {key: column[rows] for key, column in columns.items()}
            if not has_next:
                observations = {key: np.concatenate([seen, seen[-1:]]) for key, seen in observations.items()}
            episode = ForeignEpisode(
                origin,
                observations,
                actions[rows][:steps],
                Recorded(rewards=None if judged is None else judged[rows][:steps].astype(np.float32)),
                columns={} if times is None else {"time_ns": times[: steps + 1]},
                info={} if times is None else {"clock": _FILE_CLOCK},
            )
            found.append(episode)
    return DemoSet(robot, make_episodes(str(path), found, claims, options, losses), losses=losses)


def _actions(store: _Store) -> npt.NDArray[Any]:
    """Actions (T_total, A). UMI's of a step are the pose and width of the next row; an episode's last row repeats its own."""
    if "action" in store.low_dim:
        actions = store.read("action")
        return actions.reshape(len(actions), -1)
    if not store.umi_keys:
        raise DataError(f"{store.path}: no data/action; it has {', '.join(store.arrays) or 'nothing'}")
    poses = np.concatenate([store.read(key).reshape(store.ends[-1], -1) for key in store.umi_keys], axis=1)
    following = np.minimum(np.arange(1, len(poses) + 1), np.repeat(store.ends, np.diff([0, *store.ends])) - 1)
    found: npt.NDArray[Any] = poses[following]
    return found


def _observation(store: _Store, key: str, shape: tuple[int, ...], robot: RobotSpec, losses: Losses) -> FloatArray:
    """An observation (T_total, *shape)."""
    name = next((name for name in (key, key.removeprefix("observation.")) if name in store.low_dim), None)
    if name is None:
        raise DataError(
            f"{store.path}: no observation {key!r}, which task {robot.task!r} needs; it has {', '.join(store.arrays)}"
        )
    rows = store.read(name)
    if (rows.shape[1:] or (1,)) != shape:
        raise DataError(f"{store.path}: data/{name} has shape {rows.shape}, expected (T, {', '.join(map(str, shape))})")
    return losses.to_float32(rows, name).reshape(len(rows), *shape)


def _note_losses(store: _Store, robot: RobotSpec, losses: Losses, *, has_next: bool) -> None:
    for key in (*store.observation_keys, *(["action"] if "action" in store.low_dim else [])):
        if absent := store.absent_chunks(key):  # zeros, which writers may leave out, or files that were lost
            losses.remark(f"{absent} chunks of {key} are not in the store and read as zeros")
    used = {*(observation_key(spec.key) for spec in robot.observations), "action", "timestamp", "reward", "rewards"}
    unused = [array for key, array in store.arrays.items() if key not in used and observation_key(key) not in used]
    losses.leave_out(*(array.key for array in unused if not array.is_image))
    if images := [f"{array.key} ({array.codec})" for array in unused if array.is_image]:
        losses.remark(f"images are left out: {', '.join(images)}")
    if has_next:
        losses.remark("there is no 'action': it is the pose and gripper width of the next frame, as UMI has it")
    else:
        losses.remark("the observation after the last action is not in the store and repeats the one before it")


def _recorded_rate(store: _Store) -> float | None:
    if "timestamp" not in store.low_dim:
        return None
    seconds = store.read("timestamp").reshape(-1).astype(np.float64)
    periods = np.concatenate([np.diff(seconds[rows]) for _, rows in store.episodes()])
    if not len(periods) or not (period := float(np.median(periods))) > 0:
        raise DataError(
            f"{store.path}: data/timestamp does not increase, so that it does not say at which rate it was recorded"
        )
    rate = 1 / period
    return float(round(rate)) if abs(rate - round(rate)) <= _SAME_RATE * rate else float(f"{rate:.4g}")


@dataclass(frozen=True)
class _Array:
    """Metadata of one array under ``data/``."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None
    codec: str

    @property
    def is_image(self) -> bool:
        return len(self.shape) > 3 or (len(self.shape) == 3 and self.dtype == np.uint8)

    @property
    def is_low_dim(self) -> bool:
        return self.dtype is not None and not self.is_image and len(self.shape) > 0


@dataclass(frozen=True)
class _Store:
    """An open store."""

    path: Path
    root: zarr.Group
    arrays: Mapping[str, _Array]  # what is under ``data/``, by key
    ends: list[int]  # exclusive end of each episode

    def read(self, key: str) -> npt.NDArray[Any]:
        try:
            return np.asarray(self.root[f"data/{key}"][:])  # type: ignore[index]
        except _DAMAGE as error:
            raise DataError(f"{self.path}: data/{key} cannot be read ({one_line(error)}); is it complete?") from None

    def absent_chunks(self, key: str) -> int:
        """Number of an array's chunks that are missing; 0 where all are."""
        array = self.root[f"data/{key}"]
        assert isinstance(array, zarr.Array)
        present = array.nchunks_initialized
        return array.nchunks - present if present else 0

    @property
    def low_dim(self) -> dict[str, _Array]:
        return {key: array for key, array in self.arrays.items() if array.is_low_dim}

    @property
    def observation_keys(self) -> list[str]:
        return [key for key in self.low_dim if key not in _NO_OBSERVATIONS and not key.endswith(_UMI_GOALS)]

    @property
    def umi_keys(self) -> list[str]:
        """Arrays that make up UMI's actions, robot by robot; empty if the store is not UMI's."""
        robots = ([f"robot{robot}_{part}" for part in _UMI_ACTION] for robot in count())
        return [key for parts in takewhile(lambda parts: self.low_dim.keys() >= set(parts), robots) for key in parts]

    def episodes(self) -> Iterator[tuple[int, slice]]:
        """Number and rows of each episode."""
        return enumerate(slice(start, end) for start, end in pairwise([0, *self.ends]))


@contextmanager
def _open(path: Path) -> Iterator[_Store]:
    """Open a folder or zip file for reading; its arrays' lengths were found to agree."""
    with ExitStack() as stack:
        try:
            root: Any = path
            if not path.is_dir():
                file = stack.enter_context(zipfile.ZipFile(path))
                prefixes = (name.partition(_ENDS)[0] for name in file.namelist() if _ENDS in name)
                root = zipfile.Path(file, next(prefixes, ""))
            if not (root / _ENDS).exists():
                raise DataError(f"{path} is not a diffusion_policy store: it has no {_ENDS}")
            described = {}
            for folder in sorted((root / "data").iterdir(), key=lambda folder: str(folder.name)):
                for document in (folder / name for name in _METADATA):
                    if document.is_file():
                        described[folder.name] = _describe(folder.name, json.loads(document.read_text()))
            storage: Any = path
            if not path.is_dir():
                storage = zarr.storage.ZipStore(path, mode="r")
                stack.callback(storage.close)
            group = zarr.open_group(storage, mode="r", path="" if path.is_dir() else root.at.rstrip("/"))
            ends = _ends(path, np.asarray(group[_ENDS][:]), described)  # type: ignore[index]
        except _DAMAGE as error:
            raise DataError(
                f"{path} cannot be read as a diffusion_policy store ({one_line(error)}); is it complete?"
            ) from None
        yield _Store(path, group, described, ends)


def _describe(key: str, metadata: Mapping[str, Any]) -> _Array:
    """One array, from metadata of Zarr format 2 or 3."""
    try:
        dtype: np.dtype[Any] | None = np.dtype(metadata.get("dtype", metadata.get("data_type")))
    except TypeError:  # strings and the like
        dtype = None
    if dtype is not None and dtype.kind not in "biuf":
        dtype = None
    codec = (metadata.get("compressor") or {}).get("id", "uncompressed")
    return _Array(key, tuple(int(n) for n in metadata["shape"]), dtype, str(codec))


def _ends(path: Path, ends: npt.NDArray[Any], arrays: Mapping[str, _Array]) -> list[int]:
    """The ends of the episodes, which increase and agree with every array's length."""
    if ends.ndim != 1 or ends.dtype.kind not in "iu":
        raise DataError(f"{path}: {_ENDS} is {ends.dtype} of shape {ends.shape}, expected integers (episodes,)")
    found = [int(end) for end in ends]
    for number, (before, end) in enumerate(pairwise([0, *found])):
        if end <= before:
            how = "holds no frames" if end == before else f"runs backwards, to {end} after {before}"
            raise DataError(f"{path}: episode {number} {how} by {_ENDS}; correct it, or leave the episode out")
    if not found:
        raise DataError(f"{path} holds no episodes: {_ENDS} is empty")
    for array in arrays.values():
        if array.shape[:1] != (found[-1],):
            rows = array.shape[0] if array.shape else "no"
            raise DataError(f"{path}: data/{array.key} has {rows} rows, {_ENDS} ends at {found[-1]}; is it complete?")
    return found
