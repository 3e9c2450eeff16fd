"""System identification: the robot model whose predictions fit a recording best, and which parameters it does not identify.

Bounded least squares (SciPy) over windows of a recording. Each parameter has a weak prior, as wide as what is physically
plausible, that keeps in place what the data can't tell. What the data can tell is read off the curvature at the end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from sacflow_robot.calibrate.latency import measure_latency
from sacflow_robot.calibrate.noise import measure_noise
from sacflow_robot.calibrate.predict import Predicted, Predictor, Predictors, Window, make_windows
from sacflow_robot.calibrate.problem import DELAY, MOMENT, Problem, cut
from sacflow_robot.calibrate.recording import Recording, Values, bursts
from sacflow_robot.envs.robot_parameters import RobotParameters
from sacflow_robot.envs.transport import JOINT_POSITION
from sacflow_robot.errors import DataError
from sacflow_robot.spec import Array

# A parameter counts as identified if one standard deviation is at most this share of its value: three are 10 %.
IDENTIFIED_SHARE = 1 / 30

# The data say nothing of a parameter if one standard deviation is more than this share of its value: two are 30 %.
HIDDEN_SHARE = 0.15

SMALLEST_MASS_KG = 0.05  # loads are told to within ``IDENTIFIED_SHARE`` of this or of their value, whichever is more

_FLOOR_M, _FLOOR_RAD, _FLOOR_JOINT_RAD = 2e-4, 1e-3, 2e-4  # what windows' beginnings and rounded times leave
# What a wrong model does in the first half second of a motion is not yet beyond repair; after 1.25 s the robot rests.
_LENGTHS_S = 0.5, 1.25
_STEPS = (4, 4), (2, 2)  # most evaluations over each, windows being weighed anew before each


@dataclass(frozen=True)
class Fit:
    """Result of an identification."""

    model: RobotParameters  # the robot model found, with the values before in the place of what the data can't tell
    delay_ms: float  # delay of commands
    labels: tuple[str, ...]  # of the parameters fitted (P,)
    values: Array  # their values (P,), in the quantities' units
    spread: Array  # one standard deviation of each (P,), in the same units
    identified: npt.NDArray[np.bool_]  # whether the data tell it (P,)
    # whether they say nothing of it (P,); of what is neither, they tell something, but not to 10 %
    hidden: npt.NDArray[np.bool_]
    # of the Jacobian in units of the priors (P,), largest first: below 1 the prior says more than the data
    singular_values: Array
    weakest: dict[str, float]  # the combination that the data tell least, as shares of parameters by label
    held_out_rmse_m: float  # gripper error over windows that were not fitted to, after and before
    held_out_before_m: float  # likewise
    noise: float  # residuals' size beside what the sensors' noise explains; near 1 where the model explains all
    measured: Values  # what to put into a profile: value and one standard deviation, by name
    curvature: Array  # of the data's and priors' log likelihood (P, P), in fitted units
    fitted: Array  # where it is highest (P,), in fitted units
    reference: Array  # what shares of ``spread`` are of (P,): values, or the least that counts
    problem: Problem = field(repr=False)  # what was fitted, over the windows' whole length

    @property
    def rough(self) -> dict[str, float]:
        """Parameters of which the data tell something, but not to 10 %: one standard deviation as a share of the value."""
        shares = zip(self.labels, self.spread / self.reference, self.identified | self.hidden, strict=True)
        return {label: float(share) for label, share, other in shares if not other}

    def summary(self) -> dict[str, Any]:
        """The fit as plain numbers, for JSON."""
        rows = zip(self.labels, self.values, self.spread, self.identified, self.hidden, strict=True)
        return {
            "held_out_before_m": self.held_out_before_m,
            "held_out_after_m": self.held_out_rmse_m,
            "parameters": [
                {"name": n, "value": float(v), "spread": float(s), "identified": bool(t), "hidden": bool(h)}
                for n, v, s, t, h in rows
            ],
            "singular_values": [float(s) for s in self.singular_values],
        }

    def compare(
        self, predictors: Predictors, windows: Sequence[Window], before: RobotParameters
    ) -> tuple[Window, Predicted, Predicted]:
        """A window that was not fitted to, and what is predicted in it before and after."""
        window = windows[min(3, len(windows) - 1)]
        nominal = predictors.first.nominal.having(before.values)
        ways = [(nominal, before.number(DELAY) / 1e3), (self.model, self.delay_ms / 1e3)]
        (old,), (new,) = predictors.predict(ways, [window])
        return window, old, new

    def moved(self, index: int, by: float) -> tuple[RobotParameters, float]:
        """The robot model and command delay (s) with one parameter moved in fitted units, the others making up for it."""
        rest = np.arange(len(self.fitted)) != index
        x = self.fitted.copy()
        x[index] += by
        x[rest] -= by * np.linalg.solve(self.curvature[np.ix_(rest, rest)], self.curvature[rest, index])
        return self.problem.model(np.clip(x, self.problem.low, self.problem.high))


@dataclass(frozen=True)
class FitData:
    """Data from which a robot is identified."""

    windows: list[Window]  # pieces of the recordings
    start: RobotParameters  # the values before, with the sensors' noise and the command delay as measured
    sigma: tuple[float, float, float]  # noise of position (m), rotation (rad) and joint readings (rad)
    # one standard deviation of the command delay that comes of two clocks' unknown offset; 0 for one clock
    apart_s: float = 0.0

    def measured(self, fit: Fit) -> Values:
        """Value and one standard deviation of each quantity of a profile, by name."""
        found = dict(fit.measured)
        if DELAY in found and self.apart_s:  # by two clocks only the delays' sum is known as well as the fit says
            found[DELAY] = found[DELAY][0], np.hypot(found[DELAY][1], 1e3 * self.apart_s)
        return found


def from_excitation(recording: Recording, predictor: Predictor, before: RobotParameters) -> FitData:
    """Prepare an excitation run: its bursts, with noise and latency measured first.

    Raises:
        DataError: The run does not tell noise or latency.
    """
    noise = measure_noise(recording, predictor.forward).values
    latency = measure_latency(recording)
    start = _sections(before).having({n: list(v[0]) for n, v in noise.items()})
    start = start.having({DELAY: 1e3 * latency.command_mean_s})
    apart_s = 0.0
    if latency.clock is not None and latency.clock.differs:
        recording = latency.clock.by_loop(recording)
        apart_s = latency.clock.spread_s
    windows = make_windows(recording, bursts(recording), predictor, latency.command_mean_s)
    return FitData(windows, start, _sigma(start), apart_s)


def from_log(recordings: Sequence[Recording], predictor: Predictor, before: RobotParameters) -> FitData:
    """Prepare logged episodes: pieces of one second, with noise and delay as known before."""
    start = _sections(before)
    windows = []
    for recording in recordings:
        step, count = round(recording.robot.control_rate_hz), len(recording.sent_ns)
        pieces = [(i, min(i + step, count)) for i in range(1, count - step // 2, step)]
        windows += make_windows(recording, pieces, predictor, start.number(DELAY) / 1e3)
    return FitData(windows, start, _sigma(start))


def _sections(before: RobotParameters) -> RobotParameters:
    return before.part("controller", "joints", "payload", "transport", "sensors")


def _sigma(model: RobotParameters) -> tuple[float, float, float]:
    return (
        model.number("sensors.robot0_eef_pos.noise_m", 1e-3),
        model.number("sensors.robot0_eef_quat.noise_rad", 3e-3),
        model.number(f"sensors.{JOINT_POSITION}.noise_rad", 3e-4),
    )


def identify(
    predictors: Predictors,
    windows: Sequence[Window],
    start: RobotParameters,
    sigma: tuple[float, float, float],
    *,
    before: RobotParameters | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Fit:
    """Fit a robot model to windows, and look at those kept aside.

    Args:
        windows: The recording's; every fourth is kept aside.
        start: What is known before; the simulator's own values stand for the rest.
        sigma: Noise of position (m), rotation (rad) and joint readings (rad).
        before: What the errors before are of; the simulator's own robot, without delay, if None.

    Raises:
        DataError: There are too few windows, or the robot hardly moves in them.
    """
    if len(windows) < 6:
        raise DataError(f"{len(windows)} motions after a rest are too few to identify a robot; at least 6 are needed")
    traveled = float(np.median([np.ptp(w.position, axis=0).max() for w in windows]))
    if traveled < 20 * sigma[0] or traveled < 2e-3:
        raise DataError(
            f"the gripper moves by {1e3 * traveled:.1f} mm per motion, against {1e3 * sigma[0]:.2f} mm of noise; "
            "too little to identify a robot: move it further, or calibrate noise first"
        )
    held = [w for i, w in enumerate(windows) if i % 4 == 3]
    fitted = [w for i, w in enumerate(windows) if i % 4 != 3]
    sigma = max(sigma[0], _FLOOR_M), max(sigma[1], _FLOOR_RAD), max(sigma[2], _FLOOR_JOINT_RAD)
    problems = [Problem(predictors, [cut(w, length) for w in fitted], start, sigma) for length in _LENGTHS_S]
    count, most, problem = 0, sum(map(sum, _STEPS)) + 1, problems[-1]

    def solve(part: Problem, x: Array, steps: int) -> Array:
        def jacobian(x: Array) -> Array:
            nonlocal count
            count += 1
            progress(min(0.95, count / most))
            return part.jacobian(x)

        part.weigh(x)
        found = least_squares(
            part.residuals, x, jacobian, (part.low, part.high), x_scale=part.prior, max_nfev=steps, xtol=1e-4, ftol=1e-3
        )
        return np.asarray(found.x)

    x = problem.origin
    for part, rounds in zip(problems, _STEPS, strict=True):
        for steps in rounds:
            x = solve(part, x, steps)
    problem.weigh(x)
    rows, residual = problem.jacobian(x)[: -len(x)], problem.residuals(x)[: -len(x)]
    noise = float(np.median(np.abs(residual) * np.repeat(problem.scale, problem.sizes)) / 0.6745)
    curvature = np.asarray(rows.T @ rows + np.diag(1 / problem.prior**2), np.float64)
    values, spread, reference = _read(problem, x, _spread(problem, rows, residual, curvature))
    model, delay = problem.model(x)
    before = before or RobotParameters()
    after = model.having(start.part("sensors").values)
    ways = ((after, delay), (predictors.first.nominal.having(before.values), before.number(DELAY) / 1e3))
    after_held, before_held = (prediction_error(predictors, way, held) for way in ways)
    progress(1.0)
    told, hidden = spread < IDENTIFIED_SHARE * reference, spread > HIDDEN_SHARE * reference
    _, singular, turned = np.linalg.svd(rows * problem.prior, full_matrices=False)
    labels = tuple(p.label for p in problem.parameters)
    weakest = {labels[i]: round(float(turned[-1][i]), 3) for i in np.argsort(-np.abs(turned[-1]))[:3]}
    return Fit(
        model, 1e3 * delay, labels, values, spread, told, hidden, singular, weakest, after_held, before_held, noise,
        problem.measured(values, spread, told), curvature, x, reference, problem,
    )  # fmt: skip


def _read(problem: Problem, x: Array, spread_u: Array) -> tuple[Array, Array, Array]:
    """Values, spreads, and what shares of those count (P,), in the quantities' units."""
    values, spread, reference = [], [], []
    least = {DELAY: 50.0, "controller.actuator_delay_ms": 15.0, "payload.mass_kg": SMALLEST_MASS_KG}
    mass = next(float(u) for p, u in zip(problem.parameters, x, strict=True) if p.name == "payload.mass_kg")
    for p, u, s in zip(problem.parameters, x, spread_u, strict=True):
        value = float(np.exp(u)) if p.logarithmic else float(u)
        values.append(value)
        spread.append(value * s if p.logarithmic else s)
        reference.append(0.1 * max(mass, SMALLEST_MASS_KG) if p.name == MOMENT else max(value, least.get(p.name, 1e-6)))
    return np.array(values), np.array(spread), np.array(reference)


def _spread(problem: Problem, rows: Array, residual: Array, curvature: Array) -> Array:
    """Standard deviations (P,) in fitted units: what the noise allows, or what leaving out one window at a time changes.

    What goes wrong in a window (how it began, an edge of dry friction) goes wrong in all of its rows, so that the noise alone
    would promise too much. Efron's jackknife, each refit by one linear step; the prior's own uncertainty is in the first.
    """
    alone = np.sqrt(np.diag(np.linalg.inv(curvature)))
    changes, at = [], 0
    for size in problem.sizes:
        part = slice(at, at + size)
        left = curvature - rows[part].T @ rows[part]
        changes.append(np.linalg.lstsq(left, rows[part].T @ residual[part], rcond=None)[0])
        at += size
    spread = np.array(changes) - np.mean(changes, axis=0)
    jackknife = np.sqrt((len(changes) - 1) / len(changes) * np.sum(spread**2, axis=0))
    return np.asarray(np.maximum(alone, jackknife))


def prediction_error(predictors: Predictors, way: tuple[RobotParameters, float], windows: Sequence[Window]) -> float:
    """Root mean square of the gripper's error (m) under a model and command delay (s); the pose's known bias counts."""
    made = predictors.predict([way], windows)[0]
    bias = way[0].sensor("robot0_eef_pos").get("bias_m", np.zeros(3))
    squares = [np.sum((p.position + bias - w.position) ** 2, axis=1) for p, w in zip(made, windows, strict=True)]
    return float(np.sqrt(np.mean(np.concatenate(squares))))
