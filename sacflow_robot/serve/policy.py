"""A policy file, loaded and checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime

from sacflow_robot import policyfile
from sacflow_robot.errors import DataError, InvalidValueError, PolicyFileError, one_line
from sacflow_robot.spec import FloatArray, Observation, PolicySpec


class OnnxPolicy:
    """A policy from an ONNX file, on ONNX Runtime.

    Loading checks the file against itself: its fingerprint, and its golden vectors, which the graph must reproduce to
    1e-5. It runs on one thread, so that the same input gives the same bits however many cores there are.

    Args:
        path: The file.

    Raises:
        PolicyFileError: The file is missing, unreadable, not a policy, or fails its self-test.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise PolicyFileError(f"no policy file at {path}; check the path, or make one with 'sacflow-robot train'")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            metadata = self._session.get_modelmeta().custom_metadata_map
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
        self.version = policyfile.file_version(path)
        self._self_test(path, golden)

    def infer(self, observation: Observation, noise: FloatArray) -> FloatArray:
        """Action chunks (B, H, A) for observations (B, ...) and noise (B, H, A).

        Raises:
            InvalidValueError: An input has a wrong shape or holds NaN or infinity, or the output does.
        """
        noise = np.ascontiguousarray(noise, np.float32)
        if noise.ndim != 3 or noise.shape[1:] != self.spec.noise_shape or not len(noise):
            raise InvalidValueError(
                f"noise has shape {noise.shape}, expected (B, {self.spec.noise_shape[0]}, {self.spec.noise_shape[1]})"
            )
        if not np.isfinite(noise).all():
            raise InvalidValueError("noise holds NaN or infinity")
        inputs = self.spec.arm.check_observation(observation, (len(noise),))
        try:
            actions: FloatArray = self._session.run(None, {**inputs, policyfile.NOISE: noise})[0]
        except Exception as error:  # ONNX Runtime raises its own family, rooted in Exception
            raise PolicyFileError(f"the policy's graph cannot be evaluated: {one_line(error)}") from None
        if not np.isfinite(actions).all():
            raise InvalidValueError("the policy put out NaN or infinity; its actions were withheld")
        return actions

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
