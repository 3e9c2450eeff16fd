"""Sensor readings under a robot model: bias, noise, resolution and lost samples of each observation key."""

from collections.abc import Mapping

import numpy as np

from sacflow_robot.envs.robot_parameters import RobotParameters
from sacflow_robot.envs.tasks import TASKS
from sacflow_robot.spec import Array, FloatArray, RobotSpec
from sacflow_robot.utils.rotations import rotated

JOINT_POSITION = "robot0_joint_pos"
_EEF, _OBJECT = "robot0_eef_pos", "object"


class Sensors:
    """The sensors of one robot, under the ``sensors`` section of a model.

    What is observed relative to the gripper is the difference of what is observed of both, as robosuite computes it.
    """

    def __init__(self, robot: RobotSpec, model: RobotParameters) -> None:
        self._arrays = [(array, model.sensor(array.key)) for array in robot.observations]
        task = TASKS.get(robot.task)
        self._absolute, self._relative = ((), ()) if task is None else (task.object_positions, task.object_from_grip)
        self._offset = model.array("joints.zero_offset_rad")
        self._last: dict[str, FloatArray] = {}
        self._active = self._offset is not None or any(known for _, known in self._arrays)

    def begin(self) -> None:
        """Forget the readings before: an episode begins."""
        self._last = {}

    def read(self, truth: Mapping[str, FloatArray], rng: np.random.Generator) -> dict[str, FloatArray]:
        """Draw a reading of each key; ``truth`` itself where nothing is known of any sensor."""
        if not self._active:
            return dict(truth)
        readings = {}
        moved = np.zeros(3)
        places = {_EEF: (0,), _OBJECT: self._absolute}  # where in an array a position begins that a bias moves
        for array, known in self._arrays:
            value = truth[array.key].astype(np.float64).reshape(-1)
            drawn, kept = rng.standard_normal(array.size), rng.random()
            turned = np.zeros(array.size, bool)
            for start in array.quaternions:
                turned[start : start + 4] = True
                turn = known.get("bias_rad", np.zeros(3)) + known.get("noise_rad", 0.0) * drawn[start : start + 3]
                value[start : start + 4] = rotated(value[start : start + 4], turn)
            if array.unit.startswith("m"):
                error = _shift(known, drawn, array.size, places.get(array.key, ()))
                if array.key == _EEF:
                    moved = error[:3]
                if array.key == _OBJECT:
                    for start, of in zip(self._relative, self._absolute, strict=False):
                        error[start : start + 3] = error[of : of + 3] - moved
                value = np.where(turned, value, _rounded(value + error, known.get("resolution_m")))
            elif array.unit == "rad":
                bias = 0.0 if self._offset is None or array.key != JOINT_POSITION else self._offset
                value = _rounded(value + bias + known.get("noise_rad", 0.0) * drawn, known.get("resolution_rad"))
            reading = value.astype(array.dtype).reshape(array.shape)
            if kept < float(known.get("drop_ratio", np.zeros(1))[0]) and array.key in self._last:
                reading = self._last[array.key]
            readings[array.key] = self._last[array.key] = reading
        return readings


def _shift(known: Mapping[str, Array], drawn: Array, size: int, places: tuple[int, ...]) -> Array:
    error = np.zeros(size) + known.get("noise_m", 0.0) * drawn
    if "bias_m" in known:
        for start in places:
            error[start : start + 3] += known["bias_m"]
    return error


def _rounded(value: Array, step: Array | None) -> Array:
    return value if step is None or step[0] <= 0 else np.round(value / step[0]) * step[0]
