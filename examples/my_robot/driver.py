"""A robot of one's own: a gantry that takes a part from a tray and puts it into a bin. It is simulated in these few lines."""

import numpy as np

from sacflow_robot.episode import StepResult
from sacflow_robot.errors import StoppedError
from sacflow_robot.robot.drivers.clock import MonotonicClock
from sacflow_robot.spec import ArraySpec, RobotSpec

SPEC = RobotSpec(
    robot="Gantry",
    task="part into bin",
    controller="axis velocities",
    control_rate_hz=10.0,
    observations=(ArraySpec("axes", (2,), "m"), ArraySpec("part", (2,), "m"), ArraySpec("vacuum", (1,), "on")),
    action_names=("x", "y", "suction"),
    action_units=("0.3 m/s", "0.3 m/s", "on"),
    action_low=(-1.0,) * 3,
    action_high=(1.0,) * 3,
)
BIN, REACH_M, MOST_STEPS = np.array([0.0, 0.0]), 0.02, 60


class Gantry:
    """Suction holds the part where it is switched on within 2 cm of it, and lets go of it where it is switched off."""

    spec, lockstep, clock = SPEC, True, MonotonicClock()  # lockstep: its time stands still between commands

    def connect(self) -> None:
        self.stopped = False

    def begin(self, seed: int) -> StepResult:
        rng = np.random.default_rng(seed)
        self.axes, self.part = rng.uniform(-0.3, 0.3, 2), rng.uniform(0.1, 0.3, 2) * rng.choice([-1, 1], 2)
        self.held, self.steps = False, 0
        return self.observe()

    def observe(self) -> StepResult:
        seen = {"axes": np.float32(self.axes), "part": np.float32(self.part), "vacuum": np.float32([self.held])}
        solved = not self.held and float(np.linalg.norm(self.part - BIN)) < 2 * REACH_M
        return StepResult(seen, float(solved), solved, self.steps >= MOST_STEPS and not solved)

    def command(self, action: np.ndarray, valid_until_ns: int) -> None:
        if self.stopped:
            raise StoppedError("the gantry has been stopped; connect it again")
        action = SPEC.check_action(action)  # refuses NaN, keeps to the bounds
        self.axes = np.clip(self.axes + 0.03 * action[:2], -0.4, 0.4)
        self.held = bool(action[2] > 0 and (self.held or np.linalg.norm(self.axes - self.part) < REACH_M))
        self.part, self.steps = self.axes.copy() if self.held else self.part, self.steps + 1

    def hold(self) -> None: ...

    def stop(self) -> None:
        self.stopped = True

    close = hold


def make_robot(subject: str, options: dict[str, str]) -> Gantry:
    return Gantry()
