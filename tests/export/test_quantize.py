from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from sacflow_robot.errors import ExportError, PolicyFileError
from sacflow_robot.export.metadata import WeightsKind
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.export.to_onnx import export_policy
from sacflow_robot.learn.config import FlowConfig, VelocityName
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.learn.networks.critic import Critic
from sacflow_robot.learn.networks.policies import QC
from sacflow_robot.spec import RobotSpec
from sacflow_robot.utils.seeding import chunk_noise

FLOW = FlowConfig(width=128, depth=2, gate_width=64, euler_steps=2)
Files = dict[str, tuple[Path, float]]
MOST = {"float16": 2e-3, "bf16": 2e-2, "int8": 5e-2}


def make_policy(robot: RobotSpec, velocity: VelocityName = "flow-t") -> FlowPolicy:
    torch.manual_seed(1)
    return FlowPolicy(velocity, robot.observation_dim, 5 * robot.action_dim, FLOW, robot.quaternions).requires_grad_(
        False
    )


@pytest.fixture(scope="module")
def files(robot: RobotSpec, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A policy with each kind of weights: its file, and what export said of the difference from torch."""
    folder, policy = tmp_path_factory.mktemp("weights"), make_policy(robot)
    paths = {weights: folder / f"{weights}.onnx" for weights in get_args(WeightsKind)}
    return {weights: (path, write(policy, robot, path, weights)) for weights, path in paths.items()}


def write(
    policy: FlowPolicy, robot: RobotSpec, path: Path, weights: WeightsKind, exported: nn.Module | None = None
) -> float:
    return export_policy(exported or policy, policy.make_spec(robot), path, weights=weights)


@pytest.mark.parametrize("weights", MOST)
def test_files_are_smaller_and_say_what_that_costs(weights: WeightsKind, files: Files, robot: RobotSpec) -> None:
    (path, exact), (smaller, error) = files["float32"], files[weights]
    assert exact <= 1e-5 < error < MOST[weights]
    whole, small = OnnxPolicy(path), OnnxPolicy(smaller)
    assert smaller.stat().st_size < 0.7 * path.stat().st_size
    assert small.spec.notes == {"weights": weights, "max_action_error": error} and whole.spec.notes == {}
    rng = np.random.default_rng(0)
    seen = {a.key: rng.standard_normal((32, *a.shape)).astype(np.float32) for a in robot.observations}
    noise = chunk_noise((32, 5, 7), 0)
    actions = small.infer(seen, noise)
    assert np.abs(actions - whole.infer(seen, noise)).max() <= 2 * error
    alone = small.infer({key: value[5:6] for key, value in seen.items()}, noise[5:6])
    np.testing.assert_allclose(alone, actions[5:6], atol=1e-5)  # whatever is computed beside it


def test_int8_rounds_to_the_nearest_of_255_steps_of_its_block(files: Files) -> None:
    whole, small = (
        {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(files[weights][0]).graph.initializer}
        for weights in ("float32", "int8")
    )
    coded = [name for name in small if name.endswith("_int8")]
    assert coded
    for name in coded:
        weight = whole[name.removesuffix("_int8")].T
        codes, scales = small[name].astype(np.float32), small[f"{name}_scale"].reshape(len(weight), -1, 1)
        back = ((codes - 128) * scales).reshape(len(weight), -1)[:, : weight.shape[1]]
        steps = np.repeat(scales[..., 0], 32, 1)[:, : weight.shape[1]]
        assert (np.abs(back - weight) <= 0.501 * steps).all()


@pytest.mark.parametrize("weights", ["float16", "bf16"])
def test_half_precision_is_how_weights_are_stored_and_products_are_in_float32(
    weights: WeightsKind, files: Files, tmp_path: Path
) -> None:
    """What ONNX Runtime makes of the file holds float32 weights, and no cast."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(files[weights][0], options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    assert {n.op_type for n in graph.node} & {"Cast", "Gemm"} == {"Gemm"}
    assert {t.data_type for t in graph.initializer} - {onnx.TensorProto.INT64} == {onnx.TensorProto.FLOAT}


def test_the_best_of_several_in_int8(robot: RobotSpec, tmp_path: Path) -> None:
    """Flow-g, whose products scale and subtract, beside a critic, whose weights stay."""
    policy = make_policy(robot, "flow-g")
    critic = Critic(policy.feature_dim, policy.action_dim, 64, 2, 2).requires_grad_(False)
    assert write(policy, robot, tmp_path / "best.onnx", "int8", QC(policy, critic, 4, "min")) < MOST["int8"]
    assert OnnxPolicy(tmp_path / "best.onnx").takes_prefix


def test_weights_that_float16_cannot_hold(robot: RobotSpec, tmp_path: Path) -> None:
    policy = make_policy(robot, "mlp")
    policy.velocity.trunk.hidden[0].weight[0, 0] = 1e6  # type: ignore[union-attr]
    with pytest.raises(ExportError, match=r"too large for float16; export with --weights bf16 or float32"):
        write(policy, robot, tmp_path / "a.onnx", "float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weights", get_args(WeightsKind))
def test_a_damaged_weight_is_refused(weights: WeightsKind, files: Files, tmp_path: Path) -> None:
    model = onnx.load(files[weights][0])
    largest = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    largest.raw_data = largest.raw_data[::-1]
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(
        PolicyFileError, match=r"fails its self-test: golden vectors differ by .*|golden vectors do not"
    ):
        OnnxPolicy(tmp_path / "a.onnx")
