import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sacflow_robot.envs.tasks import get_task
from sacflow_robot.errors import InvalidValueError
from sacflow_robot.robot.safety.action_clipper import ActionClipper

ROBOT = get_task("lift").robot
ACTIONS = arrays.arrays(np.float32, 7, elements=st.floats(-5, 5, width=32))
BOUNDS = arrays.arrays(np.float32, 7, elements=st.floats(0, 3, width=32))


@given(ACTIONS, BOUNDS)
def test_what_is_sent_is_within_the_arms_bounds_and_the_profiles(proposed: np.ndarray, bound: np.ndarray) -> None:
    sent = ActionClipper(ROBOT, (-bound, bound))(proposed)
    assert sent.dtype == np.float32 and (np.abs(sent) <= np.minimum(bound, 1)).all()
    allowed = np.abs(proposed) <= np.minimum(bound, 1)
    assert np.array_equal(sent[allowed], proposed[allowed]), "what is allowed passes unchanged"
    assert (sent[~allowed] * proposed[~allowed] >= 0).all(), "no direction is turned round"


def test_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="was not sent"):
        ActionClipper(ROBOT)(np.full(7, np.nan))
    with pytest.raises(InvalidValueError, match=r"shape \(6,\), expected \(7,\)"):
        ActionClipper(ROBOT)(np.zeros(6))
    with pytest.raises(InvalidValueError, match=r"limits have shapes \(7,\) and \(6,\), expected \(7,\)"):
        ActionClipper(ROBOT, (np.zeros(7, np.float32), np.ones(6, np.float32)))
