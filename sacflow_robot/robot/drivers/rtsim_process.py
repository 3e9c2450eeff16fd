"""The process of an ``rtsim`` robot: plays its plant's events as the machine's clock reaches them."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np
import zmq

from sacflow_robot.episode import StepResult
from sacflow_robot.errors import SacflowError, one_line
from sacflow_robot.robot.drivers.options import split_name
from sacflow_robot.robot.drivers.rtsim_options import read_options

if TYPE_CHECKING:
    from sacflow_robot.robot.drivers.plant import Plant

_CATCH_UP_MS = 2
_LOOK_MS = 200  # how often to see whether the driver is still there, while nothing is to be done


def main(task: str, engine: str, port: str, options: str, parent: str) -> None:
    from sacflow_robot.robot.drivers.plant import Plant  # the simulator

    given = split_name(f"rtsim:{task}?{options}&engine={engine}")[2]
    _, chosen, made = read_options(given)
    plant = Plant(task, made, chosen)
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(f"tcp://127.0.0.1:{port}")
    socket.send(b"ready")
    try:
        _Server(plant, socket).run(int(parent))
    finally:
        context.destroy(linger=0)


class _Server:
    """Plays the plant's events and obeys the driver; reports failures of either to the driver and stands still."""

    def __init__(self, plant: Plant, socket: zmq.Socket[Any]) -> None:
        self._plant, self._socket = plant, socket
        self._episode, self._stopped, self._ended = 0, True, False
        self._told: StepResult | None = None

    def run(self, parent: int) -> None:
        """Until told to end, or the driver's process is gone."""
        while os.getppid() == parent and not self._ended:
            try:
                self._round()
            except Exception as error:
                self._fail(error)

    def _round(self) -> None:
        # What has come first: where cores are busy, a command may have waited here past the tick that it was in time for,
        # and so may the thread that takes it from the network.
        plant, socket = self._plant, self._socket
        behind = bool(self._episode) and time.monotonic_ns() - plant.next_ns > plant.options.tick_ns // 2
        while socket.poll(_CATCH_UP_MS if behind else 0) and not self._ended:
            self._take(msgpack.unpackb(socket.recv()))
        wait_ms: float = _LOOK_MS
        if self._episode:
            plant.advance(time.monotonic_ns())
            if plant.arrived is not None and plant.arrived is not self._told:
                self._told = plant.arrived
                socket.send(msgpack.packb(_message(self._told, self._episode, plant)), zmq.NOBLOCK)
            wait_ms = max(0.0, (plant.next_ns - time.monotonic_ns()) / 1e6)
        if not socket.poll(int(min(wait_ms, _LOOK_MS))) and wait_ms < 1:  # polls wake in whole milliseconds
            time.sleep(wait_ms / 1e3)

    def _take(self, message: dict[str, Any]) -> None:
        plant = self._plant
        match message["do"]:
            case "connect":
                plant.flush()
                self._stopped = False
            case "begin":
                self._episode, self._told = 0, None
                plant.begin(message["seed"], time.monotonic_ns())
                self._episode = message["episode"]
            case "command" if self._episode and not self._stopped:
                action = np.frombuffer(message["action"], np.float32)
                plant.send(action, message["until"], message["at"])
            case "hold":
                plant.flush()
            case "stop":
                self._stopped = True
                plant.flush(gripper=True)
            case "network":
                plant.network(message["down"])
            case "end":
                self._ended = True

    def _fail(self, error: Exception) -> None:
        """Time stands still from here on, for nothing can be said of the robot, until an episode begins."""
        self._episode = 0
        failure = f"{type(error).__name__}: {one_line(error)}"
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send(msgpack.packb({"failure": failure}), zmq.NOBLOCK)


def _message(seen: StepResult, episode: int, plant: Plant) -> dict[str, Any]:
    return {
        "episode": episode,
        "seen": {key: array.tobytes() for key, array in seen.observation.items()},
        "measured": b"" if seen.measured is None else seen.measured.tobytes(),
        "reward": seen.reward,
        "terminated": seen.terminated,
        "truncated": seen.truncated,
        "time_ns": seen.time_ns,
        "applied": plant.applied[-3:],
    }


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (ImportError, OSError, SacflowError) as error:
        sys.exit(f"{type(error).__name__}: {one_line(error)}")
    os._exit(0)  # nothing is left to be flushed, and taking the simulator apart takes seconds where cores are busy
