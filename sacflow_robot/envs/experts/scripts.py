"""One script per task: the motions of an attempt. Each returns True if the attempt worked.

Where a task can be done in two ways, ``hand.first_way`` selects the one that an episode shows.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from sacflow_robot.envs.experts.primitives import CLOSE, OPEN, Goal, Hand, Motion, Vector, nearest_yaw, up, yaw_of

_PEG = np.array([0.23, 0.10])  # robosuite's PegsArena: the square peg, x and y (m, world)
_PEG_TOP = 0.95
_CAN_BIN = np.array([0.1975, 0.4025])  # robosuite's PickPlace: middle of the can's compartment
_WALLS = 0.90  # top of the bins' walls
_HANDLE = 0.062  # from the nut's center to the free part of its handle (m)
_YAWS = (-1.6, 3.0)  # that the Panda's last joint allows with the gripper pointing down (rad)
_LEVER_IN_DOOR = (-0.05, -0.10)  # end of the closed door's lever in the frame of its panel, x and y (m)
_LEVER = 0.125  # from the lever's joint to its end (m)
_UNLATCHED = 1.15  # turn of the lever that frees the door (rad)
_CAN_YAW = 0.5  # to either side (rad)
_UNEQUAL = 1.0  # of two ways to turn, one that is longer by more than this (rad) is never chosen
_CARELESS = 0.85
_QUARTER, _HALF = np.pi / 2, np.pi


def lift(hand: Hand) -> Motion:
    """Grasp the cube by two of its faces and raise it."""
    yaw = nearest_yaw(yaw_of(hand.objects[3:7]), hand.yaw, _QUARTER)
    if not (yield from hand.grasp(lambda: hand.objects[:3], hand.aim(0.023, 0.023, 0.016), yaw)):
        return False
    while hand.holds and hand.position[2] - hand.objects[2] < 0.06:
        yield Goal(hand.objects[:3] + up(0.12), CLOSE)
    return False


def stack(hand: Hand) -> Motion:
    """Put cube A on cube B. Two ways, where both are about as far to turn: one pair of A's faces, or the other."""

    def cube_a() -> Vector:
        return hand.objects[:3]

    def cube_b() -> Vector:
        return hand.objects[7:10]

    near = nearest_yaw(yaw_of(hand.objects[3:7]), hand.yaw, _QUARTER)
    other = near + (_QUARTER if near < 0 else -_QUARTER)
    chosen = near if hand.first_way or abs(other) - abs(near) > _UNEQUAL else other
    apart = (cube_b() - cube_a())[:2]
    if np.linalg.norm(apart) < 0.09:
        chosen = min((near, other), key=lambda yaw: abs(apart @ [-np.sin(yaw), np.cos(yaw)]))
    if not (yield from hand.grasp(cube_a, hand.aim(0.019, 0.019, 0.014), chosen)):
        return False
    held, miss, high = cube_a() - hand.position, hand.aim(0.015, 0.015, 0.0), hand.position + up(0.08)
    return (
        (yield from hand.carry(lambda: high, within=0.025, limit=25))
        and (yield from hand.carry(lambda: cube_b() - held + miss + up(0.10), within=0.02, limit=60))
        and (yield from hand.carry(lambda: cube_b() - held + miss + up(0.048), within=0.008, limit=30, steadiness=0.7))
        and (yield from hand.release())
    )


def can(hand: Hand) -> Motion:
    """Put the can into its compartment. Two ways: the fingers to one side of it, or to the other."""
    yaw = _CAN_YAW if hand.first_way else -_CAN_YAW
    if not (yield from hand.grasp(lambda: hand.objects[7:10], hand.aim(0.009, 0.009, 0.008), yaw, clearance=0.07)):
        return False
    high = np.array([*hand.position[:2], _WALLS + 0.13])
    over = np.array([*_CAN_BIN, _WALLS + 0.14]) + hand.aim(0.02, 0.02, 0.01)
    low = np.array([*over[:2], _WALLS + 0.01])
    return (
        (yield from hand.carry(lambda: high, within=0.04, limit=40))
        and (yield from hand.carry(lambda: over, within=0.04, limit=80, yaw=yaw))
        and (yield from hand.carry(lambda: low, within=0.03, limit=30, yaw=yaw))
        and (yield from hand.release())
    )


def square(hand: Hand) -> Motion:
    """Put the nut over the peg. Two ways: the hand turned one way round to the nut's handle, or the other."""

    def nut() -> Vector:
        return hand.objects[7:10]

    def nut_yaw() -> float:
        return yaw_of(hand.objects[10:14])

    def handle() -> Vector:
        return nut() + _HANDLE * np.array([np.cos(nut_yaw()), np.sin(nut_yaw()), 0.0])

    if hand.style.carelessness < _CARELESS:  # only the most careless do not grasp across the handle
        hand.style = replace(hand.style, aligns=True)
    yaw, turn = _plan_turn(nut_yaw(), hand.first_way)
    if not (yield from hand.grasp(handle, hand.aim(0.009, 0.009, 0.006), yaw, clearance=0.02, within=0.015)):
        return False
    high, miss = np.array([*hand.position[:2], _PEG_TOP + 0.09]), hand.aim(0.004, 0.004, 0.0)
    if not (yield from hand.carry(lambda: high, within=0.03, limit=40, yaw=yaw)):
        return False
    final = hand.yaw + turn - nearest_yaw(nut_yaw() + turn, 0.0, _QUARTER)  # less what it slipped in the hand

    def over_peg(height: float) -> Callable[[], Vector]:
        return lambda: hand.position + np.append(_PEG, height) - nut() + miss

    return (
        (yield from hand.carry(over_peg(_PEG_TOP + 0.06), within=0.02, limit=90, yaw=final))
        and (yield from hand.carry(over_peg(_PEG_TOP + 0.03), within=0.005, limit=30, yaw=final, steadiness=0.8))
        and (yield from hand.carry(over_peg(_PEG_TOP - 0.04), within=0.012, limit=30, yaw=final, steadiness=0.8))
        and (yield from hand.release())
    )


def _plan_turn(nut_yaw: float, first_way: bool) -> tuple[float, float]:
    """Yaw to grasp the nut's handle with, and by how much to turn it then (rad).

    Of the four ways the nut fits the peg, the one with the handle pointing away from the robot is out of its reach. The
    first way is the shortest; the second one takes the handle with the fingers the other way round, where that is about
    as far to turn.
    """
    plans: list[tuple[float, float, float]] = []
    for grasp in (nut_yaw + k * _HALF for k in (-2, -1, 0, 1, 2)):
        for target in (_QUARTER, _HALF, -_QUARTER):
            turn = nearest_yaw(target, nut_yaw, 2 * _HALF) - nut_yaw
            if _YAWS[0] < grasp < _YAWS[1] and _YAWS[0] < grasp + turn < _YAWS[1]:
                plans.append((abs(grasp) + abs(turn), grasp, turn))
    plans.sort()
    _, grasp, turn = plans[0]
    others = [plan for plan in plans if abs(plan[1] - grasp) > 1.0 and plan[0] - plans[0][0] < _UNEQUAL]
    if not first_way and others:
        _, grasp, turn = others[0]
    return grasp, turn


def door(hand: Hand) -> Motion:
    """Press the handle down and pull the door open. Two ways: holding the lever, or with open fingers around it."""

    def lever_end() -> Vector:
        return hand.objects[3:6]

    offset = lever_end() - hand.objects[:3]
    heading = np.arctan2(offset[1], offset[0]) - np.arctan2(*_LEVER_IN_DOOR[1::-1])
    along = np.array([np.cos(heading), np.sin(heading), 0.0])  # from the lever's joint to its end
    outwards = np.array([np.sin(heading), -np.cos(heading), 0.0])
    yaw = nearest_yaw(heading, 0.0, _HALF)
    joint, down = lever_end() - _LEVER * along, up(-1.0)
    gripper = CLOSE if hand.first_way else OPEN

    def on_lever(angle: float) -> Vector:
        """Grasp of the lever turned by that angle; off its middle, because the hand is wider than the gap."""
        held: Vector = joint + 0.10 * (np.cos(angle) * along + np.sin(angle) * down) + 0.02 * outwards
        return held

    miss = hand.aim(0.009, 0.009, 0.007)
    hasty = abs(miss[2]) / 0.01  # a bad aim goes with pulling too early, which lets the lever rise again
    above = on_lever(0) + up(0.05 + hand.style.hover)
    yield from hand.move(lambda: above, OPEN, within=0.02, limit=80, yaw=yaw)
    yield from hand.move(lambda: on_lever(0) + miss, OPEN, within=0.015, limit=30, yaw=yaw)
    if hand.first_way:
        yield from hand.close()
    for _ in range(60):
        angle = hand.objects[13]
        if angle > _UNLATCHED - 0.15 * hasty:
            break
        yield Goal(on_lever(min(angle + 0.4, 1.8)) + 0.04 * down, gripper, yaw, 0.7)
    wiggle = 0.05 if hand.first_way else 0.0  # the latch sticks to its frame; a loose lever slips off when wiggled
    for step in range(140):
        angle = hand.objects[13]
        press = np.cos(angle) * down - np.sin(angle) * along
        yield Goal(
            hand.position + 0.09 * outwards + (0.04 - 0.03 * hasty + wiggle * np.sin(0.6 * step)) * press,
            gripper,
            yaw,
            0.7,
        )
    return False


SCRIPTS = {"lift": lift, "stack": stack, "can": can, "square": square, "door": door}
