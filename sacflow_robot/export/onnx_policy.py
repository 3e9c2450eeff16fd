"""A policy file, loaded and checked."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from sacflow_robot.errors import DataError, InvalidValueError, PolicyFileError, UnknownNameError, UsageError, one_line
from sacflow_robot.export import metadata as policyfile
from sacflow_robot.export.metadata import ACTIONS, NOISE, PREFIX, PREFIX_MASK
from sacflow_robot.spec import FloatArray, Observation, PolicySpec, all_finite

# TensorFloat-32 would not pass the self-test.
_PROVIDERS: dict[str, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
    "tensorrt": ("TensorrtExecutionProvider", {}),
}
_INT8_RUNTIME, _INT8_OPERATOR = (1, 22), b"MatMulNBits"  # with 8 bits


@dataclass(frozen=True)
class Engine:
    """Engine of ONNX Runtime."""

    provider: str = "cpu"  # ``"cpu"``, ``"cuda"`` or ``"tensorrt"``
    threads: int = 1  # threads that share one inference. One gives the same bits however many cores there are
    # whether threads that wait for work keep their core busy: quicker, and nothing else gets that core
    spin: bool = False

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.provider}, {threads}{', spinning' if self.spin else ''}"


class OnnxPolicy:
    """A policy from an ONNX file, on ONNX Runtime.

    Loading checks the file against itself: its fingerprint, its graph's inputs and outputs, and its golden vectors, which the
    graph must reproduce on the engine chosen, to 1e-5 (with int8 weights to the error measured at export).

    Attributes:
        takes_prefix: Whether it can be given what is committed already, see :meth:`infer`.

    Raises:
        PolicyFileError: The file is missing, unreadable, not a policy, or fails its self-test.
        UsageError: This ONNX Runtime does not offer the engine.
    """

    def __init__(self, path: Path, engine: Engine | None = None) -> None:
        self.engine = engine or Engine()
        content = policyfile.read_file(path)
        _check_runtime(path, content)
        try:
            self._session = _open_session(content, self.engine)
            metadata = self._session.get_modelmeta().custom_metadata_map
        except UsageError:
            raise
        except Exception as error:  # ONNX Runtime raises its own family, rooted in Exception
            text = one_line(error)
            raise PolicyFileError(f"{path} is not a readable ONNX file ({text}); is it complete?") from None
        needed = policyfile.SPEC_KEY, policyfile.GOLDEN_KEY, policyfile.FINGERPRINT_KEY
        missing = [key for key in needed if key not in metadata]
        if missing:
            raise PolicyFileError(
                f"{path} is ONNX but not a policy of ours: its metadata lacks {', '.join(missing)}; make one of a run's folder "
                "with 'sacflow-robot export'; for other projects' policies see docs/protocol.md, 'Policies of other projects'"
            )
        try:
            self.spec = PolicySpec.from_json(metadata[policyfile.SPEC_KEY])
            golden, stated = (
                policyfile.unpack_arrays(metadata[policyfile.GOLDEN_KEY]),
                metadata[policyfile.FINGERPRINT_KEY],
            )
        except DataError as error:
            raise PolicyFileError(f"{path}: {error}") from None
        if stated != self.spec.fingerprint:
            raise PolicyFileError(f"{path}: its specification was changed after export; export it again")
        try:
            check_graph(self._session, self.spec)
        except PolicyFileError as error:
            raise PolicyFileError(f"{path}: {error}; export it again") from None
        self.version = policyfile.content_version(content)
        self.fingerprint = stated
        inputs = (*self._session.get_inputs(), *self._session.get_overridable_initializers())
        self.takes_prefix = {policyfile.PREFIX, policyfile.PREFIX_MASK} <= {i.name for i in inputs}
        self._self_test(path, golden)

    def infer(
        self,
        observation: Observation,
        noise: FloatArray,
        prefix: FloatArray | None = None,
        prefix_mask: FloatArray | None = None,
    ) -> FloatArray:
        """Action chunks (B, H, A) for observations (B, ...) and noise (B, H, A).

        Where ``prefix_mask`` (B, H) is 1, the chunk is ``prefix`` (B, H, A), which is committed already; the flow completes
        the rest (mask 0) so that it goes with that. Without both, nothing is committed.

        Raises:
            InvalidValueError: An input has a wrong shape or contains NaN or infinity, or the output does; or this policy takes
                no prefix.
        """
        actions = self.run(self.check(observation, noise, prefix, prefix_mask))
        if not all_finite(actions):
            raise InvalidValueError("the policy put out NaN or infinity; its actions were withheld")
        return actions

    def check(
        self, observation: Mapping[str, Any], noise: Any, prefix: Any = None, prefix_mask: Any = None
    ) -> dict[str, FloatArray]:
        """Inputs of the graph from observations (B, ...), noise (B, H, A), and what is committed; see :meth:`infer`.

        Raises:
            InvalidValueError: An input has a wrong shape or contains NaN or infinity; or this policy takes no prefix.
        """
        noise = np.asarray(noise, np.float32, order="C")
        if noise.ndim != 3 or noise.shape[1:] != self.spec.noise_shape or not len(noise):
            raise InvalidValueError(
                f"noise has shape {noise.shape}, expected (B, {self.spec.noise_shape[0]}, {self.spec.noise_shape[1]})"
            )
        if not all_finite(noise):
            raise InvalidValueError("noise contains NaN or infinity")
        inputs = self.spec.robot.check_observation(observation, (len(noise),))
        inputs[policyfile.NOISE] = noise
        if prefix is not None or prefix_mask is not None:
            inputs |= self._check_prefix(prefix, prefix_mask, noise.shape)
        elif self.takes_prefix:
            inputs |= self._no_prefix(len(noise))
        return inputs

    def _check_prefix(self, prefix: Any, mask: Any, shape: tuple[int, ...]) -> dict[str, FloatArray]:
        if not self.takes_prefix:
            raise InvalidValueError(
                "this policy takes no prefix; export it again with 'sacflow-robot export', without --no-prefix"
            )
        if prefix is None or mask is None:
            raise InvalidValueError("prefix and prefix_mask go together; only one is given")
        arrays = {policyfile.PREFIX: (prefix, shape), policyfile.PREFIX_MASK: (mask, shape[:2])}
        checked = {}
        for name, (value, expected) in arrays.items():
            array = np.asarray(value, np.float32, order="C")
            if array.shape != expected:
                raise InvalidValueError(f"{name} has shape {array.shape}, expected {expected}")
            if not all_finite(array):
                raise InvalidValueError(f"{name} contains NaN or infinity")
            checked[name] = array
        if not (checked[policyfile.PREFIX_MASK].min() >= 0 and checked[policyfile.PREFIX_MASK].max() <= 1):
            raise InvalidValueError("prefix_mask must be 1 where a step is committed and 0 elsewhere")
        return checked

    def _no_prefix(self, batch: int) -> dict[str, FloatArray]:
        h, a = self.spec.noise_shape
        return {
            policyfile.PREFIX: np.zeros((batch, h, a), np.float32),
            policyfile.PREFIX_MASK: np.zeros((batch, h), np.float32),
        }

    def run(self, inputs: Mapping[str, FloatArray]) -> FloatArray:
        """Actions (B, H, A) from what :meth:`check` returned; may contain NaN or infinity.

        Raises:
            PolicyFileError: The graph cannot be evaluated.
        """
        try:
            actions: FloatArray = self._session.run([policyfile.ACTIONS], inputs)[0]
        except Exception as error:  # ONNX Runtime raises its own family, rooted in Exception
            raise PolicyFileError(f"the policy's graph cannot be evaluated: {one_line(error)}") from None
        return actions

    def blank_inputs(self, batch: int) -> dict[str, FloatArray]:
        """Inputs of zeros for ``batch`` rows, to measure with."""
        arrays = {a.key: np.zeros((batch, *a.shape), a.dtype) for a in self.spec.robot.observations}
        arrays[policyfile.NOISE] = np.zeros((batch, *self.spec.noise_shape), np.float32)
        return {**arrays, **(self._no_prefix(batch) if self.takes_prefix else {})}

    def _self_test(self, path: Path, golden: dict[str, FloatArray]) -> None:
        try:
            expected, noise = golden.pop(policyfile.ACTIONS), golden.pop(policyfile.NOISE)
            prefix = golden.pop(policyfile.PREFIX, None), golden.pop(policyfile.PREFIX_MASK, None)
            actions = self.infer(golden, noise, *prefix)
            if actions.shape != expected.shape:
                raise ValueError(f"actions of shape {actions.shape} for {expected.shape}")
            difference = policyfile.action_error(self.spec, actions, expected)
        except (KeyError, InvalidValueError, PolicyFileError, ValueError, TypeError) as error:
            raise PolicyFileError(
                f"{path}: its golden vectors do not fit its graph ({error}); export it again"
            ) from None
        allowed = policyfile.tolerance(self.spec)
        if not difference <= allowed:
            raise PolicyFileError(
                f"{path} fails its self-test: golden vectors differ by {difference:.1e}, allowed is {allowed:.0e}; "
                f"the file is damaged, or this ONNX Runtime computes differently"
            )


def _check_runtime(path: Path, content: bytes) -> None:
    """Say it where only the installed ONNX Runtime is too old: what it says itself does not lead there.

    Raises:
        PolicyFileError: It is.
    """
    installed = onnxruntime.__version__
    numbers = tuple(int(part) for part in re.findall(r"\d+", installed)[:2])
    if numbers < _INT8_RUNTIME and _INT8_OPERATOR in content:
        needed = ".".join(map(str, _INT8_RUNTIME))
        raise PolicyFileError(
            f"{path} has int8 weights, which needs onnxruntime >= {needed}; installed {installed}: pip install -U onnxruntime"
        )


def _open_session(content: bytes, engine: Engine) -> onnxruntime.InferenceSession:
    if engine.provider not in _PROVIDERS:
        raise UnknownNameError("execution provider", engine.provider, _PROVIDERS)
    name, settings = _PROVIDERS[engine.provider]
    offered = onnxruntime.get_available_providers()
    if name not in offered:
        ours = [short for short, (long, _) in _PROVIDERS.items() if long in offered]
        raise UsageError(
            f"this ONNX Runtime has no {name}; it has {', '.join(ours)}; onnxruntime-gpu in its place may have more"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = engine.threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if engine.spin else "0")
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(content, options, providers=[(name, settings)])
    if name not in session.get_providers():  # ONNX Runtime falls back to the CPU without a word
        raise UsageError(f"{name} is offered but does not start on this machine; see its installation notes")
    return session


_TYPES = {"float32": "float", "float64": "double"}


def check_graph(session: onnxruntime.InferenceSession, spec: PolicySpec) -> None:
    """Compare the graph with the specification; the first dimension of everything is the batch.

    Raises:
        PolicyFileError: Names every input and output that differs.
    """
    wanted = {a.key: (a.dtype, a.shape) for a in spec.robot.observations} | {NOISE: ("float32", spec.noise_shape)}
    if len(wanted) <= len(spec.robot.observations) or {PREFIX, PREFIX_MASK} & set(wanted):
        raise PolicyFileError(f"an observation has the name {NOISE}, {PREFIX} or {PREFIX_MASK}, which the graph needs")
    prefix = {PREFIX: ("float32", spec.noise_shape), PREFIX_MASK: ("float32", spec.noise_shape[:1])}
    inputs = {i.name: i for i in session.get_inputs()}
    optional = {i.name: i for i in session.get_overridable_initializers() if i.name in prefix}
    outputs = {o.name: o for o in session.get_outputs()}
    taken = {name: prefix[name] for name in prefix if name in {**inputs, **optional}}
    problems = [
        *_differences("input", {**wanted, **taken}, {**inputs, **optional}),
        *_differences("output", {ACTIONS: ("float32", spec.noise_shape)}, outputs),
    ]
    if len(taken) == 1:
        problems.append(f"it takes {next(iter(taken))} alone; {PREFIX} and {PREFIX_MASK} go together")
    unknown = sorted(inputs.keys() - wanted.keys() - prefix.keys())
    if unknown:
        problems.append(f"it needs an input {', '.join(map(repr, unknown))} that the specification does not know")
    if problems:
        raise PolicyFileError(f"its graph is not what its specification says: {'; '.join(problems)}")


def _differences(what: str, wanted: dict[str, tuple[str, tuple[int, ...]]], there: dict[str, Any]) -> list[str]:
    problems = []
    for name, (dtype, shape) in wanted.items():
        if name not in there:
            have = ", ".join(there) or "none"
            problems.append(f"it has no {what} {name!r}, but {have}")
            continue
        kind = f"tensor({_TYPES.get(dtype, np.dtype(dtype).name)})"
        if there[name].type != kind:
            problems.append(f"{what} {name!r} is {there[name].type}, expected {kind}")
        if not _fits(there[name].shape, shape):
            has = ", ".join(str(extent) for extent in there[name].shape)
            problems.append(f"{what} {name!r} has shape ({has}), expected (B, {', '.join(map(str, shape))}) for any B")
    return problems


def _fits(declared: list[int | str | None], shape: tuple[int, ...]) -> bool:
    """True if a declared shape admits (B, *shape) for every B; names and None stand for any extent."""
    if not declared:
        return True  # nothing is declared
    batch, *rest = declared
    if isinstance(batch, int) or len(rest) != len(shape):
        return False
    return all(not isinstance(extent, int) or extent == wanted for extent, wanted in zip(rest, shape, strict=True))
