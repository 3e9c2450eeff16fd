"""System identification: the arm model whose predictions fit a recording best, and what the recording can't tell.

Bounded least squares (SciPy) over windows of a recording. Each parameter has a weak prior, as wide as what is physically
plausible, that keeps in place what the data can't tell. What the data can tell is read off the curvature at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from sacflow_robot.armmodel import JOINTS, ArmModel
from sacflow_robot.calibrate.predict import Predicted, Predictors, Window
from sacflow_robot.errors import DataError
from sacflow_robot.poses import rotation_between

Array = npt.NDArray[np.float64]

IDENTIFIED_SHARE = 1 / 30
"""A parameter counts as identified if one standard deviation is at most this share of its value: three are 10 %."""

HIDDEN_SHARE = 0.15
"""The data say nothing of a parameter if one standard deviation is more than this share of its value: two are 30 %."""

SMALLEST_MASS_KG = 0.05
"""Loads are told to within ``IDENTIFIED_SHARE`` of this or of their value, whichever is more."""

_ROWS_EVERY_S = 0.01  # residuals closer to each other than this say the same thing twice
_FLOOR_M, _FLOOR_RAD, _FLOOR_JOINT_RAD = 2e-4, 1e-3, 2e-4  # what windows' beginnings and rounded times leave
_ROUGHLY = 0.5  # a joint's value goes into a profile if it is known to this share of it, with what it is unsure by
# What a wrong model does in the first half second of a motion is not yet beyond repair; after 1.25 s the arm rests.
_LENGTHS_S = 0.5, 1.25
_STEPS = (4, 4), (2, 2)  # most evaluations over each, windows being weighed anew before each


@dataclass(frozen=True)
class Parameter:
    """One number that is fitted.

    Attributes:
        name: Name of the quantity.
        index: Which of its numbers; None for a common factor of all.
        logarithmic: Whether its logarithm is fitted.
        prior: Standard deviation of the weak prior, in fitted units.
        low: Lower bound in the quantity's unit, or of the factor.
        high: Upper bound.
        step: For finite differences, in fitted units.
    """

    name: str
    index: int | None
    logarithmic: bool
    prior: float
    low: float
    high: float
    step: float

    @property
    def label(self) -> str:
        return self.name if self.index is None else f"{self.name}[{self.index}]"


DELAY = "transport.command_delay_ms"
MOMENT = "payload.moment_kg_m"  # mass times centre, which is what the data see


def parameters(joints_seen: bool) -> list[Parameter]:
    """What is fitted: joint by joint where joints are observed, else common factors of all joints."""
    found = [
        Parameter(DELAY, None, False, 100.0, 0, 400, 1.0),
        Parameter("controller.translation_stiffness_per_s2", None, True, 1.0, 20, 1500, 0.01),
        Parameter("controller.rotation_stiffness_per_s2", None, True, 1.0, 20, 1500, 0.01),
        Parameter("controller.damping_ratio", None, True, 0.1, 0.3, 3, 0.01),
        Parameter("controller.actuator_delay_ms", None, False, 3.0, 0, 15, 1.0),
        Parameter("joints.armature_kg_m2", None, True, 0.2, 0.3, 3, 0.01),
        Parameter("payload.mass_kg", None, False, 0.5, 0, 5, 0.02),
        *(Parameter(MOMENT, i, False, 0.03, -0.5, 0.5, 0.002) for i in range(3)),
    ]
    for name in ("joints.damping_nm_s_per_rad", "joints.friction_loss_nm"):
        places: Sequence[int | None] = range(JOINTS) if joints_seen else [None]
        # Torques add up, so that the motion is nearly linear in them; a factor of all joints' is not far from 1.
        found += [Parameter(name, i, i is None, 3.0, 0.01 if i is None else 0, 50, 0.03) for i in places]
    return found


@dataclass(frozen=True)
class Fit:
    """What came of an identification.

    Attributes:
        model: The arm model found, with the values before in the place of what the data can't tell.
        delay_ms: Delay of commands.
        labels: Of the parameters fitted (P,).
        values: Their values (P,), in the quantities' units.
        spread: One standard deviation of each (P,), in the same units.
        identified: Whether the data tell it (P,).
        hidden: Whether they say nothing of it (P,); of what is neither, they tell something, but not to 10 %.
        singular_values: Of the Jacobian in units of the priors (P,), largest first: below 1 the prior says more than the data.
        weakest: The combination that the data tell least, as shares of parameters by label.
        train_rmse_m, train_before_m: Gripper error over the windows fitted to, after and before.
        held_out_rmse_m, held_out_before_m: The same over windows that were not.
        measured: What to put into a profile: value and one standard deviation, by name.
        noise: Residuals' size beside what the sensors' noise explains; near 1 where the model explains all.
        curvature: Of the data's and priors' log likelihood (P, P), in fitted units.
        fitted: Where it is highest (P,), in fitted units.
        reference: What shares of ``spread`` are of (P,): values, or the least that counts.
    """

    model: ArmModel
    delay_ms: float
    labels: tuple[str, ...]
    values: Array
    spread: Array
    identified: npt.NDArray[np.bool_]
    hidden: npt.NDArray[np.bool_]
    singular_values: Array
    weakest: dict[str, float]
    train_rmse_m: float
    train_before_m: float
    held_out_rmse_m: float
    held_out_before_m: float
    noise: float
    measured: dict[str, tuple[Array, Array]]
    curvature: Array
    fitted: Array
    reference: Array
    problem: Problem = field(repr=False)

    def moved(self, index: int, by: float) -> tuple[ArmModel, float]:
        """The arm model and command delay (s) with one parameter moved in fitted units, the others making up for it."""
        rest = np.arange(len(self.fitted)) != index
        x = self.fitted.copy()
        x[index] += by
        x[rest] -= by * np.linalg.solve(self.curvature[np.ix_(rest, rest)], self.curvature[rest, index])
        return self.problem.model(np.clip(x, self.problem.low, self.problem.high))


class Problem:
    """Residuals of a set of windows as a function of fitted units (P,).

    Args:
        predictors: The simulator.
        windows: What is to be predicted.
        start: Where the values begin: an arm model over the simulator's nominal one.
        sigma: Standard deviations of position (m), rotation (rad) and joints (rad).
    """

    def __init__(
        self, predictors: Predictors, windows: Sequence[Window], start: ArmModel, sigma: tuple[float, float, float]
    ) -> None:
        self._predictors, self._windows, self._sigma = predictors, [_thinned(w) for w in windows], sigma
        self._last: tuple[Array, Array] | None = None  # where the Jacobian was found last, and that of the data
        self.scale = np.ones(len(windows))  # of each window's errors, in standard deviations of the sensors
        columns = JOINTS if windows[0].joints is not None else 6
        self.sizes = [columns * len(w.time_s) for w in self._windows]
        self.base = predictors.first.nominal.having(start.part("controller", "joints", "payload").values)
        self.parameters = parameters(windows[0].joints is not None)
        self.origin = np.array([self._fitted_unit(p, start) for p in self.parameters])
        bounds = np.array([self._bounds(p) for p in self.parameters])
        self.low, self.high = bounds.T
        self.origin = np.clip(self.origin, self.low + 1e-6, self.high - 1e-6)
        self.prior = np.array([p.prior for p in self.parameters])

    def _fitted_unit(self, p: Parameter, start: ArmModel) -> float:
        if p.name == DELAY:
            return start.number(DELAY)
        if p.name == MOMENT:
            centre = self.base.array("payload.centre_m")
            assert centre is not None and p.index is not None
            return float(self.base.number("payload.mass_kg") * centre[p.index])
        if p.index is None and p.name.startswith("joints."):
            return 0.0
        found = self.base.array(p.name)
        assert found is not None
        value = float(found[p.index or 0])
        return float(np.log(max(value, 1e-3))) if p.logarithmic else value

    def _bounds(self, p: Parameter) -> tuple[float, float]:
        return (float(np.log(p.low)), float(np.log(p.high))) if p.logarithmic else (p.low, p.high)

    def model(self, x: Array) -> tuple[ArmModel, float]:
        """The arm model and command delay (s) that fitted units (P,) stand for."""
        values = {name: list(v) for name, v in self.base.values.items()}
        delay, moment = 0.0, np.zeros(3)
        for p, u in zip(self.parameters, x, strict=True):
            number = float(np.exp(u)) if p.logarithmic else float(u)
            if p.name == DELAY:
                delay = number / 1e3
            elif p.name == MOMENT:
                moment[p.index or 0] = number
            elif p.index is None and p.name.startswith("joints."):
                values[p.name] = [number * v for v in values[p.name]]
            else:
                values[p.name][p.index or 0] = number
        mass = values["payload.mass_kg"][0]
        values["payload.centre_m"] = list(np.clip(moment / mass if mass > 1e-3 else moment * 0, -1, 1))
        return ArmModel({name: tuple(map(float, v)) for name, v in values.items()}), delay

    def weigh(self, x: Array) -> None:
        """Let every window count by how well it is predicted there: how it began, or an edge of dry friction, may spoil it."""
        parts = np.split(self._off(x), np.cumsum(self.sizes)[:-1])
        self.scale = np.array([max(1.0, float(np.sqrt(np.mean(part**2)))) for part in parts])

    def residuals(self, x: Array) -> Array:
        return np.concatenate([self._off(x) / self._scales, (x - self.origin) / self.prior])

    def measured(self, fit_values: Array, spread: Array, told: npt.NDArray[np.bool_]) -> dict[str, tuple[Array, Array]]:
        """Value and standard deviation of every quantity of which the data tell something, by name."""
        model = self.model(
            np.array([np.log(v) if p.logarithmic else v for p, v in zip(self.parameters, fit_values, strict=True)])
        )[0]
        found: dict[str, tuple[Array, Array]] = {}
        for p, s, v, known in zip(self.parameters, spread, fit_values, told, strict=True):
            joint = p.name.startswith("joints.")
            if p.name == MOMENT or not (known or (joint and s < _ROUGHLY * max(abs(v), 0.1)) or p.name in found):
                continue
            value = np.array([v]) if p.name == DELAY else model.array(p.name)
            assert value is not None
            # Of joints that the data hardly tell, the value is where the fit left it, as unsure as the fit says.
            rough = np.maximum(np.abs(value), 0.1) if joint and p.index is not None else np.zeros(len(value))
            old = found.get(p.name, (value, rough))[1].copy()
            places = range(len(value)) if p.index is None else [p.index]
            for i in places:
                old[i] = s * (value[i] / v if joint and p.index is None else 1)
            found[p.name] = value, old
        moment = [(s, known) for p, s, known in zip(self.parameters, spread, told, strict=True) if p.name == MOMENT]
        if "payload.mass_kg" in found and all(known for _, known in moment):
            centre = model.array("payload.centre_m")
            assert centre is not None
            found["payload.centre_m"] = (
                centre,
                np.array([s for s, _ in moment]) / max(found["payload.mass_kg"][0][0], 0.05),
            )
        return found

    def jacobian(self, x: Array) -> Array:
        """By finite differences; where it has just been found it is not found again, however windows count."""
        if self._last is None or not np.allclose(x, self._last[0], rtol=0, atol=1e-8):
            up = [x[i] + p.step < self.high[i] for i, p in enumerate(self.parameters)]
            steps = np.array([p.step if way else -p.step for p, way in zip(self.parameters, up, strict=True)])
            moved = [x, *(x + np.diag(steps))]
            made = self._predictors.predict([self.model(m) for m in moved], self._windows)
            base, *others = (self._compared(m) for m in made)
            self._last = x.copy(), np.stack([(o - base) / s for o, s in zip(others, steps, strict=True)], axis=1)
        return np.concatenate([self._last[1] / self._scales[:, None], np.diag(1 / self.prior)])

    @property
    def _scales(self) -> Array:
        return np.repeat(self.scale, self.sizes)

    def _off(self, x: Array) -> Array:
        return self._compared(self._predictors.predict([self.model(x)], self._windows)[0])

    def _compared(self, made: Sequence[Predicted]) -> Array:
        return np.concatenate([_residual(w, p, self._sigma) for w, p in zip(self._windows, made, strict=True)])


def identify(
    predictors: Predictors,
    windows: Sequence[Window],
    start: ArmModel,
    sigma: tuple[float, float, float],
    *,
    before: ArmModel | None = None,
    held_out_share: float = 0.25,
    progress: Callable[[float], None] = lambda share: None,
) -> Fit:
    """Fit an arm model to windows, and look at those kept aside.

    Args:
        predictors: The simulator.
        windows: The recording's; every fourth or so is kept aside.
        start: What is known before; the simulator's own values stand for the rest.
        sigma: Noise of position (m), rotation (rad) and joint readings (rad).
        before: What the errors before are of; the simulator's own arm, without delay, if None.
        held_out_share: Share of windows kept aside.
        progress: Told the share done.

    Raises:
        DataError: There are too few windows, or the arm hardly moves in them.
    """
    if len(windows) < 6:
        raise DataError(f"{len(windows)} motions after a rest are too few to identify an arm; at least 6 are needed")
    travelled = float(np.median([np.ptp(w.position, axis=0).max() for w in windows]))
    if travelled < 20 * sigma[0] or travelled < 2e-3:
        raise DataError(
            f"the gripper moves by {1e3 * travelled:.1f} mm per motion, against {1e3 * sigma[0]:.2f} mm of noise; "
            "too little to identify an arm: move it further, or calibrate noise first"
        )
    every = max(2, round(1 / held_out_share))
    held = [w for i, w in enumerate(windows) if i % every == every - 1]
    fitted = [w for i, w in enumerate(windows) if i % every != every - 1]
    sigma = max(sigma[0], _FLOOR_M), max(sigma[1], _FLOOR_RAD), max(sigma[2], _FLOOR_JOINT_RAD)
    problems = [Problem(predictors, [_cut(w, length) for w in fitted], start, sigma) for length in _LENGTHS_S]
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
    curvature = rows.T @ rows + np.diag(1 / problem.prior**2)
    read = _read(problem, x, _spread(problem, rows, residual, curvature))
    model, delay = problem.model(x)
    before = before or ArmModel()
    after = model.having(start.part("sensors").values)
    ways = ((after, delay), (predictors.first.nominal.having(before.values), before.number(DELAY) / 1e3))
    errors = [prediction_error(predictors, way, part) for part in (fitted, held) for way in ways]
    progress(1.0)
    after_fit, before_fit, after_held, before_held = errors
    values, spread, reference = read
    told, hidden = spread < IDENTIFIED_SHARE * reference, spread > HIDDEN_SHARE * reference
    _, singular, turned = np.linalg.svd(rows * problem.prior, full_matrices=False)
    labels = tuple(p.label for p in problem.parameters)
    weakest = {labels[i]: round(float(turned[-1][i]), 3) for i in np.argsort(-np.abs(turned[-1]))[:3]}
    return Fit(
        model, 1e3 * delay, labels, values, spread, told, hidden, singular, weakest, after_fit, before_fit, after_held,
        before_held, noise, problem.measured(values, spread, told), curvature, x, reference, problem,
    )  # fmt: skip


def _read(problem: Problem, x: Array, spread_u: Array) -> tuple[Array, Array, Array]:
    """Values, spreads, and what shares of those count (P,), in the quantities' units."""
    values, spread, reference = [], [], []
    mass = next(float(u) for p, u in zip(problem.parameters, x, strict=True) if p.name == "payload.mass_kg")
    for p, u, s in zip(problem.parameters, x, spread_u, strict=True):
        value = float(np.exp(u)) if p.logarithmic else float(u)
        values.append(value)
        spread.append(value * s if p.logarithmic else s)
        least = {DELAY: 50.0, "controller.actuator_delay_ms": 15.0, "payload.mass_kg": SMALLEST_MASS_KG}.get(
            p.name, 1e-6
        )
        reference.append(0.1 * max(mass, SMALLEST_MASS_KG) if p.name == MOMENT else max(value, least))
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


def _cut(window: Window, length_s: float) -> Window:
    """The beginning of a window; all of a shorter one."""
    first = float(window.time_s[0])
    rows = window.time_s <= first + length_s
    joints = None if window.joints is None else window.joints[rows]
    seconds = min(window.seconds, first + length_s + 0.02)
    return replace(
        window, time_s=window.time_s[rows], position=window.position[rows], quat=window.quat[rows], joints=joints,
        seconds=seconds,
    )  # fmt: skip


def _thinned(window: Window) -> Window:
    rows = np.flatnonzero(np.append(True, np.diff(np.floor(window.time_s / _ROWS_EVERY_S)) > 0))
    joints = None if window.joints is None else window.joints[rows]
    return Window(
        *(
            window.commands,
            window.start,
            window.rest,
            window.time_s[rows],
            window.position[rows],
            window.quat[rows],
            joints,
        ),
        window.seconds,
    )


def _residual(window: Window, made: Predicted, sigma: tuple[float, float, float]) -> Array:
    """Differences in standard deviations. With joint readings, poses say nothing more, and may be biased."""
    if window.joints is not None:
        return ((made.joints - window.joints) / sigma[2]).reshape(-1)
    moved = (made.position - window.position) / sigma[0]
    turned = rotation_between(window.quat, made.quat) / sigma[1]
    return np.concatenate([moved.reshape(-1), turned.reshape(-1)])


def prediction_error(predictors: Predictors, way: tuple[ArmModel, float], windows: Sequence[Window]) -> float:
    """Root mean square of the gripper's error (m) under a model and command delay (s); the pose's known bias counts."""
    made = predictors.predict([way], windows)[0]
    bias = way[0].sensor("robot0_eef_pos").get("bias_m", np.zeros(3))
    squares = [np.sum((p.position + bias - w.position) ** 2, axis=1) for p, w in zip(made, windows, strict=True)]
    return float(np.sqrt(np.mean(np.concatenate(squares))))
