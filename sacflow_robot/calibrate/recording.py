"""Recordings to calibrate from: observations of a robot and commands to it, each with its time."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, one_line
from sacflow_robot.spec import Array, RobotSpec
from sacflow_robot.utils.atomic_files import replacing

Times = npt.NDArray[np.int64]
Values = dict[str, tuple[Array, Array]]  # value and one standard deviation of quantities, by name

LOOK_NS = 2_000_000  # an excitation run looks for a new observation this often

AHEAD_NS, LATEST_NS = 2_000_000, 1_000_000_000  # observations out of this range are by another clock than the loop's


def validity_ns(robot: RobotSpec) -> int:
    """Validity of a recorded command (ns): as in the control loop, and 0.4 s for those that take long on their way.

    A robot whose loop dies holds that much later.
    """
    return 2 * robot.period_ns + 400_000_000


@dataclass(frozen=True)
class Recording:
    """A robot's observations and commands, by the clock of the control loop (the robot's own for capture times)."""

    robot: RobotSpec
    time_ns: Times  # capture times (M,), increasing
    received_ns: Times  # when each reached the control loop (M,); -1 where nobody knows
    observations: Mapping[str, npt.NDArray[np.float32]]  # per key (M, ...)
    sent_ns: Times  # when commands were sent (N,), increasing
    valid_ns: Times  # for how long each was to be acted on (N,)
    actions: npt.NDArray[np.float32]  # the commands (N, A)

    def __post_init__(self) -> None:
        if len(self.time_ns) < 2 or len(self.sent_ns) < 2:
            raise DataError("the recording holds fewer than two observations or commands; nothing can be told from it")
        if (np.diff(self.time_ns) <= 0).any() or (np.diff(self.sent_ns) <= 0).any():
            raise DataError("the recording's times do not increase; was its clock set back, or are they of two clocks?")

    def save(self, path: Path) -> None:
        """Write it as one .npz file."""
        columns = {name: getattr(self, name) for name in ("time_ns", "received_ns", "sent_ns", "valid_ns", "actions")}
        columns |= {f"observation.{key}": rows for key, rows in self.observations.items()}
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, robot=np.array(self.robot.to_json()), **columns)

    @staticmethod
    def load(path: Path) -> "Recording":
        """Inverse of :meth:`save`.

        Raises:
            DataError: It cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
            robot = RobotSpec.from_dict(json.loads(str(found.pop("robot" if "robot" in found else "arm"))))  # 0.1: arm
            seen = {n.removeprefix("observation."): found.pop(n) for n in list(found) if n.startswith("observation.")}
            return Recording(robot, observations=seen, **found)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"recording {path} cannot be read: {one_line(error)}") from None


def of_episode(robot: RobotSpec, episode: Episode) -> Recording:
    """A logged episode as a recording.

    Raises:
        DataError: It has no times of a robot that moves on its own.
    """
    if episode.sent_ns is None or (episode.sent_ns < 0).any():
        raise DataError("the episode does not say when its actions were sent; log it with 'sacflow-robot run'")
    received = np.append(episode.received_ns, -1) if episode.received_ns is not None else np.full(len(episode) + 1, -1)
    fresh = np.append(True, np.diff(episode.time_ns) > 0)
    return Recording(
        robot,
        episode.time_ns[fresh],
        received[fresh].astype(np.int64),
        {key: rows[fresh] for key, rows in episode.observations.items()},
        episode.sent_ns,
        np.full(len(episode), validity_ns(robot), np.int64),
        episode.action,
    )


def is_other_clock(late_ns: int) -> bool:
    """True if an observation that seems to arrive so late (ns; negative: before its capture) is by another clock than the loop's."""
    return not -AHEAD_NS <= late_ns <= LATEST_NS


def bursts(recording: Recording) -> list[tuple[int, int]]:
    """First and one past the last command of each motion after a rest, with one command of the rest before it."""
    moving = (np.abs(recording.actions[:, :6]) > 1e-6).any(axis=1)
    starts = [i for i in range(1, len(moving)) if moving[i] and not moving[i - 1]]
    ends = [*starts[1:], len(moving) + 1] if starts else []
    return [(s - 1, min(e - 1, len(moving))) for s, e in zip(starts, ends, strict=True)]


def read_log(path: Path) -> list[Recording]:
    """The episodes of an episode log, or the one recording of an .npz file.

    Raises:
        DataError: It cannot be read, or no episode says when its actions were sent.
    """
    if path.suffix == ".npz":
        return [Recording.load(path)]
    from sacflow_robot.data.log.reader import EpisodeLog

    log = EpisodeLog.open(path)
    found, reason = [], "it is empty"
    for episode in log.episodes():
        try:
            found.append(of_episode(log.robot, episode))
        except DataError as error:
            reason = str(error)
    if not found:
        raise DataError(f"{path}: nothing to compare: {reason}")
    return found
