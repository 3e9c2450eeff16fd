from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from sacflow_robot import policyfile
from sacflow_robot.errors import InvalidValueError, PolicyFileError
from sacflow_robot.randomness import chunk_noise
from sacflow_robot.serve.policy import OnnxPolicy


def observation(policy: OnnxPolicy, batch: int) -> dict[str, np.ndarray]:
    return {a.key: np.zeros((batch, *a.shape), np.float32) for a in policy.spec.arm.observations}


def test_it_infers_and_checks_its_inputs(policy_file: Path) -> None:
    policy = OnnxPolicy(policy_file)
    noise = chunk_noise((2, 5, 7), 1)
    actions = policy.infer(observation(policy, 2), noise)
    assert actions.shape == (2, 5, 7) and np.abs(actions).max() <= 1
    with pytest.raises(InvalidValueError, match=r"noise has shape \(5, 7\), expected \(B, 5, 7\)"):
        policy.infer(observation(policy, 2), noise[0])
    with pytest.raises(InvalidValueError, match="noise holds NaN"):
        policy.infer(observation(policy, 2), noise * np.nan)
    with pytest.raises(InvalidValueError, match=r"\(3, 3\), expected \(2, 3\)"):
        policy.infer(observation(policy, 3), noise)
    bad = {**observation(policy, 2), "object": np.full((2, 10), np.inf)}
    with pytest.raises(InvalidValueError, match="'object' holds NaN or infinity"):
        policy.infer(bad, noise)


def test_unreadable_files(policy_file: Path, tmp_path: Path) -> None:
    with pytest.raises(PolicyFileError, match="no policy file at"):
        OnnxPolicy(tmp_path / "absent.onnx")
    whole = policy_file.read_bytes()
    for part in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "part.onnx").write_bytes(whole[:part])
        with pytest.raises(PolicyFileError, match=r"^[^\n]+$"):
            OnnxPolicy(tmp_path / "part.onnx")


def change(source: Path, target: Path, **metadata: str | None) -> Path:
    model = onnx.load(source)
    kept = {p.key: p.value for p in model.metadata_props}
    changed = {**kept, **{f"sacflow_robot.{key}": value for key, value in metadata.items()}}
    onnx.helper.set_model_props(model, {k: v for k, v in changed.items() if v is not None})
    onnx.save(model, target)
    return target


def test_files_that_are_not_what_they_claim(policy_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    with pytest.raises(PolicyFileError, match="not a policy of ours"):
        OnnxPolicy(change(policy_file, path, spec=None))
    with pytest.raises(PolicyFileError, match="cannot be read"):
        OnnxPolicy(change(policy_file, path, spec="{}"))
    spec = OnnxPolicy(policy_file).spec.to_json()
    with pytest.raises(PolicyFileError, match="changed after export"):
        OnnxPolicy(change(policy_file, path, spec=spec.replace('"Panda"', '"UR5e"')))
    with pytest.raises(PolicyFileError, match="packed arrays cannot be read"):
        OnnxPolicy(change(policy_file, path, golden="[]"))
    golden = {k: v.copy() for k, v in policyfile.unpack_arrays(change_read(policy_file)).items()}
    golden["actions"][0, 0, 0] += 1e-3
    with pytest.raises(PolicyFileError, match=r"golden vectors differ by 1\.0e-03"):
        OnnxPolicy(change(policy_file, path, golden=policyfile.pack_arrays(golden)))


def change_read(source: Path) -> str:
    return next(p.value for p in onnx.load(source).metadata_props if p.key == policyfile.GOLDEN_KEY)
