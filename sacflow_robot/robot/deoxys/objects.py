"""Where objects are, from whatever knows it: a camera's tracker in a real cell, the twin in a simulated one.

A source publishes JSON on a ZeroMQ PUB socket, or is a function of ours to call:

    {"poses": {"cube": [x, y, z, qx, qy, qz, qw]}, "solved": false}

Positions in metres and orientations as unit quaternions x y z w, in the frame of the arm's base. ``solved``, whether the
task is done, is for sources that can tell; without it a person labels episodes. The poses count as captured when they
arrive, or ``"age_s"`` before, where the source says how old they were when it sent them.
"""

from __future__ import annotations

import json
import math
import sys
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
        frame: Counter of the source, where it has one; else -1.
    """

    poses: Mapping[str, Pose]
    time_ns: int
    solved: bool | None = None
    frame: int = -1


ObjectSource = Callable[[], Sighting]
"""What ``SACFLOW.OBJECTS: module:function`` names: the newest sighting, without waiting."""


def parse_sighting(data: bytes, received_ns: int) -> Sighting:
    """Decode a published sighting.

    Raises:
        WireError: It is not of the form above, or holds NaN, infinity, or a quaternion that is none.
    """
    try:
        message: dict[str, Any] = json.loads(data)
        poses = {str(name): np.array(pose, np.float64) for name, pose in message["poses"].items()}
        age_s = float(message.get("age_s", 0.0))
        for name, pose in poses.items():
            if pose.shape != (7,) or not np.isfinite(pose).all():
                raise ValueError(f"the pose of {name!r} is not seven finite numbers")
            if not 0.99 < float(np.linalg.norm(pose[3:])) < 1.01:
                raise ValueError(f"the orientation of {name!r} is no unit quaternion")
        if not math.isfinite(age_s) or age_s < 0:
            raise ValueError(f"age_s is {age_s}")
        solved = message.get("solved")
        frame = int(message.get("frame", -1))
        return Sighting(poses, received_ns - round(age_s * 1e9), None if solved is None else bool(solved), frame)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise WireError(f"object poses cannot be read: {one_line(error)}") from None


def load_source(name: str) -> ObjectSource:
    """The function that ``module:function`` names.

    Raises:
        UsageError: There is none.
    """
    module, _, function = name.partition(":")
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)  # last, so that it hides nothing that is installed
    try:
        source: ObjectSource = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"SACFLOW.OBJECTS is {name!r}, which cannot be loaded ({one_line(error)}); expected an address such as "
            "tcp://127.0.0.1:5559, or module:function"
        ) from None
    return source


def publish_form(poses: Mapping[str, Pose], *, solved: bool | None = None, frame: int = -1) -> bytes:
    """What a source publishes."""
    message = {"poses": {name: pose.tolist() for name, pose in poses.items()}, "frame": frame}
    return json.dumps(message if solved is None else {**message, "solved": solved}).encode()
