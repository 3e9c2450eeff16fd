"""Motion primitives of scripted experts, a demonstrator's style, and the state of the gripper and the objects."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from sacflow_robot.spec import Array, Observation
from sacflow_robot.utils.rotations import to_matrix

Vector = Array

OPEN, CLOSE = -1.0, 1.0

_EMPTY = 0.01  # opening (m) of a gripper that has closed on nothing
_STILL = 0.001  # opening that changes by less in one step (m) has stopped
_CLOSING_STEPS = 18  # that fingers take at most
_DOWN = np.diag([1.0, -1.0, -1.0])  # gripper pointing down, fingers opening along the world's y axis

Quality = Literal["proficient", "mixed", "poor"]
QUALITIES: tuple[Quality, ...] = get_args(Quality)


@dataclass(frozen=True)
class Style:
    """Parameters of one attempt of a demonstrator; drawn anew for each."""

    gain: float  # share of the remaining distance commanded per step; small is slow
    top_speed: float  # largest translation command, in action units
    hover: float  # height above the object from which to descend (m)
    detour: Array  # sideways offset of the hover point (m), x and y
    diagonal: bool  # descend while still moving sideways
    aligns: bool  # turn the gripper to the object
    carelessness: float  # 1 misses often, 0 never; scales the aim errors of scripts
    close_steps: int  # steps to wait for the fingers
    tremor: float  # standard deviation of the slowly varying command noise, in action units
    jitter: float  # standard deviation of the white command noise, in action units
    pause_rate: float  # probability per step of stopping for a moment
    persistence: float  # probability of trying again after a failed attempt


def draw_style(quality: Quality, rng: np.random.Generator) -> Style:
    """Draw a style: ``mixed`` ranges from slow and shaky to quick and sure."""
    if quality == "proficient":
        return Style(
            gain=rng.uniform(0.6, 0.85),
            top_speed=rng.uniform(0.8, 1.0),
            hover=rng.uniform(0.04, 0.07),
            detour=rng.normal(0.0, 0.005, 2),
            diagonal=False,
            aligns=True,
            carelessness=0.0,
            close_steps=int(rng.integers(5, 8)),
            tremor=0.08,
            jitter=0.05,
            pause_rate=0.0,
            persistence=1.0,
        )
    skill = rng.uniform() if quality == "mixed" else rng.uniform(0.0, 0.3)
    return Style(
        gain=0.45 + 0.35 * skill + rng.uniform(-0.1, 0.1),
        top_speed=rng.uniform(0.6, 1.0),
        hover=rng.uniform(0.04, 0.12),
        detour=rng.normal(0.0, 0.025, 2),
        diagonal=bool(rng.uniform() < 0.3),
        aligns=bool(rng.uniform() < 0.4 + 0.5 * skill),
        carelessness=(1.25 - skill) * (1.0 if quality == "mixed" else 1.4),
        close_steps=int(rng.integers(4, 12)),
        tremor=0.30 - 0.2 * skill,
        jitter=0.20 - 0.1 * skill,
        pause_rate=0.03 * (1.2 - skill),
        persistence=0.5 if quality == "mixed" else 0.2,
    )


@dataclass(frozen=True)
class Goal:
    """Goal of one step."""

    position: Vector  # of the gripper (3,), m, world
    gripper: float  # OPEN or CLOSE
    yaw: float | None = None  # turn about the vertical from fingers opening along y (rad); None leaves it as it is
    steadiness: float = 0.3  # share of the noise that is suppressed at this step, 0 to 1
    slowness: float = 1.0  # largest translation command at this step, in action units; the style's may be lower


# Yields one goal a step, while the hand is kept up to date; returns True on success.
Motion = Generator[Goal, None, bool]


class Hand:
    """The gripper and the objects as of the latest observation, in the world frame."""

    def __init__(self, style: Style, rng: np.random.Generator, first_way: bool) -> None:
        self.style = style  # of the present attempt
        self.rng = rng
        self.first_way = first_way  # whether this episode shows the first of two ways of doing the task
        self.position = np.zeros(3)
        self.rotation = _DOWN
        self.opening = 0.0
        self.objects = np.zeros(0)

    def see(self, observation: Observation) -> None:
        self.position = np.asarray(observation["robot0_eef_pos"], np.float64)
        quat = np.asarray(observation["robot0_eef_quat"], np.float64)
        self.rotation = to_matrix(quat / np.linalg.norm(quat))
        fingers = observation["robot0_gripper_qpos"]
        self.opening = float(fingers[0] - fingers[1])
        self.objects = np.asarray(observation["object"], np.float64)

    @property
    def yaw(self) -> float:
        """Turn about the vertical from fingers opening along y (rad)."""
        return float(np.arctan2(self.rotation[1, 0], self.rotation[0, 0]))

    def turn_to(self, yaw: float) -> Vector:
        """Rotation vector (3,), rad, world, that points the gripper straight down at that yaw."""
        c, s = np.cos(yaw), np.sin(yaw)
        wanted = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]) @ _DOWN
        return _rotation_vector(wanted @ self.rotation.T)

    def aim(self, x: float, y: float, z: float) -> Vector:
        """A random miss (3,), m, with these standard deviations at carelessness 1."""
        return np.asarray(self.rng.normal(0.0, 1.0, 3) * [x, y, z] * self.style.carelessness)

    def near(self, goal: Vector, within: float) -> bool:
        return bool(np.linalg.norm(goal - self.position) < within)

    def move(
        self,
        goal: Callable[[], Vector],
        gripper: float,
        *,
        within: float,
        limit: int,
        yaw: float | None = None,
        steadiness: float = 0.3,
        slowness: float = 1.0,
    ) -> Motion:
        """Go to a goal, which may move; True within that distance of it (m), False after ``limit`` steps."""
        for _ in range(limit):
            target = goal()
            if self.near(target, within) and (yaw is None or np.abs(self.turn_to(yaw)).max() < 0.12):
                return True
            yield Goal(target, gripper, yaw, steadiness, slowness)
        return False

    def wait(self, steps: int, gripper: float, steadiness: float = 0.5, yaw: float | None = None) -> Motion:
        """Stay, e.g. while the fingers move."""
        for _ in range(steps):
            yield Goal(self.position, gripper, yaw, steadiness)
        return True

    def carry(self, goal: Callable[[], Vector], **how: Any) -> Motion:
        """``move`` while holding something; False as soon as it is lost."""
        motion = self.move(goal, CLOSE, **how)
        for step in motion:
            if not self.holds:
                return False
            yield step
        return self.holds

    def close(self) -> Motion:
        """Close the fingers until they stop."""
        before = np.inf
        for step in range(_CLOSING_STEPS):
            if step >= self.style.close_steps and abs(self.opening - before) < _STILL:
                break
            before = self.opening
            yield Goal(self.position, CLOSE, None, 0.5)
        return self.holds

    def release(self) -> Motion:
        """Open and rise. Returns False: if the attempt had worked, the episode would have ended."""
        yield from self.wait(self.style.close_steps, OPEN, 0.8)
        clear = self.position + up(0.11)
        yield from self.move(lambda: clear, OPEN, within=0.03, limit=20)
        return False

    @property
    def holds(self) -> bool:
        """True if something keeps the fingers apart."""
        return self.opening > _EMPTY

    def grasp(
        self, at: Callable[[], Vector], miss: Vector, yaw: float | None, *, clearance: float = 0.0, within: float = 0.03
    ) -> Motion:
        """Reach over a point, come down to it, and close; True if something is held.

        Args:
            at: The point (3,), m, world.
            miss: Error of the point where the fingers close (3,), m.
            yaw: Turn about the vertical to grasp with (rad).
            clearance: Height above the point below which the fingers could hit the object (m).
            within: Distance to the point above the object from which to descend (m).
        """
        style = self.style
        over = np.array([*style.detour, clearance + (0.0 if style.diagonal else style.hover)])
        yaw = yaw if style.aligns else None
        near = 0.02 if style.diagonal else within
        yield from self.move(lambda: at() + over, OPEN, within=near, limit=100, yaw=yaw, steadiness=0.0)
        yield from self.move(lambda: at() + miss, OPEN, within=0.012, limit=60, yaw=yaw, steadiness=0.4)
        yield from self.close()
        return self.holds


def up(height: float) -> Vector:
    """Vector (3,) of that height (m), world."""
    return np.array([0.0, 0.0, height])


def yaw_of(quat_xyzw: Vector) -> float:
    """Turn about the vertical of a quaternion (rad)."""
    x, y, z, w = quat_xyzw
    return float(np.arctan2(2 * (x * y + w * z), 1 - 2 * (y * y + z * z)))


def nearest_yaw(wanted: float, current: float, period: float) -> float:
    """The yaw nearest to ``current`` among ``wanted`` plus multiples of ``period`` (rad)."""
    return current + (wanted - current + period / 2) % period - period / 2


def _rotation_vector(matrix: Array) -> Vector:
    """Axis times angle of a rotation of less than half a turn (rad)."""
    angle = np.arccos(np.clip((np.trace(matrix) - 1) / 2, -1, 1))
    axis = np.array([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]])
    sine = np.sin(angle)
    return axis / 2 if sine < 1e-6 else axis / (2 * sine) * angle
