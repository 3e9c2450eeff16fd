"""Scripted experts that demonstrate a task about as well, and as unevenly, as people do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sacflow_robot.envs.tasks import METRES_PER_ACTION, RADIANS_PER_ACTION
from sacflow_robot.errors import UnknownNameError
from sacflow_robot.randomness import Stream, random_stream
from sacflow_robot.spec import FloatArray, Observation

Vector = npt.NDArray[np.float64]

_OPEN, _CLOSE = -1.0, 1.0


class Expert(Protocol):
    """Chooses one action at a time; ``done`` once it gives the episode up."""

    done: bool

    def act(self, observation: Observation) -> FloatArray:
        """Action (A,) for one unbatched observation."""
        ...


@dataclass(frozen=True)
class Habits:
    """How one demonstrator behaves in one episode; drawn anew for each.

    Attributes:
        gain: Share of the remaining distance commanded per step; small is slow.
        top_speed: Largest translation command, in action units.
        hover: Height above the object from which to descend (m).
        detour: Sideways offset of the hover point (m), x and y.
        diagonal: Descend while still moving sideways.
        aligns_yaw: Turn the gripper to the object's faces.
        aim_error: Where the grasp is aimed, relative to the object's centre (m).
        close_steps: Steps to wait for the fingers.
        tremor: Standard deviation of the slowly varying command noise, in action units.
        jitter: Standard deviation of the white command noise, in action units.
        pause_rate: Probability per step of stopping for a moment.
        persistence: Probability of trying again after a missed grasp.
    """

    gain: float
    top_speed: float
    hover: float
    detour: Vector
    diagonal: bool
    aligns_yaw: bool
    aim_error: Vector
    close_steps: int
    tremor: float
    jitter: float
    pause_rate: float
    persistence: float


def draw_habits(rng: np.random.Generator) -> Habits:
    """Habits of mixed quality: from slow and shaky to quick and sure."""
    skill = rng.uniform()
    return Habits(
        gain=0.35 + 0.45 * skill + rng.uniform(-0.1, 0.1),
        top_speed=rng.uniform(0.45, 1.0),
        hover=rng.uniform(0.04, 0.12),
        detour=rng.normal(0.0, 0.025, 2),
        diagonal=bool(rng.uniform() < 0.3),
        aligns_yaw=bool(rng.uniform() < 0.4 + 0.5 * skill),
        aim_error=rng.normal(0.0, 1.0, 3) * np.array([0.023, 0.023, 0.016]) * (1.25 - skill),
        close_steps=int(rng.integers(4, 12)),
        tremor=0.30 - 0.2 * skill,
        jitter=0.20 - 0.1 * skill,
        pause_rate=0.03 * (1.2 - skill),
        persistence=0.4,
    )


class LiftExpert:
    """Reach, grasp and lift the cube, with the habits drawn from ``rng``.

    It misses some grasps; then it opens the gripper and tries again, or gives the episode up and leaves the arm idle.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._habits = draw_habits(rng)
        self._phase: Callable[[Vector, Vector, float], tuple[Vector, float, float]] = self._approach
        self._steps_in_phase = 0
        self._tremor = np.zeros(3)
        self._pause = 0
        self._last_gripper = _OPEN
        self.done = False

    def act(self, observation: Observation) -> FloatArray:
        """Action (7,) for one unbatched observation."""
        eef = np.asarray(observation["robot0_eef_pos"], np.float64)
        cube = np.asarray(observation["object"][:3], np.float64)
        fingers = float(observation["robot0_gripper_qpos"][0] - observation["robot0_gripper_qpos"][1])
        turn = _turn_to_faces(observation["robot0_eef_quat"], observation["object"][3:7])

        habits = self._habits
        self._tremor = 0.85 * self._tremor + np.sqrt(1 - 0.85**2) * self._rng.normal(0, habits.tremor, 3)
        if self._pause > 0:
            self._pause -= 1
            return np.array([0, 0, 0, 0, 0, 0, self._last_gripper], np.float32)
        if self._rng.uniform() < habits.pause_rate:
            self._pause = int(self._rng.integers(2, 9))

        self._steps_in_phase += 1
        goal, gripper, steadiness = self._phase(eef, cube, fingers)
        move = habits.gain * (goal - eef) / METRES_PER_ACTION
        speed = np.abs(move).max()
        if speed > habits.top_speed:
            move *= habits.top_speed / speed
        move += (1 - steadiness) * (self._tremor + self._rng.normal(0, habits.jitter, 3))
        spin = habits.gain * turn / RADIANS_PER_ACTION if habits.aligns_yaw else 0.0
        rotate = self._rng.normal(0, 0.03, 3) + np.array([0, 0, spin])
        self._last_gripper = gripper
        action: FloatArray = np.clip(np.concatenate([move, rotate, [gripper]]), -1, 1).astype(np.float32)
        return action

    def _enter(self, phase: Callable[[Vector, Vector, float], tuple[Vector, float, float]]) -> None:
        self._phase, self._steps_in_phase = phase, 0

    def _approach(self, eef: Vector, cube: Vector, fingers: float) -> tuple[Vector, float, float]:
        habits = self._habits
        height = 0.0 if habits.diagonal else habits.hover
        goal = cube + np.array([*habits.detour, height])
        near = np.linalg.norm((goal - eef)[:2]) < (0.02 if habits.diagonal else 0.03)
        if near and eef[2] - goal[2] < 0.04:
            self._enter(self._descend)
        return goal, _OPEN, 0.0

    def _descend(self, eef: Vector, cube: Vector, fingers: float) -> tuple[Vector, float, float]:
        goal = cube + self._habits.aim_error
        if np.linalg.norm(goal - eef) < 0.012 or self._steps_in_phase > 60:
            self._enter(self._close)
        return goal, _OPEN, 0.4

    def _close(self, eef: Vector, cube: Vector, fingers: float) -> tuple[Vector, float, float]:
        if self._steps_in_phase >= self._habits.close_steps:
            self._enter(self._lift)
        return eef, _CLOSE, 0.5

    def _lift(self, eef: Vector, cube: Vector, fingers: float) -> tuple[Vector, float, float]:
        lost = fingers < 0.01 or eef[2] - cube[2] > 0.06
        if lost and self._steps_in_phase > 6:
            again = self._rng.uniform() < self._habits.persistence
            self._habits = draw_habits(self._rng)
            self._enter(self._approach if again else self._give_up)
        return cube + np.array([0.0, 0.0, 0.12]), _CLOSE, 0.3

    def _give_up(self, eef: Vector, cube: Vector, fingers: float) -> tuple[Vector, float, float]:
        """Leave the arm where it is until somebody stops the recording."""
        self.done = self._steps_in_phase >= 30
        return eef, _CLOSE, 0.9


def _turn_to_faces(eef_quat: FloatArray, cube_quat: FloatArray) -> float:
    """Smallest turn about the vertical (rad) that squares the gripper with the cube's faces, in [-pi/4, pi/4]."""
    difference = _yaw(cube_quat) - _yaw(eef_quat)
    return float((difference + np.pi / 4) % (np.pi / 2) - np.pi / 4)


def _yaw(quat_xyzw: FloatArray) -> float:
    x, y, z, w = (float(q) for q in quat_xyzw)
    return float(np.arctan2(2 * (x * y + w * z), 1 - 2 * (y * y + z * z)))


EXPERTS: dict[str, Callable[[np.random.Generator], Expert]] = {"lift": LiftExpert}


def make_expert(task: str, seed: int) -> Expert:
    """The scripted expert of a task, its habits and noise decided by the seed.

    Raises:
        UnknownNameError: The task has no expert.
    """
    if task not in EXPERTS:
        raise UnknownNameError("task with a scripted expert", task, EXPERTS)
    return EXPERTS[task](random_stream(seed, Stream.EXPERT))
