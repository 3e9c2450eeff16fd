"""Object poses from a source: a camera's tracker in a real cell, the twin in a simulated one.

A source publishes JSON on a ZeroMQ PUB socket, or is a function of ours to call:

    {"poses": {"cube": [x, y, z, qx, qy, qz, qw]}, "solved": false}

Positions in meters and orientations as unit quaternions x y z w, in the frame of the arm's base. ``solved``, whether the
task is done, is for sources that can tell; without it a person labels episodes. The poses count as captured when they
arrive, or ``"age_s"`` before, where the source says how old they were when it sent them.

A source that counts its frames (``"frame"``) lets a tracker that hangs be told from objects at rest: poses of a frame that was
seen before are as old as they were.
"""

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.errors import UsageError, WireError, one_line

Pose = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sighting:
    """Objects as last seen.

    Attributes:
        poses: Per object (7,): position (m) and unit quaternion x y z w, in the arm's base frame.
        time_ns: When they were captured, in nanoseconds of the monotonic clock.
        solved: Whether the task is done, where the source can tell.
        frame: Counter of the source's images, where it has one; else -1. Without one, a source that stamps what it saw long ago
            with the present time cannot be told from one that sees objects at rest.
    """

    poses: Mapping[str, Pose]
    time_ns: int
    solved: bool | None = None
    frame: int = -1


ObjectSource = Callable[[], Sighting]
"""A function that ``SACFLOW.OBJECTS: module:function`` names: returns the newest sighting, without waiting."""

# A source's estimate of its camera's delay may be off by as much; another clock is off by far more.
_FUTURE_NS = 50_000_000
_PAUSE_S = 0.005


def checked(sighting: Sighting, now_ns: int) -> Sighting:
    """Validate a sighting and return a copy.

    Raises:
        ValueError: It contains NaN, infinity or an invalid quaternion, or its time lies in the future.
        TypeError: It is not a :class:`Sighting`.
    """
    if not isinstance(sighting, Sighting):
        raise TypeError(f"a {type(sighting).__name__} where a Sighting is expected")
    poses = {str(name): np.array(pose, np.float64) for name, pose in sighting.poses.items()}
    for name, pose in poses.items():
        if pose.shape != (7,) or not np.isfinite(pose).all():
            raise ValueError(f"the pose of {name!r} is not seven finite numbers")
        if not 0.99 < float(np.linalg.norm(pose[3:])) < 1.01:
            raise ValueError(f"the orientation of {name!r} is not a unit quaternion")
    if sighting.time_ns > now_ns + _FUTURE_NS:
        raise ValueError(
            f"a capture time {(sighting.time_ns - now_ns) / 1e9:.3g} s in the future; expected time.monotonic_ns()"
        )
    solved = None if sighting.solved is None else bool(sighting.solved)
    return Sighting(poses, int(sighting.time_ns), solved, int(sighting.frame))


def parse_sighting(data: bytes, received_ns: int) -> Sighting:
    """Decode a published sighting.

    Raises:
        WireError: It does not have the form above, or contains NaN, infinity or an invalid quaternion.
    """
    try:
        message: dict[str, Any] = json.loads(data)
        age_s = float(message.get("age_s", 0.0))
        if not math.isfinite(age_s) or age_s < 0:
            raise ValueError(f"age_s is {age_s}")
        time_ns, frame = received_ns - round(age_s * 1e9), int(message.get("frame", -1))
        return checked(Sighting(message["poses"], time_ns, message.get("solved"), frame), received_ns)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise WireError(f"object poses cannot be read: {one_line(error)}") from None


class SourceReader:
    """Calls an object source on a thread of its own, so that one that raises, hangs or exits holds nothing else up.

    Args:
        take: Gets each sighting; may raise what is wrong with it.
    """

    def __init__(self, source: ObjectSource, take: Callable[[Sighting], None], complain: Callable[[str], None]) -> None:
        self._source, self._take, self._complain = source, take, complain
        self._called_ns = time.monotonic_ns()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._live, name="object source", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting_s(self) -> float:
        """Time since the last call of the source (s)."""
        return (time.monotonic_ns() - self._called_ns) / 1e9

    def close(self) -> None:
        """End the thread. One that hangs in the source is left to itself; it holds nothing of ours."""
        self._closing.set()
        self._thread.join(1.0)

    def _live(self) -> None:
        while not self._closing.is_set():
            self._called_ns = time.monotonic_ns()
            try:
                self._take(self._source())
            except BaseException as error:  # somebody else's code: it may even ask for the program's end
                self._complain(f"the object source failed: {type(error).__name__}: {one_line(error)}")
            self._closing.wait(_PAUSE_S)


def load_source(name: str) -> ObjectSource:
    """The function that ``module:function`` names.

    Raises:
        UsageError: It cannot be imported.
    """
    module, _, function = name.partition(":")
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)  # last, so that it hides nothing that is installed
    try:
        source: ObjectSource = getattr(import_module(module), function)
    except Exception as error:  # somebody else's module may raise whatever it likes
        raise UsageError(
            f"SACFLOW.OBJECTS is {name!r}, which cannot be loaded ({one_line(error)}); expected an address such as "
            "tcp://127.0.0.1:5559, or module:function"
        ) from None
    return source


def publish_form(poses: Mapping[str, Pose], *, solved: bool | None = None, frame: int = -1) -> bytes:
    message = {"poses": {name: pose.tolist() for name, pose in poses.items()}, "frame": frame}
    return json.dumps(message if solved is None else {**message, "solved": solved}).encode()
