"""The least-squares problem of an identification: parameters with bounds and weak priors, and how far a model's predictions are from it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sacflow_robot.calibrate.predict import Predicted, Predictors, Window
from sacflow_robot.calibrate.recording import Values
from sacflow_robot.envs.robot_parameters import JOINTS, RobotParameters
from sacflow_robot.spec import Array
from sacflow_robot.utils.rotations import rotation_between

_ROWS_EVERY_S = 0.01  # residuals closer to each other than this say the same thing twice
_ROUGHLY = 0.5  # a joint's value goes into a profile if it is known to this share of it, with what it is unsure by


@dataclass(frozen=True)
class Parameter:
    """One number that is fitted."""

    name: str  # name of the quantity
    index: int | None  # which of its numbers; None for a common factor of all
    logarithmic: bool  # whether its logarithm is fitted
    prior: float  # standard deviation of the weak prior, in fitted units
    low: float  # lower bound in the quantity's unit, or of the factor
    high: float  # upper bound
    step: float  # for finite differences, in fitted units

    @property
    def label(self) -> str:
        return self.name if self.index is None else f"{self.name}[{self.index}]"


DELAY = "transport.command_delay_ms"
MOMENT = "payload.moment_kg_m"  # mass times center, which is what the data see


def parameters(joints_seen: bool) -> list[Parameter]:
    """The parameters that are fitted: joint by joint where joints are observed, else common factors of all joints."""
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


class Problem:
    """Residuals of a set of windows as a function of fitted units (P,).

    Args:
        start: Where the values begin: a robot model over the simulator's nominal one.
        sigma: Standard deviations of position (m), rotation (rad) and joints (rad).
    """

    def __init__(
        self, predictors: Predictors, windows: Sequence[Window], start: RobotParameters, sigma: tuple[float, ...]
    ) -> None:
        self._predictors, self._sigma = predictors, sigma
        thinned = (np.append(True, np.diff(np.floor(w.time_s / _ROWS_EVERY_S)) > 0) for w in windows)
        self._windows = [_only(w, rows) for w, rows in zip(windows, thinned, strict=True)]
        self._last: tuple[Array, Array] | None = None  # where the Jacobian was found last, and that of the data
        self.scale = np.ones(len(windows))  # of each window's errors, in standard deviations of the sensors
        columns = JOINTS if windows[0].joints is not None else 6
        self.sizes = [columns * len(w.time_s) for w in self._windows]
        self.base = predictors.first.nominal.having(start.part("controller", "joints", "payload").values)
        self.parameters = parameters(windows[0].joints is not None)
        self.origin = np.array([self._fitted_unit(p, start) for p in self.parameters])
        bounds = [np.log([p.low, p.high]) if p.logarithmic else (p.low, p.high) for p in self.parameters]
        self.low, self.high = np.array(bounds).T
        self.origin = np.clip(self.origin, self.low + 1e-6, self.high - 1e-6)
        self.prior = np.array([p.prior for p in self.parameters])

    def _fitted_unit(self, p: Parameter, start: RobotParameters) -> float:
        if p.name == DELAY:
            return start.number(DELAY)
        if p.name == MOMENT:
            return self.base.number("payload.mass_kg") * self.base.values["payload.center_m"][p.index or 0]
        if p.index is None and p.name.startswith("joints."):
            return 0.0
        value = self.base.values[p.name][p.index or 0]
        return float(np.log(max(value, 1e-3))) if p.logarithmic else value

    def model(self, x: Array) -> tuple[RobotParameters, float]:
        """The robot model and command delay (s) that fitted units (P,) stand for."""
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
        values["payload.center_m"] = list(np.clip(moment / mass if mass > 1e-3 else moment * 0, -1, 1))
        return RobotParameters({name: tuple(map(float, v)) for name, v in values.items()}), delay

    def weigh(self, x: Array) -> None:
        """Let every window count by how well it is predicted there: how it began, or an edge of dry friction, may spoil it."""
        parts = np.split(self._off(x), np.cumsum(self.sizes)[:-1])
        self.scale = np.array([max(1.0, float(np.sqrt(np.mean(part**2)))) for part in parts])

    def residuals(self, x: Array) -> Array:
        return np.concatenate([self._off(x) / self._scales, (x - self.origin) / self.prior])

    def measured(self, fit_values: Array, spread: Array, told: npt.NDArray[np.bool_]) -> Values:
        """Value and standard deviation of every quantity of which the data tell something, by name."""
        model = self.model(
            np.array([np.log(v) if p.logarithmic else v for p, v in zip(self.parameters, fit_values, strict=True)])
        )[0]
        found: Values = {}
        for p, s, v, known in zip(self.parameters, spread, fit_values, told, strict=True):
            joint = p.name.startswith("joints.")
            if p.name == MOMENT or not (known or (joint and s < _ROUGHLY * max(abs(v), 0.1)) or p.name in found):
                continue
            value = np.array([v]) if p.name == DELAY else np.array(model.values[p.name])
            # Of joints that the data hardly tell, the value is where the fit left it, as unsure as the fit says.
            rough = np.maximum(np.abs(value), 0.1) if joint and p.index is not None else np.zeros(len(value))
            old = found.get(p.name, (value, rough))[1].copy()
            places = range(len(value)) if p.index is None else [p.index]
            for i in places:
                old[i] = s * (value[i] / v if joint and p.index is None else 1)
            found[p.name] = value, old
        moment = [(s, known) for p, s, known in zip(self.parameters, spread, told, strict=True) if p.name == MOMENT]
        if "payload.mass_kg" in found and all(known for _, known in moment):
            spreads = np.array([s for s, _ in moment]) / max(found["payload.mass_kg"][0][0], 0.05)
            found["payload.center_m"] = np.array(model.values["payload.center_m"]), spreads
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


def cut(window: Window, length_s: float) -> Window:
    """The beginning of a window; all of a shorter one."""
    first = float(window.time_s[0])
    rows = window.time_s <= first + length_s
    return replace(_only(window, rows), seconds=min(window.seconds, first + length_s + 0.02))


def _only(window: Window, rows: npt.NDArray[np.bool_]) -> Window:
    names = [name for name in ("time_s", "position", "quat", "joints") if getattr(window, name) is not None]
    return replace(window, **{name: getattr(window, name)[rows] for name in names})


def _residual(window: Window, made: Predicted, sigma: tuple[float, ...]) -> Array:
    """Differences in standard deviations. With joint readings, poses say nothing more, and may be biased."""
    if window.joints is not None:
        return ((made.joints - window.joints) / sigma[2]).reshape(-1)
    moved = (made.position - window.position) / sigma[0]
    turned = rotation_between(window.quat, made.quat) / sigma[1]
    return np.concatenate([moved.reshape(-1), turned.reshape(-1)])
