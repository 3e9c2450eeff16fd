"""Simulator state of a task as one vector, which logs keep and episodes start from."""

from collections.abc import Sequence
from dataclasses import dataclass

import mujoco
import numpy as np

from sacflow_robot.errors import DataError
from sacflow_robot.spec import Array

State = Array

_LARGEST = 1e6  # meters, radians or seconds


@dataclass(frozen=True)
class StateLayout:
    """Time, qpos and qvel in robosuite's flattened order, then position and quaternion w x y z of placed bodies (S,)."""

    task: str  # name of the task, for messages
    nq: int  # positions
    nv: int  # velocities
    placed: Sequence[int]  # ids of the bodies that an episode's start places in the model itself

    @property
    def moving(self) -> int:
        """Number of entries that change within an episode."""
        return 1 + self.nq + self.nv

    @property
    def size(self) -> int:
        return self.moving + 7 * len(self.placed)

    def read(self, model: mujoco.MjModel, data: mujoco.MjData) -> State:
        placed = [np.append(model.body_pos[i], model.body_quat[i]) for i in self.placed]
        return np.concatenate([[data.time], data.qpos, data.qvel, *placed])

    def write(self, state: State, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        """Set the simulator to a state, derived quantities included.

        Raises:
            DataError: The state is not of this task, or is damaged.
        """
        if state.shape != (self.size,):
            raise DataError(f"simulator state has shape {state.shape}, task {self.task!r} expects ({self.size},)")
        if not (np.abs(state) < _LARGEST).all():
            raise DataError(f"simulator state contains NaN or numbers beyond {_LARGEST:g}; it is damaged")
        mujoco.mj_resetData(model, data)
        data.time = state[0]
        data.qpos[:] = state[1 : 1 + self.nq]
        data.qvel[:] = state[1 + self.nq : self.moving]
        for i, pose in zip(self.placed, state[self.moving :].reshape(-1, 7), strict=True):
            model.body_pos[i], model.body_quat[i] = pose[:3], pose[3:]
        mujoco.mj_forward(model, data)
