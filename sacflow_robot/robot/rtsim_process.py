"""The process of an ``rtsim`` arm: plays its world's events as the machine's clock reaches them."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np
import zmq

from sacflow_robot.errors import SacflowError, one_line
from sacflow_robot.robot.drivers import split_name
from sacflow_robot.robot.link import read_options
from sacflow_robot.spec import StepResult

if TYPE_CHECKING:
    from sacflow_robot.robot.world import World

_CATCH_UP_MS = 2
_LOOK_MS = 200  # how often to see whether the driver is still there, while nothing is to be done


def main(task: str, engine: str, port: str, options: str, parent: str) -> None:
    from sacflow_robot.robot.world import World  # the simulator

    given = split_name(f"rtsim:{task}?{options}&engine={engine}")[2]
    _, chosen, link = read_options(given)
    world = World(task, link, chosen)
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(f"tcp://127.0.0.1:{port}")
    socket.send(b"ready")
    try:
        _serve(world, socket, int(parent))
    finally:
        context.destroy(linger=0)


def _serve(world: World, socket: zmq.Socket[Any], parent: int) -> None:
    episode, told = 0, None
    while os.getppid() == parent:
        # What has come first: where cores are busy, a command may have waited here past the tick that it was in time for,
        # and so may the thread that takes it from the network.
        behind = bool(episode) and time.monotonic_ns() - world.next_ns > world.link.tick_ns // 2
        while socket.poll(_CATCH_UP_MS if behind else 0):
            message = msgpack.unpackb(socket.recv())
            match message["do"]:
                case "begin":
                    episode, told = message["episode"], None
                    world.begin(message["seed"], time.monotonic_ns())
                case "command" if episode:
                    action = np.frombuffer(message["action"], np.float32)
                    world.send(action, message["until"], message["at"])
                case "flush":
                    world.flush()
                case "network":
                    world.network(message["down"])
                case "end":
                    return
        wait_ms: float = _LOOK_MS
        if episode:
            world.advance(time.monotonic_ns())
            if world.arrived is not None and world.arrived is not told:
                told = world.arrived
                socket.send(msgpack.packb(_message(told, episode, world)), zmq.NOBLOCK)
            wait_ms = max(0.0, (world.next_ns - time.monotonic_ns()) / 1e6)
        if not socket.poll(int(min(wait_ms, _LOOK_MS))) and wait_ms < 1:  # polls wake in whole milliseconds
            time.sleep(wait_ms / 1e3)


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
