"""Demonstrations from diffusion_policy's Zarr stores, and UMI's (``.zarr.zip``, which are read where they are).

Layout: ``data/<key>`` (T_total, ...) and ``meta/episode_ends``, the exclusive end of each episode. The actions are
``data/action``; UMI keeps none and takes the robot's poses and gripper widths for them, as is done here. All other arrays
of low dimension are observations but for those that judge or number the steps. Images are left out, whatever their codec.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.data.formats.agreement import Claims, check_agreement
from sacflow_robot.data.formats.checks import capture_times, check_frames
from sacflow_robot.data.formats.demonstrations import DemoOptions, DemoSet, Losses
from sacflow_robot.data.formats.diffusion_policy_files import UMI_ACTION, Store, open_store
from sacflow_robot.data.formats.foreign_episodes import ForeignEpisode, make_episodes
from sacflow_robot.data.formats.inferred_spec import UNKNOWN, infer_spec, observation_key
from sacflow_robot.data.formats.outcomes import Recorded
from sacflow_robot.errors import DataError, UsageError
from sacflow_robot.spec import FloatArray, RobotSpec

_SAME_RATE = 5e-4  # relative; NTSC's 59.94 Hz is not 60

_FILE_CLOCK = "timestamps of the store, from the start of the episode"


def recorded_robot(path: Path) -> tuple[RobotSpec | None, str | None]:
    """Nothing: no store names its robot, or its task."""
    return None, None


def has_observations(path: Path) -> bool:
    """Return True: every store holds observations."""
    return True


def infer_robot(path: Path, rate_hz: float | None = None) -> RobotSpec:
    """The specification of a store's robot: its arrays are the observations, and units are unknown but for UMI's.

    Args:
        path: The store.
        rate_hz: Its rate, where it keeps no timestamps.

    Raises:
        DataError: It cannot be read, or has no actions or observations that can be used.
        UsageError: It keeps no timestamps, and no rate is given.
    """
    with open_store(path) as store:
        recorded = _recorded_rate(store)
        rate_hz = recorded if recorded is not None else rate_hz
        if rate_hz is None:
            raise UsageError(f"{path} does not say at which rate it was recorded; give --rate HZ")
        umi = [] if "action" in store.low_dim else store.umi_keys
        actions = _actions(store)
        names, units = _umi_dimensions(store, umi)
        try:
            return infer_spec(
                robot="UMI" if store.umi_keys else UNKNOWN,
                task=UNKNOWN,
                controller="EEF_POSE absolute" if umi else UNKNOWN,
                rate_hz=rate_hz,
                observations={
                    observation_key(key): store.arrays[key].shape[1:] or (1,) for key in store.observation_keys
                },
                actions=[actions.astype(np.float64)],
                action_names=names,
                action_units=units,
            )
        except DataError as error:
            raise DataError(f"{path}: {error}") from None


def recorded_rate(path: Path) -> float | None:
    """The rate (Hz) that the timestamps of a store say; None where it keeps none.

    Raises:
        DataError: It cannot be read.
    """
    with open_store(path) as store:
        return _recorded_rate(store)


def read(path: Path, options: DemoOptions) -> DemoSet:
    """Every episode of a store.

    Raises:
        DataError: It cannot be read, or lacks what the task needs.
    """
    losses, robot = Losses(), options.robot
    with open_store(path) as store:
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
        seconds = store.read("timestamp") if "timestamp" in store.low_dim else None
        judged = next((store.read(key) for key in ("rewards", "reward") if key in store.low_dim), None)
        has_next = "action" not in store.low_dim
        _note_losses(store, robot, losses, has_next=has_next)
        found = []
        for number, rows in store.episodes():
            found.append(
                _episode(
                    f"{path}, episode {number}",
                    {key: column[rows] for key, column in columns.items()},
                    actions[rows],
                    rate_hz,
                    seconds=None if seconds is None else seconds[rows].reshape(-1),
                    rewards=None if judged is None else judged[rows].reshape(-1).astype(np.float32),
                    has_next=has_next,
                )
            )
    return DemoSet(robot, make_episodes(str(path), found, claims, options, losses), losses=losses)


def _episode(
    origin: str,
    observations: dict[str, FloatArray],
    actions: FloatArray,
    rate_hz: float,
    *,
    seconds: npt.NDArray[Any] | None,
    rewards: FloatArray | None,
    has_next: bool,
) -> ForeignEpisode:
    """One episode of a store, of which T rows are given.

    Args:
        origin: Names it in messages.
        observations: Per key (T, ...).
        actions: (T, A); without the last one if ``has_next``.
        rate_hz: Of the store.
        seconds: Timestamps (T,), s.
        rewards: (T,).
        has_next: Whether the last row is the observation after the last action; otherwise that is not known.
    """
    recorded: dict[str, Any] = {}
    if seconds is not None:
        check_frames(seconds, rate_hz, origin)
        times = capture_times(seconds, rate_hz)
        recorded = {} if times is None else {"time_ns": times[:-1] if has_next else times}
    if has_next:
        actions = actions[:-1]
        if not len(actions):
            raise DataError(f"{origin}: a single frame, of which no action can be told; leave the episode out")
    else:
        observations = {key: np.concatenate([rows, rows[-1:]]) for key, rows in observations.items()}
    return ForeignEpisode(
        origin,
        observations,
        actions,
        Recorded(rewards=None if rewards is None else rewards[: len(actions)]),
        columns=recorded,
        info={"clock": _FILE_CLOCK} if recorded else {},
    )


def _actions(store: Store) -> npt.NDArray[Any]:
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


def _umi_dimensions(store: Store, keys: list[str]) -> tuple[list[str], list[str]]:
    """Names and units of the dimensions of UMI's actions."""
    names, units = [], []
    for key in keys:
        size = int(np.prod(store.arrays[key].shape[1:]))
        names += [key if size == 1 else f"{key}_{i}" for i in range(size)]
        units += [UMI_ACTION[key.partition("_")[2]]] * size
    return names, units


def _observation(store: Store, key: str, shape: tuple[int, ...], robot: RobotSpec, losses: Losses) -> FloatArray:
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


def _note_losses(store: Store, robot: RobotSpec, losses: Losses, *, has_next: bool) -> None:
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


def _recorded_rate(store: Store) -> float | None:
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
