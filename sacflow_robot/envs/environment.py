"""Base class of a single simulated robot."""

from abc import ABC, abstractmethod

from sacflow_robot.episode import StepResult
from sacflow_robot.errors import DataError
from sacflow_robot.spec import Array, Engine, FloatArray, RobotSpec


class SimulatedEnv(ABC):
    """One simulated robot."""

    robot: RobotSpec  # its observations and actions
    engine: Engine = "stock"  # code that steps it

    @abstractmethod
    def begin(self, seed: int) -> StepResult:
        """Start the episode that this seed decides."""

    def begin_at(self, state: Array) -> StepResult:
        """Start from a logged simulator state (S,).

        Raises:
            DataError: The environment has no such state.
        """
        raise DataError(f"{self.robot.task} cannot start from a logged state; only robosuite tasks can")

    @abstractmethod
    def command(self, action: FloatArray) -> StepResult:
        """Execute one action (A,) for one control period.

        Raises:
            InvalidValueError: The action has the wrong shape or holds NaN or infinity.
        """

    def execute(self, chunk: FloatArray) -> list[StepResult]:
        """Execute the actions of a chunk (H, A) up to the episode's end; one result for each action executed."""
        results = []
        for action in chunk:
            results.append(self.command(action))
            if results[-1].ended:
                break
        return results

    def close(self) -> None:  # noqa: B027 (most have nothing to give back)
        """Give back what it holds."""
