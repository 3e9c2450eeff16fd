"""Orientations of recorded observations: unit quaternions x y z w, or refused."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from sacflow_robot.data.formats.adapt import EEF_QUAT
from sacflow_robot.data.formats.demonstrations import DemoOptions
from sacflow_robot.errors import DataError
from sacflow_robot.spec import FloatArray, RobotSpec

_UNIT = 0.01  # how far the norm may be from 1
_SAME_TURN = 0.1  # of the entries; observations may lag behind a state by a physics step


def check_unit(observations: Mapping[str, FloatArray], robot: RobotSpec, origin: str) -> None:
    """Refuse observations (T + 1, ...) whose quaternions are not of norm 1.

    Raises:
        DataError: Some are not; the message begins with ``origin`` and names the step.
    """
    for spec in robot.observations:
        flat = observations[spec.key].reshape(len(observations[spec.key]), -1)
        for start in spec.quaternions:
            wrong = np.flatnonzero(np.abs(np.linalg.norm(flat[:, start : start + 4], axis=1) - 1) > _UNIT)
            # robosuite's own first observation of an object may be of zeros, from before its sensors were read.
            if len(wrong) and (spec.key == EEF_QUAT or len(wrong) > len(flat) / 2):
                norm = np.linalg.norm(flat[wrong[0], start : start + 4])
                raise DataError(
                    f"{origin}, step {wrong[0]}: the quaternion in {spec.key} has norm {norm:.3g}; expected a unit "
                    f"quaternion x y z w"
                )


def check_w_last(
    observations: Mapping[str, FloatArray], states: npt.NDArray[np.float64], options: DemoOptions, origin: str
) -> None:
    """Refuse quaternions that begin with w, where the simulator can tell from two of the states (T + 1, S).

    Raises:
        DataError: Some do; the message begins with ``origin`` and names the step.
    """
    if options.observe_state is None:
        return
    for step in sorted({0, (len(states) - 1) // 2}):
        try:
            expected = options.observe_state(states[step])[0]
        except DataError:  # states of another version's model, which the simulator here does not take
            return
        for spec in options.robot.observations:
            for start in spec.quaternions:
                found, right = (
                    each.ravel()[start : start + 4] for each in (observations[spec.key][step], expected[spec.key])
                )
                if _one_rotation(found[[1, 2, 3, 0]], right) and not _one_rotation(found, right):
                    raise DataError(
                        f"{origin}, step {step}: the quaternion in {spec.key} is w x y z by its states; expected x y z w, "
                        f"reorder it"
                    )


def _one_rotation(a: FloatArray, b: FloatArray) -> bool:
    return bool(min(np.abs(a - b).max(), np.abs(a + b).max()) < _SAME_TURN)
