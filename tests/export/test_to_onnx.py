from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from sacflow_robot.errors import ExportError
from sacflow_robot.export import metadata as policyfile
from sacflow_robot.export import to_onnx as export
from sacflow_robot.export.graph import ExportedGraph
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.learn.config import FlowConfig
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.spec import PolicySpec, RobotSpec

FLOW = FlowConfig(width=32, depth=2, gate_width=16, euler_steps=3)


def make_policy(robot: RobotSpec, velocity: str) -> FlowPolicy:
    torch.manual_seed(1)
    policy = FlowPolicy(velocity, robot.observation_dim, 5 * robot.action_dim, FLOW)
    policy.fit_normalizer(torch.randn(100, robot.observation_dim) * 0.3 + 1)
    return policy


@pytest.mark.parametrize("velocity", ["flow-g", "flow-t", "flow-l", "mlp"])
def test_graph_equals_torch_at_any_batch(velocity: str, robot: RobotSpec, tmp_path: Path) -> None:
    policy, path = make_policy(robot, velocity), tmp_path / "lift.onnx"
    spec = policy.make_spec(robot, {"seed": 1})
    assert export.export_policy(policy, spec, path) <= 1e-5
    session = onnxruntime.InferenceSession(path)
    assert [(i.name, i.shape[1:]) for i in session.get_inputs()] == [
        *((a.key, list(a.shape)) for a in robot.observations),
        ("noise", [5, 7]),
    ]
    rng = np.random.default_rng(0)
    for batch in (1, 3, 50):
        observation = {a.key: rng.standard_normal((batch, *a.shape)).astype(np.float32) for a in robot.observations}
        noise = rng.standard_normal((batch, 5, 7)).astype(np.float32)
        (actions,) = session.run(None, {**observation, "noise": noise})
        flat = torch.from_numpy(robot.flatten(observation))
        with torch.no_grad():
            expected = policy(flat, torch.from_numpy(noise).flatten(1)).reshape(batch, 5, 7)
        np.testing.assert_allclose(actions, expected, atol=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert PolicySpec.from_json(metadata[policyfile.SPEC_KEY]) == spec
    assert metadata[policyfile.FINGERPRINT_KEY] == spec.fingerprint


def test_normalized_weights_are_folded_and_a_learned_noise_stays_out(robot: RobotSpec, tmp_path: Path) -> None:
    sizes = {}
    for name, changes in {"plain": {}, "other": {"weight_norm": True, "noise": "learned"}}.items():
        torch.manual_seed(0)
        policy = FlowPolicy("flow-g", robot.observation_dim, 5 * robot.action_dim, replace(FLOW, **changes))
        path = tmp_path / f"{name}.onnx"
        assert export.export_policy(policy, policy.make_spec(robot), path) <= 1e-5
        sizes[name] = sum(len(weight.raw_data) for weight in onnx.load(path).graph.initializer)
    assert sizes["plain"] == sizes["other"]


def test_a_policy_that_differs_is_not_left_behind(
    robot: RobotSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(robot, "mlp")
    spec = policy.make_spec(robot)
    path = tmp_path / "lift.onnx"
    path.write_bytes(b"an older policy")
    to_onnx = export.to_onnx

    def damaged(graph: ExportedGraph, spec: PolicySpec) -> onnx.ModelProto:
        model = to_onnx(graph, spec)
        weight = max(model.graph.initializer, key=lambda t: len(t.raw_data))
        values = np.frombuffer(weight.raw_data, np.float32).copy()
        values[0] += 0.1
        weight.raw_data = values.tobytes()
        return model

    monkeypatch.setattr(export, "to_onnx", damaged)
    with pytest.raises(ExportError, match=r"differs from torch by .*, allowed is 1e-05; .* not written"):
        export.export_policy(policy, spec, path)
    assert path.read_bytes() == b"an older policy"
    assert [p.name for p in tmp_path.iterdir()] == ["lift.onnx"]


def test_a_policy_of_nans_is_not_exported(robot: RobotSpec, tmp_path: Path) -> None:
    policy = make_policy(robot, "mlp")
    spec = policy.make_spec(robot)
    with torch.no_grad():
        next(policy.velocity.parameters()).fill_(float("nan"))
    with pytest.raises(ExportError, match="differs from torch by inf"):
        export.export_policy(policy, spec, tmp_path / "lift.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place(robot: RobotSpec, tmp_path: Path) -> None:
    policy = make_policy(robot, "mlp")
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write"):
        export.export_policy(policy, policy.make_spec(robot), tmp_path / "file" / "lift.onnx")


def test_the_file_says_nothing_about_the_machine(policy_file: Path) -> None:
    content = policy_file.read_bytes()
    for trace in (str(Path.home()).encode(), b"site-packages", str(Path(__file__).parents[2]).encode()):
        assert trace not in content


def test_spec_travels(robot: RobotSpec) -> None:
    policy = make_policy(robot, "flow-g")
    spec = policy.make_spec(robot)
    assert (spec.chunk_length, spec.euler_steps, spec.noise_shape) == (5, 3, (5, 7))
    assert spec.observation_mean == pytest.approx(policy.observation_mean.tolist())
    assert replace(spec, notes={"a": 1}).fingerprint != spec.fingerprint


def test_a_file_for_an_arm_with_other_bounds_acts_in_its_units(robot: RobotSpec, tmp_path: Path) -> None:
    low, high = np.linspace(-180, 0, 7), np.linspace(20, 90, 7)
    own = replace(robot, action_low=tuple(low), action_high=tuple(high))
    policy, half, center = make_policy(robot, "flow-g"), (high - low) / 2, (high + low) / 2
    export.export_policy(policy, policy.make_spec(robot), tmp_path / "plain.onnx")
    export.export_policy(policy, policy.make_spec(own), tmp_path / "own.onnx")
    plain, scaled = OnnxPolicy(tmp_path / "plain.onnx"), OnnxPolicy(tmp_path / "own.onnx")
    assert scaled.takes_prefix
    rng = np.random.default_rng(0)
    for batch in (1, 4):
        observation = {a.key: rng.standard_normal((batch, *a.shape)).astype(np.float32) for a in robot.observations}
        noise = rng.standard_normal((batch, 5, 7)).astype(np.float32)
        expected = plain.infer(observation, noise) * half + center
        np.testing.assert_allclose(scaled.infer(observation, noise), expected, atol=1e-3)
        prefix = rng.uniform(-1, 1, (batch, 5, 7)).astype(np.float32)
        mask = np.tile((np.arange(5) < 2).astype(np.float32), (batch, 1))
        given = (prefix * half + center).astype(np.float32)
        actions = scaled.infer(observation, noise, given, mask)
        assert np.array_equal(actions[:, :2], given[:, :2]), "what is committed comes back in every bit"
        expected = plain.infer(observation, noise, prefix, mask) * half + center
        np.testing.assert_allclose(actions[:, 2:], expected[:, 2:], atol=1e-3)
    session = onnxruntime.InferenceSession(tmp_path / "own.onnx")  # as a client that knows nothing of a prefix
    named = {**observation, "noise": noise}
    np.testing.assert_array_equal(session.run(None, named)[0], scaled.infer(observation, noise))
