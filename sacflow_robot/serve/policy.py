"""A policy file, loaded and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from sacflow_robot import policyfile
from sacflow_robot.errors import DataError, InvalidValueError, PolicyFileError, UnknownNameError, UsageError, one_line
from sacflow_robot.spec import FloatArray, Observation, PolicySpec, all_finite

# TensorFloat-32 would not pass the self-test.
_PROVIDERS: dict[str, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
    "tensorrt": ("TensorrtExecutionProvider", {}),
}


@dataclass(frozen=True)
class Engine:
    """How ONNX Runtime computes.

    Attributes:
        provider: ``"cpu"``, ``"cuda"`` or ``"tensorrt"``.
        threads: Threads that share one inference. One gives the same bits however many cores there are.
        spin: Whether threads that wait for work keep their core busy: quicker, and nothing else gets that core.
    """

    provider: str = "cpu"
    threads: int = 1
    spin: bool = False

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.provider}, {threads}{', spinning' if self.spin else ''}"


class OnnxPolicy:
    """A policy from an ONNX file, on ONNX Runtime.

    Loading checks the file against itself: its fingerprint, and its golden vectors, which the graph must reproduce to
    1e-5 on the engine chosen.

    Args:
        path: The file.
        engine: How to compute.

    Raises:
        PolicyFileError: The file is missing, unreadable, not a policy, or fails its self-test.
        UsageError: This ONNX Runtime does not offer the engine.
    """

    def __init__(self, path: Path, engine: Engine | None = None) -> None:
        if not path.is_file():
            raise PolicyFileError(f"no policy file at {path}; check the path, or make one with 'sacflow-robot train'")
        self.engine = engine or Engine()
        try:
            content = path.read_bytes()  # once: the file may be replaced at any time
            self._session = _open_session(content, self.engine)
            metadata = self._session.get_modelmeta().custom_metadata_map
        except UsageError:
            raise
        except Exception as error:  # ONNX Runtime raises its own family, rooted in Exception
            text = one_line(error)
            raise PolicyFileError(f"{path} is not a readable ONNX file ({text}); is it complete?") from None
        try:
            self.spec = PolicySpec.from_json(metadata[policyfile.SPEC_KEY])
            golden = policyfile.unpack_arrays(metadata[policyfile.GOLDEN_KEY])
            stated = metadata[policyfile.FINGERPRINT_KEY]
        except KeyError as error:
            raise PolicyFileError(
                f"{path} is ONNX but not a policy of ours: no metadata {error}; export it again"
            ) from None
        except DataError as error:
            raise PolicyFileError(f"{path}: {error}") from None
        if stated != self.spec.fingerprint:
            raise PolicyFileError(f"{path}: its specification was changed after export; export it again")
        self.version, self.fingerprint = policyfile.content_version(content), stated
        self._self_test(path, golden)

    def infer(self, observation: Observation, noise: FloatArray) -> FloatArray:
        """Action chunks (B, H, A) for observations (B, ...) and noise (B, H, A).

        Raises:
            InvalidValueError: An input has a wrong shape or holds NaN or infinity, or the output does.
        """
        actions = self.run(self.check(observation, noise))
        if not all_finite(actions):
            raise InvalidValueError("the policy put out NaN or infinity; its actions were withheld")
        return actions

    def check(self, observation: Mapping[str, Any], noise: Any) -> dict[str, FloatArray]:
        """What the graph takes, from observations (B, ...) and noise (B, H, A).

        Raises:
            InvalidValueError: An input has a wrong shape or holds NaN or infinity.
        """
        noise = np.asarray(noise, np.float32, order="C")
        if noise.ndim != 3 or noise.shape[1:] != self.spec.noise_shape or not len(noise):
            raise InvalidValueError(
                f"noise has shape {noise.shape}, expected (B, {self.spec.noise_shape[0]}, {self.spec.noise_shape[1]})"
            )
        if not all_finite(noise):
            raise InvalidValueError("noise holds NaN or infinity")
        inputs = self.spec.arm.check_observation(observation, (len(noise),))
        inputs[policyfile.NOISE] = noise
        return inputs

    def run(self, inputs: Mapping[str, FloatArray]) -> FloatArray:
        """Actions (B, H, A) from what :meth:`check` returned; may hold NaN or infinity.

        Raises:
            PolicyFileError: The graph cannot be evaluated.
        """
        try:
            actions: FloatArray = self._session.run(None, inputs)[0]
        except Exception as error:  # ONNX Runtime raises its own family, rooted in Exception
            raise PolicyFileError(f"the policy's graph cannot be evaluated: {one_line(error)}") from None
        return actions

    def blank_inputs(self, batch: int) -> dict[str, FloatArray]:
        """Inputs of zeros for ``batch`` rows, to measure with."""
        arrays = {a.key: np.zeros((batch, *a.shape), a.dtype) for a in self.spec.arm.observations}
        return {**arrays, policyfile.NOISE: np.zeros((batch, *self.spec.noise_shape), np.float32)}

    def _self_test(self, path: Path, golden: dict[str, FloatArray]) -> None:
        try:
            expected, noise = golden.pop(policyfile.ACTIONS), golden.pop(policyfile.NOISE)
            actions = self.infer(golden, noise)
            if actions.shape != expected.shape:
                raise ValueError(f"actions of shape {actions.shape} for {expected.shape}")
            difference = float(np.abs(actions - expected).max())
        except (KeyError, InvalidValueError, PolicyFileError, ValueError, TypeError) as error:
            raise PolicyFileError(
                f"{path}: its golden vectors do not fit its graph ({error}); export it again"
            ) from None
        if not difference <= policyfile.TOLERANCE:
            raise PolicyFileError(
                f"{path} fails its self-test: golden vectors differ by {difference:.1e}, allowed is "
                f"{policyfile.TOLERANCE:.0e}; the file is damaged, or this ONNX Runtime computes differently"
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
