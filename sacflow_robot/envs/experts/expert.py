"""Scripted experts that demonstrate a task with the skill and the variation of people, in three qualities."""

from typing import Protocol

import numpy as np

from sacflow_robot.envs.experts.primitives import CLOSE, OPEN, QUALITIES, Goal, Hand, Motion, Quality, Style, draw_style
from sacflow_robot.envs.experts.scripts import SCRIPTS
from sacflow_robot.envs.tasks import METERS_PER_ACTION, RADIANS_PER_ACTION
from sacflow_robot.errors import UnknownNameError
from sacflow_robot.spec import FloatArray, Observation
from sacflow_robot.utils.seeding import Stream, random_stream

_TREMOR_MEMORY = 0.85  # share of the slow noise that is left after one step
_GIVE_UP_STEPS = 30


class Expert(Protocol):
    """Policy that chooses one action at a time; ``done`` once it gives the episode up."""

    done: bool

    def act(self, observation: Observation) -> FloatArray:
        """Action (A,) for one unbatched observation."""
        ...


class ScriptedExpert:
    """Follow a task's script in a style of a quality; ``rng`` draws the style, the misses and the noise.

    After a failed attempt it tries again in another style, or gives the episode up and leaves the robot idle.
    """

    def __init__(self, task: str, quality: Quality, rng: np.random.Generator) -> None:
        self._quality = quality
        self._rng = rng
        self._script = SCRIPTS[task]
        self._hand = Hand(draw_style(quality, rng), rng, first_way=bool(rng.uniform() < 0.5))
        self._goals = self._attempts()
        self._tremor = np.zeros(3)
        self._pause = 0
        self._gripper = OPEN
        self.done = False

    @property
    def first_way(self) -> bool:
        """True if this expert shows the first of the task's two ways, where there are two."""
        return self._hand.first_way

    def act(self, observation: Observation) -> FloatArray:
        """Action (7,) for one unbatched observation."""
        hand, style, rng = self._hand, self._hand.style, self._rng
        hand.see(observation)
        self._tremor = _TREMOR_MEMORY * self._tremor + np.sqrt(1 - _TREMOR_MEMORY**2) * rng.normal(0, style.tremor, 3)
        idle = np.array([0, 0, 0, 0, 0, 0, self._gripper], np.float32)
        if self._pause > 0:
            self._pause -= 1
            return idle
        if rng.uniform() < style.pause_rate:
            self._pause = int(rng.integers(2, 9))
        goal = next(self._goals, None)
        if goal is None:
            self.done = True
            return idle
        self._gripper = goal.gripper
        return self._command(goal, style)

    def _command(self, goal: Goal, style: Style) -> FloatArray:
        hand, rng = self._hand, self._rng
        move = style.gain * (goal.position - hand.position) / METERS_PER_ACTION
        fastest, speed = min(style.top_speed, goal.slowness), np.abs(move).max()
        if speed > fastest:
            move *= fastest / speed
        move += (1 - goal.steadiness) * (self._tremor + rng.normal(0, style.jitter, 3))
        turn = rng.normal(0, 0.15 * style.jitter, 3)
        if goal.yaw is not None:
            turn += style.gain * hand.turn_to(goal.yaw) / RADIANS_PER_ACTION
        return np.clip(np.concatenate([move, turn, [goal.gripper]]), -1, 1).astype(np.float32)

    def _attempts(self) -> Motion:
        while not (yield from self._script(self._hand)):
            if self._rng.uniform() >= self._hand.style.persistence:
                yield from self._hand.wait(_GIVE_UP_STEPS, CLOSE, 0.9)
                return False
            self._hand.style = draw_style(self._quality, self._rng)
        return True


def make_expert(task: str, seed: int, quality: Quality = "mixed") -> ScriptedExpert:
    """The scripted expert of a task; the seed decides its style and noise.

    Raises:
        UnknownNameError: The task has no expert, or there is no such quality.
    """
    if task not in SCRIPTS:
        raise UnknownNameError("task with a scripted expert", task, SCRIPTS)
    if quality not in QUALITIES:
        raise UnknownNameError("quality of expert", quality, QUALITIES)
    return ScriptedExpert(task, quality, random_stream(seed, Stream.EXPERT))
