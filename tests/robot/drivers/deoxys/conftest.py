"""A twin that lives in the background, an arm without a simulator, and their configuration."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from sacflow_robot.envs.panda_plant import PandaPlant
from sacflow_robot.robot.drivers.deoxys.config import DeoxysConfig, load_config
from sacflow_robot.robot.drivers.deoxys.driver import DeoxysRobot
from sacflow_robot.robot.drivers.deoxys.twin import FrankaTwin

from .bare_arm import BareArm, Source  # isort: skip

SHIPPED = Path(__file__).parents[4] / "launch" / "deoxys_twin.yml"


@pytest.fixture
def config() -> DeoxysConfig:
    """The shipped configuration on free ports."""
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(6)]
    ports = [one.getsockname()[1] for one in taken]
    for one in taken:
        one.close()
    return replace(
        load_config(SHIPPED),
        command_port=ports[0],
        state_port=ports[1],
        gripper_command_port=ports[2],
        gripper_state_port=ports[3],
        objects=f"tcp://127.0.0.1:{ports[4]}",
        reset=f"tcp://127.0.0.1:{ports[5]}",
    )


@pytest.fixture(scope="session")
def plant() -> Iterator[PandaPlant]:
    """What all twins move: it takes a second to build, and an instant to reset."""
    made = PandaPlant("lift")
    yield made
    made.close()


@pytest.fixture
def twin(config: DeoxysConfig, plant: PandaPlant, monkeypatch: pytest.MonkeyPatch) -> Iterator[FrankaTwin]:
    """A twin that nobody drives forward; ``live`` does."""
    plant.begin(0)
    plant.set_stiffness(np.full(3, 150.0), np.full(3, 150.0))
    monkeypatch.setattr("sacflow_robot.robot.drivers.deoxys.twin.PandaPlant", lambda task: plant)
    monkeypatch.setattr(plant, "close", lambda: None)
    made = FrankaTwin(config)
    yield made
    made.close()


@pytest.fixture
def live(twin: FrankaTwin) -> Iterator[FrankaTwin]:
    """A twin living at its own rate."""
    thread = threading.Thread(target=twin.run)
    thread.start()
    yield twin
    twin.stop()
    thread.join()


@pytest.fixture
def ask(config: DeoxysConfig) -> Callable[..., dict[str, Any]]:
    """What only a twin can be asked."""

    def asked(**what: Any) -> dict[str, Any]:
        with zmq.Context() as context, context.socket(zmq.REQ) as side:
            side.setsockopt(zmq.LINGER, 0)
            side.connect(config.reset)
            side.send(json.dumps(what).encode())
            assert side.poll(10_000)
            answer: dict[str, Any] = json.loads(side.recv())
            return answer

    return asked


@pytest.fixture
def bare_arm(config: DeoxysConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[BareArm]:
    """An arm's side that needs no simulator."""
    monkeypatch.setattr("sacflow_robot.robot.drivers.deoxys.driver._IDLE_COMMANDS", 3)
    made = BareArm(config)
    yield made
    made.close()


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def robot(config: DeoxysConfig, bare_arm: BareArm, source: Source) -> Iterator[DeoxysRobot]:
    """The driver of the bare arm; tests of another arm have their own."""
    made = DeoxysRobot(replace(config, objects="", reset=""), source)
    made.connect()
    made.begin(0)
    yield made
    source.act = lambda: None
    made.close()
