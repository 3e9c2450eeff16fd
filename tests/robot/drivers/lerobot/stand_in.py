"""A stand-in for LeRobot's ``Robot``, whose joints go to their goals at a limited speed."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

NAMES = ("shoulder.pos", "elbow.pos", "gripper.pos")


@dataclass(kw_only=True)
class StandInConfig:
    id: str | None = None
    port: str = ""


class StandIn:
    """Has the names, and the strictness, of ``lerobot.robots.Robot``; insists on being called by one thread."""

    made: ClassVar[list[StandIn]] = []

    def __init__(self, config: StandInConfig) -> None:
        self.config, self.is_connected, self.is_calibrated = config, False, True
        self.positions = dict(zip(NAMES, (10.0, -20.0, 50.0), strict=True))
        self.sent: list[dict[str, float]] = []
        self.calibrated_on_connect: bool | None = None
        self.broken = self.stuck = self.deaf = False
        self.read_s = 0.0
        self.threads: set[int] = set()
        StandIn.made.append(self)

    observation_features: ClassVar[dict[str, Any]] = {**dict.fromkeys(NAMES, float), "wrist": (4, 6, 3)}
    action_features: ClassVar[dict[str, Any]] = dict.fromkeys(NAMES, float)

    def connect(self, calibrate: bool = True) -> None:
        if self.config.port == "/dev/absent":
            raise ConnectionError("no such port")
        self.calibrated_on_connect, self.is_connected = calibrate, True

    def get_observation(self) -> dict[str, Any]:
        self.threads.add(threading.get_ident())
        if self.broken:
            raise ConnectionError("There is no status packet!")
        while self.stuck:
            time.sleep(0.01)
        time.sleep(self.read_s)
        return {**self.positions, "wrist": np.full((4, 6, 3), 7, np.uint8)}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        self.threads.add(threading.get_ident())
        if self.deaf:
            raise ConnectionError("no answer")
        assert set(action) == set(NAMES) and all(type(v) is float for v in action.values())
        self.sent.append(dict(action))
        for name, goal in action.items():
            self.positions[name] += float(np.clip(goal - self.positions[name], -2, 2))
        return action

    def disconnect(self) -> None:
        self.is_connected = False


BOUNDS = "joints: {shoulder.pos: [-100, 100], elbow.pos: [-100, 100], gripper.pos: [0, 100]}\n"


def soon() -> int:
    return time.monotonic_ns() + 60_000_000_000
