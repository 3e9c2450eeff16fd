"""How an arm is kept where it is: by deltas of nothing, and by absolute goals where deoxys knows them."""

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from sacflow_robot.errors import RobotError
from sacflow_robot.robot.drivers.deoxys.config import DeoxysConfig
from sacflow_robot.robot.drivers.deoxys.driver import DeoxysRobot
from sacflow_robot.robot.drivers.deoxys.objects import Sighting
from sacflow_robot.robot.drivers.deoxys.twin import FrankaTwin
from tests.robot.drivers.waiting import eventually, in_s

from .bare_arm import BareArm  # isort: skip

pytestmark = pytest.mark.realtime

UP = np.array([0, 0, 1, 0, 0, 0, 0], np.float32)
STAY = np.zeros(7, np.float32)
STILL = (True, [0.0] * 6)


def cube() -> Sighting:
    return Sighting({"cube": np.array([0.5, 0, 0, 0, 0, 0, 1.0])}, time.monotonic_ns())


@pytest.fixture
def robot(config: DeoxysConfig, bare_arm: BareArm) -> Iterator[DeoxysRobot]:
    made = DeoxysRobot(replace(config, objects="", reset="", absolute_hold=True), cube)
    made.connect()
    made.begin(0)
    yield made
    made.close()


def goals(arm: BareArm, seconds: float) -> list[tuple[bool, list[float]]]:
    began = time.monotonic()
    time.sleep(seconds)
    return arm.goals(began)


def last(arm: BareArm) -> tuple[bool, list[float]]:
    return [STILL, *arm.goals()][-1]


def test_without_the_setting_no_absolute_goal_is_ever_sent(config: DeoxysConfig, bare_arm: BareArm) -> None:
    """deoxys before August 2023 would add its position to the current one: half a meter, for a place half a meter away."""
    robot = DeoxysRobot(replace(config, objects="", reset=""), cube)
    robot.connect()
    robot.begin(0)
    for action in (UP, STAY):
        robot.command(action, in_s(0.05))
        time.sleep(0.4)
    robot.hold()
    time.sleep(0.4)
    robot.close()
    sent = bare_arm.goals()
    assert len(sent) > 15 and all(is_delta for is_delta, _ in sent)


@pytest.mark.parametrize("how", ["hold", "run out", "told to stay"])
def test_it_brakes_and_then_stays_where_it_stands(robot: DeoxysRobot, bare_arm: BareArm, how: str) -> None:
    robot.command(UP, in_s(0.05))
    began = time.monotonic()
    if how == "hold":
        robot.hold()
    if how == "told to stay":
        for _ in range(2):
            time.sleep(0.05)
            robot.command(STAY, in_s(10))
    bare_arm.position = np.array([0.5, 0.0, 0.45])  # it coasts to there
    time.sleep(0.05)
    while time.monotonic() < began + 0.45:
        time.sleep(0.05)
        if how == "told to stay":
            robot.command(STAY, in_s(10))
    sent = [goal for goal in bare_arm.goals(began + 0.02) if goal[1][2] != 0.05]
    braking = [goal for goal in sent if goal == STILL]
    held = sent[len(braking) :]
    assert sent[: len(braking)] == braking and 2 <= len(braking) <= 5, "0.15 s, at 20 Hz"
    assert len(held) >= 3
    for is_delta, goal in held:
        assert not is_delta and np.allclose(goal[:3], [0.5, 0.0, 0.45]), "one place"
        assert np.allclose(np.abs(goal[3:]), [np.pi, 0, 0], atol=1e-6), "the gripper looks down"
    bare_arm.position = np.array([0.5, 0.0, 0.445])
    assert all(np.allclose(goal[:3], [0.5, 0.0, 0.45]) for _, goal in goals(bare_arm, 0.3)), "though it sags"
    robot.command(UP, in_s(0.1))
    assert eventually(lambda: (True, [0, 0, 0.05, 0, 0, 0]) in bare_arm.goals(began + 0.45))
    robot.observe()


def test_an_arm_that_leaves_is_let_go_and_that_is_told(robot: DeoxysRobot, bare_arm: BareArm) -> None:
    """It was pushed; or deoxys is an old one, which takes the goal for a delta, and the arm runs."""
    robot.command(UP, in_s(0.05))
    assert eventually(lambda: not last(bare_arm)[0])
    left = time.monotonic()
    bare_arm.position = bare_arm.position + np.array([0.0, 0.0, 0.03])
    assert eventually(lambda: last(bare_arm) == STILL)
    assert time.monotonic() - left < 0.25
    assert all(goal == STILL for goal in goals(bare_arm, 0.5)), "it trusts no absolute goal again"
    with pytest.raises(
        RobotError, match=r"moved by 30 mm and 0.00 rad from where it was held; .*SACFLOW.ABSOLUTE_HOLD: false"
    ):
        robot.observe()
    robot.observe()
    robot.connect()
    robot.begin(0)
    robot.command(UP, in_s(0.05))
    assert eventually(lambda: not last(bare_arm)[0]), "until it is connected again"


def test_no_place_is_held_that_is_not_seen(robot: DeoxysRobot, bare_arm: BareArm) -> None:
    robot.command(UP, in_s(0.05))
    bare_arm.reading = False
    time.sleep(0.15)
    assert all(is_delta for is_delta, _ in goals(bare_arm, 0.4))


def test_under_a_load_the_hold_is_a_hold(config: DeoxysConfig, live: FrankaTwin) -> None:
    sunk = {}
    for absolute in (False, True):
        robot = DeoxysRobot(replace(config, absolute_hold=absolute))
        robot.connect()
        for seed in (0, 1):  # another place: nothing of the episode before is held on to
            start = robot.begin(seed).observation["robot0_eef_pos"]
            robot.command(np.array([0, 0, 0.2, 0, 0, 0, 0], np.float32), in_s(0.05))
            time.sleep(0.4)
            assert np.abs(robot.observe().observation["robot0_eef_pos"] - start).max() < 0.03
        live.plant._data.xfrc_applied[live.plant._hand, 2] = -5.0
        time.sleep(0.4)
        before = robot.observe().observation["robot0_eef_pos"][2]
        time.sleep(1.0)
        sunk[absolute] = before - robot.observe().observation["robot0_eef_pos"][2]
        live.plant._data.xfrc_applied[live.plant._hand, 2] = 0.0
        robot.close()
    assert sunk[False] > 4e-3 and abs(sunk[True]) < 1e-3
