"""The contract that travels inside every policy file and log, and is checked at every door.

``RobotSpec`` says what a robot offers and accepts; ``PolicySpec`` says which robot a policy was made for and how it is
called. Both turn to JSON and back without loss, and carry a fingerprint (SHA-256 of the canonical JSON).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sacflow_robot.errors import DataError, InvalidValueError, UsageError

# What parsing JSON of the wrong form raises.
_UNREADABLE = KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError

_MOST = 1_000_000  # a chunk length, number of Euler steps or extent beyond this is damage

FloatArray = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]
Observation = Mapping[str, FloatArray]

# What steps a simulated robot: robosuite's controllers in Python, or the same in machine code, equal to rounding.
Engine = Literal["stock", "compiled"]

# In place of an environment's name: there is none of this robot, and learning is from what was recorded alone.
NO_ENVIRONMENT = "none"


@dataclass(frozen=True)
class ArraySpec:
    """One observation array, without batch or time axis. An image enters the system as such an array: uint8
    (H, W, 3), RGB."""

    key: str  # name, robomimic's where robomimic has one
    shape: tuple[int, ...]  # shape of one sample
    unit: str  # unit of its entries, e.g. ``"m"``
    frame: str = ""  # frame that it is expressed in, e.g. ``"world"``; empty where none applies
    dtype: str = "float32"  # NumPy name of its entries' type
    # where in the flattened array a unit quaternion x y z w starts. A hint for learners, which have to know that q and
    # -q are one rotation; robots that differ in it alone fit each other
    quaternions: tuple[int, ...] = field(default=(), compare=False)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class RobotSpec:
    """Observations that a robot gives and actions that it takes."""

    robot: str  # robot and gripper, e.g. ``"Panda"``
    task: str  # task that the observation belongs to, e.g. ``"lift"``
    controller: str  # controller that interprets the action, e.g. ``"OSC_POSE delta"``
    control_rate_hz: float  # actions per second
    observations: tuple[ArraySpec, ...]  # the observation's arrays, in the order in which they are flattened
    action_names: tuple[str, ...]  # one name per action dimension, A of them
    action_units: tuple[str, ...]  # what 1.0 means in each dimension, e.g. ``"0.05 m"``
    action_low: tuple[float, ...]  # lower bound per dimension
    action_high: tuple[float, ...]  # upper bound per dimension

    @property
    def action_dim(self) -> int:
        return len(self.action_names)

    @property
    def observation_dim(self) -> int:
        return sum(array.size for array in self.observations)

    @property
    def quaternions(self) -> tuple[int, ...]:
        """Indices in the flattened observation at which a unit quaternion starts."""
        starts = np.cumsum([0, *(array.size for array in self.observations)])
        return tuple(int(s) + q for s, a in zip(starts, self.observations, strict=False) for q in a.quaternions)

    @property
    def period_ns(self) -> int:
        """Nominal time between observations (ns)."""
        return round(1e9 / self.control_rate_hz)

    @property
    def action_bounds(self) -> tuple[FloatArray, FloatArray]:
        """Lower and upper bound (A,), (A,)."""
        return np.array(self.action_low, np.float32), np.array(self.action_high, np.float32)

    @property
    def has_unit_actions(self) -> bool:
        """True if every action dimension goes from -1 to 1, the range of network outputs."""
        return set(self.action_low) == {-1.0} and set(self.action_high) == {1.0}

    @property
    def action_scale(self) -> tuple[FloatArray, FloatArray]:
        """Middle and half of the range of each action dimension (A,), (A,): what 0 and a step of 1 are in -1 to 1."""
        low, high = np.array(self.action_low), np.array(self.action_high)
        return ((low + high) / 2).astype(np.float32), ((high - low) / 2).astype(np.float32)

    def with_unit_actions(self) -> "RobotSpec":
        """The robot if its actions went from -1 to 1.

        Raises:
            UsageError: An action dimension has no bounds, or no room between them.
        """
        for name, low, high in zip(self.action_names, self.action_low, self.action_high, strict=True):
            if not -math.inf < low < high < math.inf:
                raise UsageError(
                    f"robot {self.robot!r}: action {name} goes from {low:g} to {high:g}; expected bounds, so that a policy "
                    "can learn what lies between them"
                )
        return replace(self, action_low=(-1.0,) * self.action_dim, action_high=(1.0,) * self.action_dim)

    def to_unit(self, actions: FloatArray) -> FloatArray:
        """Actions (..., A) of the robot as -1 to 1, from lower to upper bound."""
        if self.has_unit_actions:
            return actions
        middle, half = self.action_scale
        return np.clip((actions - middle) / half, -1, 1).astype(np.float32)

    def from_unit(self, unit: FloatArray) -> FloatArray:
        """Inverse of :meth:`to_unit`, within the bounds."""
        if self.has_unit_actions:
            return unit
        middle, half = self.action_scale
        return np.clip(middle + half * unit, *self.action_bounds).astype(np.float32)

    def to_json(self) -> str:
        return _canonical(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "RobotSpec":
        """Rebuild from ``asdict`` or parsed JSON.

        Raises:
            DataError: Fields are missing or unknown.
        """
        try:
            arrays = tuple(
                ArraySpec(
                    *(str(a["key"]), tuple(map(int, a["shape"])), str(a["unit"]), str(a["frame"]), str(a["dtype"])),
                    tuple(map(int, a.get("quaternions", ()))),
                )
                for a in data["observations"]
            )
            robot, task, controller = (str(data[name]) for name in ("robot", "task", "controller"))
            names, units = (tuple(map(str, data[name])) for name in ("action_names", "action_units"))
            low, high = (tuple(map(float, data[name])) for name in ("action_low", "action_high"))
            spec = RobotSpec(robot, task, controller, float(data["control_rate_hz"]), arrays, names, units, low, high)
            per_action = {len(values) for values in (names, units, low, high)}
            extents = [n for array in arrays for n in array.shape]
            if len(per_action) != 1 or not arrays or not all(1 <= n <= _MOST for n in (*extents, *per_action)):
                raise ValueError("array shapes or action dimensions are out of range")
            if any(not 0 <= q <= array.size - 4 for array in arrays for q in array.quaternions):
                raise ValueError("a quaternion lies outside its array")
            if not 0 < spec.control_rate_hz < float("inf"):
                raise ValueError(f"control_rate_hz {spec.control_rate_hz}")
            return spec
        except _UNREADABLE as error:
            reason = f"robot specification cannot be read ({error!r}); was it written by another version?"
            raise DataError(reason) from None

    def differences(self, other: "RobotSpec") -> list[str]:
        """Each field in which ``other`` differs, as ``"field: mine, theirs"``; empty when the two fit."""
        found = []
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if mine == theirs:
                continue
            if f.name == "observations":
                a, b = ({array.key: array for array in arrays} for arrays in (mine, theirs))
                unequal = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
                found += [f"observation {key}: {_brief(a.get(key))}, {_brief(b.get(key))}" for key in unequal]
                if not unequal:
                    found.append(f"order of observations: {', '.join(a)}, {', '.join(b)}")
            else:
                found.append(f"{f.name}: {mine}, {theirs}")
        return found

    def check_observation(
        self, observation: Mapping[str, Any], batch_shape: tuple[int, ...] = ()
    ) -> dict[str, FloatArray]:
        """Return the observation as contiguous arrays of shape ``batch_shape + shape`` and the declared dtype.

        Raises:
            InvalidValueError: A key is missing, a shape differs, or a value is not finite.
        """
        checked = {}
        for spec in self.observations:
            if spec.key not in observation:
                keys = ", ".join(a.key for a in self.observations)
                raise InvalidValueError(f"observation lacks {spec.key!r}; expected the keys {keys}")
            array = np.asarray(observation[spec.key], dtype=spec.dtype, order="C")
            if array.shape != batch_shape + spec.shape:
                raise InvalidValueError(
                    f"observation {spec.key!r} has shape {array.shape}, expected {batch_shape + spec.shape}"
                )
            if array.dtype.kind == "f" and not all_finite(array):
                raise InvalidValueError(
                    f"observation {spec.key!r} contains NaN or infinity; check the sensor behind it"
                )
            checked[spec.key] = array
        return checked

    def check_action(self, action: npt.ArrayLike) -> FloatArray:
        """Return one action (A,) as float32, clipped to the bounds.

        Raises:
            InvalidValueError: The shape differs or a value is not finite.
        """
        array = np.asarray(action, dtype=np.float32)
        if array.shape != (self.action_dim,):
            raise InvalidValueError(f"action has shape {array.shape}, expected ({self.action_dim},)")
        if not all_finite(array):
            raise InvalidValueError("action contains NaN or infinity; it was not sent to the robot")
        low, high = self.action_bounds
        return np.clip(array, low, high)

    def flatten(self, observation: Mapping[str, npt.NDArray[Any]]) -> FloatArray:
        """Concatenate an observation's arrays (..., shape) into (..., observation_dim) float32, in spec order."""
        parts = [
            np.asarray(observation[a.key], np.float32).reshape(*observation[a.key].shape[: -len(a.shape)], a.size)
            for a in self.observations
        ]
        return np.concatenate(parts, axis=-1)

    def unflatten(self, flat: FloatArray) -> dict[str, FloatArray]:
        """Inverse of :meth:`flatten`: views of the arrays in (..., observation_dim)."""
        arrays, start = {}, 0
        for a in self.observations:
            arrays[a.key] = flat[..., start : start + a.size].reshape(*flat.shape[:-1], *a.shape)
            start += a.size
        return arrays


def all_finite(array: npt.NDArray[Any]) -> bool:
    """True if no entry is NaN or infinite; on the small arrays of a control loop in half the time of ``all()``."""
    return b"\0" not in np.isfinite(array).tobytes()


def _canonical(spec: "RobotSpec | PolicySpec") -> str:
    """Canonical JSON; without the fields that say nothing, so that a field can be added and old fingerprints stand.

    For the same reason a policy's robot is written as ``arm``, its name in version 0.1.
    """

    def plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {
            "arm" if name == "robot" and isinstance(value, dict) else name: value
            for name, value in pairs
            if name != "quaternions" or value
        }

    return json.dumps(asdict(spec, dict_factory=plain), sort_keys=True, separators=(",", ":"))


def _brief(array: ArraySpec | None) -> str:
    return "absent" if array is None else f"{array.shape} {array.dtype} {array.unit} {array.frame}".strip()


@dataclass(frozen=True)
class PolicySpec:
    """Contract of a policy file; stored in the ONNX metadata."""

    robot: RobotSpec  # the robot it was trained on
    chunk_length: int  # H, actions per inference, executed open loop
    euler_steps: int  # K, Euler steps unrolled in the graph
    velocity: str  # velocity network, e.g. ``"flow-g"``
    # normalizer mean over the flattened observation; inside the graph already, here for readers
    observation_mean: tuple[float, ...]
    observation_std: tuple[float, ...]  # normalizer standard deviation, likewise
    notes: Mapping[str, Any] = field(default_factory=dict)  # how it was made (algorithm, steps, seed); free keys

    @property
    def noise_shape(self) -> tuple[int, int]:
        """(H, A): shape of one noise sample and of one action chunk."""
        return self.chunk_length, self.robot.action_dim

    def to_json(self) -> str:
        return _canonical(self)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON, 64 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @staticmethod
    def from_json(text: str) -> "PolicySpec":
        """Rebuild from :meth:`to_json`.

        Raises:
            DataError: The text is not JSON, or fields are missing.
        """
        try:
            data = json.loads(text)
            spec = PolicySpec(
                robot=RobotSpec.from_dict(data["arm"]),
                chunk_length=int(data["chunk_length"]),
                euler_steps=int(data["euler_steps"]),
                velocity=str(data["velocity"]),
                observation_mean=tuple(map(float, data["observation_mean"])),
                observation_std=tuple(map(float, data["observation_std"])),
                notes=dict(data["notes"]),
            )
            if not (1 <= spec.chunk_length <= _MOST and 1 <= spec.euler_steps <= _MOST):
                raise ValueError(f"chunk_length {spec.chunk_length}, euler_steps {spec.euler_steps}")
            return spec
        except _UNREADABLE as error:
            raise DataError(f"policy specification cannot be read ({error!r}); export the policy again") from None
