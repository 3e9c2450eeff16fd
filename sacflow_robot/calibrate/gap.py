"""The gap between a robot and its simulator: logged commands replayed, and the share of the error that each cause explains.

The error is that of the gripper's position as the control loop had it. Each cause is fitted alone, with the few numbers that
it has; what share of the squared error it takes away is what it explains. Shares of causes that look alike overlap.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from sacflow_robot.calibrate.predict import Predicted, Predictors, Window, make_windows
from sacflow_robot.calibrate.recording import Recording, bursts
from sacflow_robot.envs.robot_parameters import RobotParameters
from sacflow_robot.errors import DataError
from sacflow_robot.spec import Array

CAUSES = "delay", "gain", "friction", "payload", "noise", "pose_bias"
_PIECE_S, _MOST_WINDOWS = 1.0, 12
_DELAY, _LATE = "transport.command_delay_ms", "transport.observation_delay_ms"
_Way = Callable[[Array], tuple[RobotParameters, float]]

# By cause: quantities, the range in which their factors (of a single one, its value) are looked for, and the advice.
_FITTED: Mapping[str, tuple[tuple[str, ...], float, float, str]] = {
    "gain": (
        ("controller.translation_stiffness_per_s2", "controller.rotation_stiffness_per_s2"), 0.3, 3.0,
        "the controller's stiffness is {:.2f} times (turning {:.2f}) what the profile says; set it, or the gains",
    ),
    "friction": (
        ("joints.damping_nm_s_per_rad", "joints.friction_loss_nm"), 0.05, 6.0,
        "damping is about {:.1f} times and dry friction {:.1f} times what the profile says; run calibrate dynamics",
    ),
    "payload": (
        ("payload.mass_kg",), 0.0, 3.0,
        "the hand carries {:.2f} kg that the controller does not know of; tell it, or put it into the profile",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cause:
    """One cause."""

    name: str  # one of ``CAUSES``
    explains: float  # share of the squared error that it takes away alone; NaN where the log cannot tell
    left_m: float  # root mean square of what is then left (m)
    change: Mapping[str, tuple[Array, Array]]  # what to change in the profile: quantity, value now, value found
    advice: str  # what to do, for a person


@dataclass(frozen=True)
class Gap:
    """The report."""

    rmse_m: float  # root mean square of the gripper's error (m)
    joint_rmse_rad: Array | None  # of each joint (7,), where joints are logged
    causes: tuple[Cause, ...]  # the most telling first
    windows: list[Window]  # pieces of the log
    predicted: list[Predicted]  # what the profile's robot does in them
    better: list[Predicted]  # what it does with the first cause mended

    def summary(self) -> dict[str, Any]:
        """The report as plain numbers, for JSON; what the log cannot tell is None."""
        return {
            "rmse_m": self.rmse_m,
            "joint_rmse_rad": None if self.joint_rmse_rad is None else self.joint_rmse_rad.tolist(),
            "causes": [
                {
                    "cause": c.name,
                    "explains": c.explains if np.isfinite(c.explains) else None,
                    "left_m": c.left_m,
                    "change": {n: {"now": a.tolist(), "found": b.tolist()} for n, (a, b) in c.change.items()},
                }
                for c in self.causes
            ],
        }


def measure_gap(
    recordings: Sequence[Recording],
    predictors: Predictors,
    profile: RobotParameters,
    progress: Callable[[float], None] = lambda share: None,
) -> Gap:
    """Rank the causes of the difference between logged motion and what the profile's robot would have done.

    Raises:
        DataError: There is hardly any motion in the log.
    """
    delay_s = profile.number(_DELAY) / 1e3
    model = predictors.first.nominal.having(profile.values)
    chosen = _choose(recordings, predictors, delay_s)
    traveled = float(np.median([np.ptp(w.position, axis=0).max() for w, _ in chosen]))
    if traveled < 2e-3:
        raise DataError(
            f"the gripper moves by {1e3 * traveled:.1f} mm a second at most; nothing can be told from this log"
        )
    windows = [w for w, _ in chosen]
    # What the loop took for the present was older than the profile says: predictions are for the moments it believed in.
    known = [late >= 0 for _, late in chosen]
    late_s = float(np.median([late for _, late in chosen if late >= 0])) if any(known) else float("nan")
    older_s = (late_s - profile.number(_LATE) / 1e3) if any(known) else 0.0
    believed = [replace(w, time_s=w.time_s + older_s) for w in windows]
    noise = profile.sensor("robot0_eef_pos").get("noise_m", np.zeros(1))[0]
    fitter = _Fitter(predictors, model, delay_s, believed)
    base, made = fitter.error(model, delay_s, believed)
    found = []
    for done, name in enumerate(CAUSES):
        found.append(_cause(name, fitter, windows, base, late_s, float(noise)))
        progress((done + 1) / len(CAUSES))
    found.sort(key=lambda c: -(c[0].explains if np.isfinite(c[0].explains) else -1))
    joints = None
    if windows[0].joints is not None:
        squares = [(p.joints - w.joints) ** 2 for p, w in zip(made, windows, strict=True) if w.joints is not None]
        joints = np.sqrt(np.mean(np.concatenate(squares), axis=0))
    return Gap(base, joints, tuple(c for c, _ in found), windows, made, found[0][1] or made)


def _choose(recordings: Sequence[Recording], predictors: Predictors, delay_s: float) -> list[tuple[Window, float]]:
    """Windows with motion, spread over the log, each with how late its observations arrived (s; -1 unknown)."""
    found: list[tuple[Window, float]] = []
    for recording in recordings:
        length = round(_PIECE_S * recording.robot.control_rate_hz)
        pieces = bursts(recording)
        if len(pieces) < 4:
            count = len(recording.sent_ns)
            pieces = [(i, min(i + length, count)) for i in range(1, max(2, count - length // 2), length)]
        known = recording.received_ns >= 0
        late = (recording.received_ns - recording.time_ns)[known] / 1e9
        found += [(w, float(np.median(late)) if len(late) else -1.0)
                  for w in make_windows(recording, pieces, predictors.first, delay_s)]  # fmt: skip
    moving = [pair for pair in found if np.ptp(pair[0].position, axis=0).max() > 2e-3] or found
    if not moving:
        raise DataError("the log holds no second of motion to compare")
    return [moving[i] for i in np.unique(np.linspace(0, len(moving) - 1, _MOST_WINDOWS).astype(int))]


@dataclass(frozen=True)
class _Fitter:
    """Errors of models, and fits of a few numbers."""

    predictors: Predictors
    model: RobotParameters
    delay_s: float
    windows: list[Window]

    def off(self, made: Sequence[Predicted], windows: Sequence[Window]) -> Array:
        """Predicted less measured positions (M, 3)."""
        bias = self.model.sensor("robot0_eef_pos").get("bias_m", np.zeros(3))
        return np.concatenate([p.position + bias - w.position for p, w in zip(made, windows, strict=True)])

    def error(self, model: RobotParameters, delay_s: float, windows: Sequence[Window]) -> tuple[float, list[Predicted]]:
        made = self.predictors.predict([(model, delay_s)], windows)[0]
        return _rms(self.off(made, windows)), made

    def fit(
        self, way: _Way, start: list[float], low: list[float], high: list[float], windows: list[Window]
    ) -> tuple[Array, float, list[Predicted]]:
        """The numbers (P,) whose model fits best, what is left (m), and its predictions."""
        least, most = np.array(low), np.array(high)
        steps = np.maximum(0.02 * np.abs(start), 0.02 * (most - least))

        def residuals(models: Sequence[Array]) -> list[Array]:
            made = self.predictors.predict([way(x) for x in models], windows)
            return [self.off(m, windows).reshape(-1) / 1e-3 for m in made]

        def jacobian(x: Array) -> Array:
            signed = np.where(x + steps < most, steps, -steps)
            base, *others = residuals([x, *(x + np.diag(signed))])
            return np.stack([(r - base) / s for r, s in zip(others, signed, strict=True)], axis=1)

        inside = np.clip(start, least + 1e-3 * (most - least), most - 1e-3 * (most - least))
        found = least_squares(
            lambda x: residuals([x])[0], inside, jacobian, (least, most), x_scale=most - least,
            max_nfev=7, ftol=1e-2, xtol=1e-3,
        )  # fmt: skip
        return np.asarray(found.x), *self.error(*way(found.x), windows)


def _cause(
    name: str, f: _Fitter, windows: list[Window], base: float, late_s: float, noise: float
) -> tuple[Cause, list[Predicted] | None]:
    if name == "noise":
        return _noise(f.windows, base, noise), None
    if name == "pose_bias":
        return _pose_bias(f, base), None

    if name == "delay":
        x, left, made = f.fit(lambda x: (f.model, float(x[0])), [f.delay_s], [0.0], [0.4], windows)
        change = {_DELAY: (np.array([1e3 * f.delay_s]), 1e3 * x)}
        found = f"commands {1e3 * x[0]:.0f} ms"
        if np.isfinite(late_s):
            change[_LATE] = (np.array([f.model.number(_LATE)]), np.array([1e3 * late_s]))
            found += f", observations {1e3 * late_s:.0f} ms"
        text = f"set the delays: {found}; train with them, and with action history where they exceed a control period"
        return Cause(name, _explained(left, base), left, change, text), made
    names, least, most, text = _FITTED[name]
    old = {
        n: _values(f.model, n) if len(names) > 1 else np.ones(1) for n in names
    }  # two by a factor each, one as it is

    def way(x: Array) -> tuple[RobotParameters, float]:
        return f.model.having({n: list(s * old[n]) for n, s in zip(names, x, strict=True)}), f.delay_s

    start = [1.0] * len(names) if len(names) > 1 else list(_values(f.model, names[0]))
    x, left, made = f.fit(way, start, [least] * len(names), [most] * len(names), f.windows)
    model, text = way(x)[0], text.format(*x)
    changes = {n: (_values(f.model, n), _values(model, n)) for n in names}
    return Cause(name, _explained(left, base), left, changes, text), made


def _values(model: RobotParameters, name: str) -> Array:
    return np.array(model.values[name])


def _noise(windows: Sequence[Window], base: float, known: float) -> Cause:
    """From third differences of what was observed, in which smooth motion does not show."""
    thirds = [np.diff(w.position, 3, axis=0) for w in windows if len(w.position) > 6]
    sizes = [np.median(np.abs(third)) / 0.6745 / np.sqrt(20) for third in thirds]
    size = float(np.median(sizes)) if sizes else 0.0
    variance = 3 * max(0.0, size**2 - known**2)
    left = float(np.sqrt(max(0.0, base**2 - variance)))
    text = f"the gripper's position has {1e3 * size:.1f} mm of noise; filter it, or train with it"
    name = "sensors.robot0_eef_pos.noise_m"
    return Cause("noise", min(1.0, variance / base**2), left, {name: (np.array([known]), np.array([size]))}, text)


def _pose_bias(f: _Fitter, base: float) -> Cause:
    if f.windows[0].joints is None:
        text = "the log has no joint positions, without which a biased pose looks like another place"
        return Cause("pose_bias", float("nan"), base, {}, text)
    off = []
    for w in f.windows:
        some = slice(None, None, max(1, len(w.position) // 40))
        off.append(w.position[some] - f.predictors.first.forward(np.asarray(w.joints)[some])[0])
    bias = np.mean(np.concatenate(off), axis=0)
    _, made = f.error(f.model, f.delay_s, f.windows)
    own = f.model.sensor("robot0_eef_pos").get("bias_m", np.zeros(3))
    left = _rms(f.off(made, f.windows) + (bias - own))
    text = f"the pose is off by {1e3 * np.linalg.norm(bias):.1f} mm from what the joints say; run calibrate handeye, check the tool frame"
    return Cause("pose_bias", _explained(left, base), left, {"sensors.robot0_eef_pos.bias_m": (own, bias)}, text)


def _rms(off: Array) -> float:
    return float(np.sqrt(np.mean(np.sum(off**2, axis=1))))


def _explained(left: float, base: float) -> float:
    return float(np.clip(1 - (left / base) ** 2, 0, 1))
