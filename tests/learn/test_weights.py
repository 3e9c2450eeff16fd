from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from sacflow_robot.errors import ExportError, PolicyFileError
from sacflow_robot.learn.config import FlowConfig, VelocityName, WeightsKind
from sacflow_robot.learn.critic import Critic
from sacflow_robot.learn.export import export_policy, make_spec
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.policies import BestOf
from sacflow_robot.randomness import chunk_noise
from sacflow_robot.serve.policy import OnnxPolicy
from sacflow_robot.spec import ArmSpec

FLOW = FlowConfig(width=128, depth=2, gate_width=64, euler_steps=2)
MOST = {"float16": 2e-3, "bf16": 2e-2, "int8": 5e-2}


def make_policy(arm: ArmSpec, velocity: VelocityName = "flow-t") -> FlowPolicy:
    torch.manual_seed(1)
    return FlowPolicy(velocity, arm.observation_dim, 5 * arm.action_dim, FLOW, arm.quaternions).requires_grad_(False)


def write(
    policy: FlowPolicy, arm: ArmSpec, path: Path, weights: WeightsKind, exported: nn.Module | None = None
) -> float:
    return export_policy(exported or policy, make_spec(policy, arm, policy.name, {}), path, weights=weights)


@pytest.mark.parametrize("velocity", ["flow-g", "flow-t", "flow-l", "mlp"])
@pytest.mark.parametrize("weights", ["float16", "bf16", "int8"])
def test_files_are_smaller_and_say_what_that_costs(
    velocity: VelocityName, weights: WeightsKind, arm: ArmSpec, tmp_path: Path
) -> None:
    policy = make_policy(arm, velocity)
    assert write(policy, arm, tmp_path / "whole.onnx", "float32") <= 1e-5
    error = write(policy, arm, tmp_path / "small.onnx", weights)
    assert 1e-6 < error < MOST[weights]
    whole, small = OnnxPolicy(tmp_path / "whole.onnx"), OnnxPolicy(tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx").stat().st_size < 0.7 * (tmp_path / "whole.onnx").stat().st_size
    assert small.spec.notes == {"weights": weights, "max_action_error": error} and whole.spec.notes == {}
    rng = np.random.default_rng(0)
    seen = {a.key: rng.standard_normal((32, *a.shape)).astype(np.float32) for a in arm.observations}
    noise = chunk_noise((32, 5, 7), 0)
    actions = small.infer(seen, noise)
    assert np.abs(actions - whole.infer(seen, noise)).max() <= 1.5 * error
    alone = small.infer({key: value[5:6] for key, value in seen.items()}, noise[5:6])
    np.testing.assert_allclose(alone, actions[5:6], atol=1e-5)


def test_int8_rounds_to_the_nearest_of_255_steps_of_its_block(arm: ArmSpec, tmp_path: Path) -> None:
    write(make_policy(arm), arm, tmp_path / "whole.onnx", "float32")
    write(make_policy(arm), arm, tmp_path / "small.onnx", "int8")
    whole = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "whole.onnx").graph.initializer}
    small = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "small.onnx").graph.initializer}
    coded = [name for name in small if name.endswith("_int8")]
    assert coded
    for name in coded:
        weight = whole[name.removesuffix("_int8")].T
        codes, scales = small[name].astype(np.float32), small[f"{name}_scale"].reshape(len(weight), -1, 1)
        back = ((codes - 128) * scales).reshape(len(weight), -1)[:, : weight.shape[1]]
        steps = np.repeat(scales[..., 0], 32, 1)[:, : weight.shape[1]]
        assert (np.abs(back - weight) <= 0.501 * steps).all()


def test_half_precision_is_how_weights_are_stored_and_products_are_in_float32(arm: ArmSpec, tmp_path: Path) -> None:
    """The optimised graph holds float32 weights, and no cast."""
    for weights in ("float16", "bf16"):
        write(make_policy(arm), arm, tmp_path / "small.onnx", weights)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        onnxruntime.InferenceSession(tmp_path / "small.onnx", options, providers=["CPUExecutionProvider"])
        graph = onnx.load(tmp_path / "optimised.onnx").graph
        assert {n.op_type for n in graph.node} & {"Cast", "Gemm"} == {"Gemm"}
        floats = {t.data_type for t in graph.initializer} - {onnx.TensorProto.INT64}
        assert floats == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("weights", ["float16", "bf16", "int8"])
def test_the_best_of_several(weights: WeightsKind, arm: ArmSpec, tmp_path: Path) -> None:
    policy = make_policy(arm, "flow-g")
    critic = Critic(policy.feature_dim, policy.action_dim, 64, 2, 2).requires_grad_(False)
    write(policy, arm, tmp_path / "best.onnx", weights, BestOf(policy, critic, 4, "min"))
    assert OnnxPolicy(tmp_path / "best.onnx").takes_prefix


def test_weights_that_float16_cannot_hold(arm: ArmSpec, tmp_path: Path) -> None:
    policy = make_policy(arm, "mlp")
    policy.velocity.trunk.hidden[0].weight[0, 0] = 1e6  # type: ignore[union-attr]
    with pytest.raises(ExportError, match=r"too large for float16; export with --weights bf16 or float32"):
        write(policy, arm, tmp_path / "a.onnx", "float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weights", ["float32", "float16", "bf16", "int8"])
def test_a_damaged_weight_is_refused(weights: WeightsKind, arm: ArmSpec, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    write(make_policy(arm), arm, path, weights)
    OnnxPolicy(path)
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    largest.raw_data = largest.raw_data[::-1]
    onnx.save(model, path)
    with pytest.raises(
        PolicyFileError, match=r"fails its self-test: golden vectors differ by .*|golden vectors do not"
    ):
        OnnxPolicy(path)
