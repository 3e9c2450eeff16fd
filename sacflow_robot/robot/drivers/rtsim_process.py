"""The process of an ``rtsim`` robot: plays its world's events as the machine's clock reaches them."""

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
from sacflow_robot.robot.drivers.registry import split_name
from sacflow_robot.robot.drivers.rtsim_options import read_options

if TYPE_CHECKING:
    from sacflow_robot.robot.drivers.plant import World

_CATCH_UP_MS = 2
_LOOK_MS = 200  # how often to see whether the driver is still there, while nothing is to be done


def main(task: str, engine: str, port: str, options: str, parent: str) -> None:
    from sacflow_robot.robot.drivers.plant import World  # the simulator

    given = split_name(f"rtsim:{task}?{options}&engine={engine}")[2]
    _, chosen, link = read_options(given)
    world = World(task, link, chosen)
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(f"tcp://127.0.0.1:{port}")
    socket.send(b"ready")
    try:
        _Server(world, socket).run(int(parent))
    finally:
        context.destroy(linger=0)


class _Server:
    """Plays the world's events, and does what the driver says; what fails in either is told to the driver, and held at."""

    def __init__(self, world: World, socket: zmq.Socket[Any]) -> None:
        self._world, self._socket = world, socket
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
        world, socket = self._world, self._socket
        behind = bool(self._episode) and time.monotonic_ns() - world.next_ns > world.link.tick_ns // 2
        while socket.poll(_CATCH_UP_MS if behind else 0) and not self._ended:
            self._take(msgpack.unpackb(socket.recv()))
        wait_ms: float = _LOOK_MS
        if self._episode:
            world.advance(time.monotonic_ns())
            if world.arrived is not None and world.arrived is not self._told:
                self._told = world.arrived
                socket.send(msgpack.packb(_message(self._told, self._episode, world)), zmq.NOBLOCK)
            wait_ms = max(0.0, (world.next_ns - time.monotonic_ns()) / 1e6)
        if not socket.poll(int(min(wait_ms, _LOOK_MS))) and wait_ms < 1:  # polls wake in whole milliseconds
            time.sleep(wait_ms / 1e3)

    def _take(self, message: dict[str, Any]) -> None:
        world = self._world
        match message["do"]:
            case "connect":
                world.flush()
                self._stopped = False
            case "begin":
                self._episode, self._told = 0, None
                world.begin(message["seed"], time.monotonic_ns())
                self._episode = message["episode"]
            case "command" if self._episode and not self._stopped:
                action = np.frombuffer(message["action"], np.float32)
                world.send(action, message["until"], message["at"])
            case "hold":
                world.flush()
            case "stop":
                self._stopped = True
                world.flush(gripper=True)
            case "network":
                world.network(message["down"])
            case "end":
                self._ended = True

    def _fail(self, error: Exception) -> None:
        """Time stands still from here on, for nothing can be said of the robot, until an episode begins."""
        self._episode = 0
        failure = f"{type(error).__name__}: {one_line(error)}"
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send(msgpack.packb({"failure": failure}), zmq.NOBLOCK)


def _message(seen: StepResult, episode: int, world: World) -> dict[str, Any]:
    return {
        "episode": episode,
        "seen": {key: array.tobytes() for key, array in seen.observation.items()},
        "measured": b"" if seen.measured is None else seen.measured.tobytes(),
        "reward": seen.reward,
        "terminated": seen.terminated,
        "truncated": seen.truncated,
        "time_ns": seen.time_ns,
        "applied": world.applied[-3:],
    }


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (ImportError, OSError, SacflowError) as error:
        sys.exit(f"{type(error).__name__}: {one_line(error)}")
    os._exit(0)  # nothing is left to be flushed, and taking the simulator apart takes seconds where cores are busy
