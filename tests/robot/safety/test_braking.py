"""The arithmetic of motions that can stop, against simulation."""

import os

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sacflow_robot.robot.safety.braking import Motion, allowed, change_for, lead, reach, stop_change, stop_path

CASES = int(os.environ.get("SACFLOW_SAFETY_CASES", "500"))
POSITIVE = st.floats(1e-2, 1e2)


@st.composite
def motions(draw: st.DrawFn) -> Motion:
    """One axis from sluggish to violent, at 5 to 500 Hz."""
    period = 1 / draw(st.sampled_from([5.0, 20.0, 100.0, 500.0]))
    speed = draw(st.floats(0.05, 10))
    seconds = draw(st.floats(period, max(60 * period, 0.1)))  # from rest to full speed, so that a case stays short
    bends = draw(st.floats(0.5, 30))
    acceleration = np.array([speed / seconds])
    return Motion.of(period, np.array([speed]), acceleration, acceleration / (bends * period))


@given(st.floats(-50, 50), st.floats(1e-3, 10))
@settings(max_examples=CASES)
def test_the_lead_of_a_change_is_its_sum_and_its_inverse_is_exact(change: float, bend: float) -> None:
    size, total = abs(change), 0.0
    if size / bend < 5000:
        while size > 0:
            total, size = total + size, size - bend
        assert np.isclose(lead(np.array(change), np.array(bend)), np.sign(change) * total, rtol=1e-9)
    found = change_for(lead(np.array(change), np.array(bend)), np.array(bend))
    assert np.isclose(found, change, rtol=1e-6, atol=1e-9)


@given(motions(), st.lists(st.floats(-1, 1), min_size=1, max_size=30))
@settings(max_examples=CASES)
def test_any_choice_within_the_allowed_keeps_the_limits_and_every_stop_is_in_time(
    motion: Motion, choices: list[float]
) -> None:
    velocity, change = np.zeros(1), np.zeros(1)
    for choice in choices:
        low, high = allowed(motion, velocity, change)
        assert low <= high
        before, change = change, low + (choice + 1) / 2 * (high - low)
        velocity = velocity + change
        assert (np.abs(velocity) <= motion.speed * (1 + 1e-9)).all()
        assert (np.abs(change) <= motion.change * (1 + 1e-9)).all()
        assert (np.abs(change - before) <= motion.bend * (1 + 1e-9)).all()
    path = stop_path(motion, velocity, change) / motion.period_s
    assert len(path) <= motion.stop_periods + 1 and not path[-1].any(), "at rest within the time that the limits allow"
    assert (np.abs(np.cumsum(path * motion.period_s, 0)) <= reach(motion, velocity, change) + 1e-12).all()
    changes = np.diff(path, axis=0, prepend=(velocity - change)[None])
    bends = np.diff(np.append(changes, np.zeros((1, 1)), axis=0), axis=0)
    assert (np.abs(changes) <= motion.change * (1 + 1e-9)).all()
    assert (np.abs(bends) <= motion.bend * (1 + 1e-6) + 1e-12).all(), "no jerk beyond the limit, the last one included"
    heading = np.sign(velocity + lead(change, motion.bend) - change)
    if heading * velocity >= 0:
        assert (path * heading >= -1e-9 * motion.speed).all(), "a stop does not turn back"


def test_a_stop_is_as_short_as_the_limits_allow() -> None:
    """1 m/s, 2 m/s², no limit of jerk: twenty periods of 25 ms at 0.05 m/s less each."""
    motion = Motion.of(0.025, np.array([1.0]), np.array([2.0]), np.array([np.inf]))
    path = stop_path(motion, np.array([1.0]), np.zeros(1))[:, 0] / 0.025
    assert np.allclose(path, np.linspace(1, 0, 21))
    assert stop_change(motion, np.array([0.03]), np.array([-0.05])) == -0.03
