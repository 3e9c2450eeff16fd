"""The twin, driven tick by tick by a client made of ZeroMQ and bytes alone."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import zmq

from sacflow_robot.robot.drivers.deoxys import messages
from sacflow_robot.robot.drivers.deoxys.config import DeoxysConfig
from sacflow_robot.robot.drivers.deoxys.messages import RobotMode
from sacflow_robot.robot.drivers.deoxys.twin import FrankaTwin
from sacflow_robot.utils.rotations import Array, matrix_to_vector, vector_to_matrix

from .test_messages import any_of, double, doubles, inside, integer  # isort: skip

IDLE = any_of(5, "FrankaDummyControllerMessage", b"") + double(6, 0.2)
STOP = integer(1, 1) + IDLE


def osc(x: float = 0.0, y: float = 0.0, z: float = 0.0, az: float = 0.0, gain: float = 150.0) -> bytes:
    goal = integer(1, 1) + double(2, x) + double(3, y) + double(4, z) + double(7, az)
    inner = inside(1, goal) + doubles(2, [gain] * 3) + doubles(3, [gain] * 3)
    return integer(2, 1) + integer(3, 2) + double(4, 0.3) + any_of(5, "FrankaOSCPoseControllerMessage", inner)


def osc_at(position: Array, vector: Array) -> bytes:
    """An absolute goal: is_delta is false, which proto3 does not send."""
    goal = b"".join(double(i, float(number)) for i, number in enumerate([*position, *vector], 2))
    inner = inside(1, goal) + doubles(2, [150.0] * 3) + doubles(3, [250.0] * 3)
    return integer(2, 1) + integer(3, 2) + double(4, 0.3) + any_of(5, "FrankaOSCPoseControllerMessage", inner)


def gripper(name: str, *numbers: float) -> bytes:
    return any_of(2, name, b"".join(double(i, number) for i, number in enumerate(numbers, 1)))


class Client:
    """deoxys's side of the wire, tick by tick."""

    def __init__(self, config: DeoxysConfig, twin: FrankaTwin) -> None:
        self.twin, self.context = twin, zmq.Context()
        self.commands, self.gripper_commands = (self.context.socket(zmq.PUB) for _ in range(2))
        self.states, self.gripper_states, self.objects = (self.context.socket(zmq.SUB) for _ in range(3))
        self.commands.bind(f"tcp://{config.pc_ip}:{config.command_port}")
        self.gripper_commands.bind(f"tcp://{config.pc_ip}:{config.gripper_command_port}")
        for reader, address in (
            (self.states, f"tcp://{config.nuc_ip}:{config.state_port}"),
            (self.gripper_states, f"tcp://{config.nuc_ip}:{config.gripper_state_port}"),
            (self.objects, config.objects),
        ):
            reader.subscribe(b"")
            reader.connect(address)
        self.until(lambda: twin.commands > 0, IDLE)
        # Both gripper sockets are connected once a stop has been heard.
        twin.gripper.grasped = True
        stop = any_of(2, "FrankaGripperStopMessage", integer(1, 1))
        self.until(lambda: not twin.gripper.grasped, gripper_command=stop)

    def until(self, true: Callable[[], bool], command: bytes = b"", gripper_command: bytes = b"") -> None:
        for _ in range(500):
            if command:
                self.commands.send(command)
            if gripper_command:
                self.gripper_commands.send(gripper_command)
            time.sleep(0.01)
            self.twin.tick()
            if true():
                return
        raise AssertionError("it never came true")

    def send(self, command: bytes, ticks: int = 5, *, is_gripper: bool = False) -> None:
        """Send, see that it arrives, and let one look (five ticks) pass."""
        (self.gripper_commands if is_gripper else self.commands).send(command)
        time.sleep(0.02)
        self.ticks(ticks)

    def ticks(self, count: int) -> None:
        for _ in range(count):
            self.twin.tick()

    def drain(self, reader: Any) -> list[bytes]:
        found = []
        time.sleep(0.05)
        while reader.poll(0):
            found.append(reader.recv())
        return found

    @property
    def position(self) -> Any:
        return self.twin.plant.ee_pose()[0]

    @property
    def mode(self) -> int:
        return int(self.twin.state().robot_mode)


@pytest.fixture
def client(config: DeoxysConfig, twin: FrankaTwin) -> Iterator[Client]:
    made = Client(config, twin)
    yield made
    made.context.destroy(0)


def test_states_come_at_their_rates_and_decode(client: Client) -> None:
    for reader in (client.states, client.gripper_states, client.objects):
        client.drain(reader)
    client.ticks(100)
    states, grippers = client.drain(client.states), client.drain(client.gripper_states)
    assert (len(states), len(grippers), len(client.drain(client.objects))) == (100, 40, 100)
    first, last = (messages.parse("FrankaRobotStateMessage", data) for data in (states[0], states[-1]))
    assert last.frame - first.frame == 99 and abs(last.time.toSec - first.time.toSec - 0.99) < 1e-9
    pose = np.array(last.O_T_EE).reshape(4, 4)  # column major: the translation is the last four
    assert np.allclose(pose[3], [*client.position, 1.0]) and np.allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3))
    assert len(last.q) == len(last.dq) == 7
    assert 0 < messages.parse("FrankaGripperStateMessage", grippers[-1]).width < 0.08


def test_a_delta_goes_where_it_says_from_where_the_arm_is(client: Client) -> None:
    client.send(IDLE)
    before = client.position
    for _ in range(4):
        client.send(osc(z=0.02))
    client.ticks(30)
    moved = client.position - before
    assert client.mode == RobotMode.MOVE
    assert 0.02 < moved[2] < 0.08 and np.abs(moved[:2]).max() < 0.005


def test_a_rotation_turns_about_the_base_axes(client: Client) -> None:
    client.send(IDLE)
    before = client.twin.plant.ee_pose()[1]
    client.send(osc(az=0.3))
    client.ticks(40)
    turned = client.twin.plant.ee_pose()[1] @ before.T
    assert abs(np.arctan2(turned[1, 0], turned[0, 0]) - 0.3) < 0.06


def test_an_absolute_goal_is_a_pose_in_base(client: Client) -> None:
    client.send(IDLE)
    position, rotation = client.twin.plant.ee_pose()
    for _ in range(10):
        client.send(osc_at(position, matrix_to_vector(rotation)))
    assert np.abs(client.position - position).max() < 1e-3, "where it is, it stays"
    turn = vector_to_matrix(np.array([0.0, 0.0, 0.3]))
    there, turned = position + np.array([0.02, -0.03, 0.04]), turn @ rotation
    for _ in range(30):
        client.send(osc_at(there, matrix_to_vector(turned)))
    found, orientation = client.twin.plant.ee_pose()
    assert np.abs(found - there).max() < 2e-3
    assert np.linalg.norm(matrix_to_vector(orientation @ turned.T)) < 0.02


def test_a_load_draws_deltas_along_and_absolute_goals_not(client: Client) -> None:
    """Under 5 N, beyond what the controller knows of: the reason for absolute goals."""
    sunk: list[list[float]] = []
    for absolute in (False, True):
        client.twin._do({"reset": 0})
        client.send(IDLE)
        position, rotation = client.twin.plant.ee_pose()
        plant = client.twin.plant
        plant._data.xfrc_applied[plant._hand, 2] = -5.0
        heights: list[float] = []
        for _ in range(40):  # two seconds
            client.send(osc_at(position, matrix_to_vector(rotation)) if absolute else osc())
            heights.append(client.position[2] - position[2])
        plant._data.xfrc_applied[plant._hand, 2] = 0.0
        sunk.append(heights)
    deltas, absolutes = ((heights[19], heights[-1]) for heights in sunk)  # after one second, and after two
    assert deltas[0] < -5e-3 and deltas[1] - deltas[0] < -5e-3, "it sinks, and goes on sinking"
    assert absolutes[0] > -4e-3 and abs(absolutes[1] - absolutes[0]) < 5e-4, "it sags, and stays"


def test_a_stiffer_goal_is_reached_sooner(client: Client) -> None:
    moved = []
    for gain in (50.0, 300.0):
        client.twin._do({"reset": 0})
        client.send(IDLE)
        before = client.position
        client.send(osc(x=0.05, gain=gain), ticks=10)
        moved.append(client.position[0] - before[0])
    assert moved[1] > 1.5 * moved[0] > 0


def test_twenty_empty_looks_stop_the_arm(client: Client) -> None:
    client.send(IDLE)
    client.send(osc(x=0.05))
    client.ticks(19 * 5 - 1)
    assert client.mode == RobotMode.MOVE
    client.ticks(6)
    assert client.mode == RobotMode.IDLE
    before = client.position
    client.send(osc(x=0.05), ticks=20)
    assert client.mode == RobotMode.IDLE and np.abs(client.position - before).max() < 1e-3, (
        "not without no-control first"
    )
    assert client.twin.refused == 1
    client.send(IDLE)
    client.send(osc(x=0.05))
    assert client.mode == RobotMode.MOVE


def test_without_a_controller_nothing_is_missed(client: Client) -> None:
    client.ticks(200)
    client.send(osc(x=0.01))
    assert client.mode == RobotMode.MOVE


def test_termination_stops_at_once(client: Client) -> None:
    for _ in range(3):
        client.send(osc(x=0.05))
    client.send(STOP)
    assert client.mode == RobotMode.IDLE
    at = client.position
    client.ticks(50)
    assert np.abs(client.position - at).max() < 0.02


def test_the_newest_command_counts_and_older_ones_are_lost(client: Client) -> None:
    client.send(IDLE)
    before = client.twin.commands
    for _ in range(10):
        client.commands.send(osc(x=-0.05))
    client.send(osc(x=0.05))
    assert client.twin.commands == before + 1
    at = client.position
    client.ticks(20)
    assert client.position[0] > at[0]


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff",
        integer(2, 6) + any_of(5, "FrankaDummyControllerMessage", b""),
        integer(2, 1),
        integer(2, 1) + any_of(5, "FrankaGripperStopMessage", b""),
        osc(x=float("nan")),
        osc(gain=-1.0),
        integer(2, 1) + any_of(5, "FrankaOSCPoseControllerMessage", doubles(2, [1.0])),
    ],
)
def test_what_is_no_command_moves_nothing(client: Client, data: bytes) -> None:
    client.send(IDLE)
    before = client.position
    client.send(data)
    client.ticks(10)
    assert client.twin.refused == 1
    assert np.abs(client.position - before).max() < 1e-3


def test_the_gripper_moves_at_its_speed_and_finishes_first(client: Client) -> None:
    width = client.twin.plant.finger_width
    begun = width()
    client.send(gripper("FrankaGripperMoveMessage", 0.08, 0.05), ticks=20, is_gripper=True)
    assert 0.003 < width() - begun < 0.015, "0.2 s at 0.05 m/s"
    client.send(gripper("FrankaGripperGraspMessage", -0.01, 0.5, 30.0), ticks=30, is_gripper=True)
    assert width() > begun + 0.015, "it opens on"
    client.ticks(120)
    assert width() < 0.005, "and then closes, on nothing"
    assert client.twin.gripper_state().is_grasped, "as libfranka sees it with deoxys's tolerances"
    client.send(gripper("FrankaGripperMoveMessage", 0.08, 0.1), ticks=120, is_gripper=True)
    client.send(gripper("FrankaGripperGraspMessage", 0.05, 0.5, 30.0, 0.005, 0.005), ticks=60, is_gripper=True)
    assert client.twin.gripper_state().is_grasped and abs(width() - 0.05) < 0.005
    client.send(gripper("FrankaGripperMoveMessage", 0.08, 0.1), ticks=120, is_gripper=True)
    assert not client.twin.gripper_state().is_grasped


def test_faults_are_made_and_mended(client: Client) -> None:
    client.send(osc(x=0.01))
    assert client.twin._do({"fault": "cartesian_reflex"})["frame"] > 0
    state = client.twin.state()
    assert state.robot_mode == RobotMode.REFLEX and messages.error_names(state.current_errors) == ["cartesian_reflex"]
    client.send(osc(x=0.05))
    assert client.mode == RobotMode.REFLEX
    client.twin._do({"recover": True})
    assert client.mode == RobotMode.IDLE and not messages.error_names(client.twin.state().current_errors)
