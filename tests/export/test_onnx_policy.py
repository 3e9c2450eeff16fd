import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from sacflow_robot.errors import InvalidValueError, PolicyFileError
from sacflow_robot.export import metadata as policyfile
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.export.to_onnx import export_policy
from sacflow_robot.learn.config import FlowConfig
from sacflow_robot.learn.flow import FlowPolicy
from sacflow_robot.serve.reload import Reloader
from sacflow_robot.serve.server import PolicyServer
from sacflow_robot.spec import PolicySpec, RobotSpec
from sacflow_robot.utils.seeding import chunk_noise


def observation(policy: OnnxPolicy, batch: int) -> dict[str, np.ndarray]:
    return {a.key: np.zeros((batch, *a.shape), np.float32) for a in policy.spec.robot.observations}


def test_it_infers_and_checks_its_inputs(policy_file: Path) -> None:
    policy = OnnxPolicy(policy_file)
    noise = chunk_noise((2, 5, 7), 1)
    actions = policy.infer(observation(policy, 2), noise)
    assert actions.shape == (2, 5, 7) and np.abs(actions).max() <= 1
    with pytest.raises(InvalidValueError, match=r"noise has shape \(5, 7\), expected \(B, 5, 7\)"):
        policy.infer(observation(policy, 2), noise[0])
    with pytest.raises(InvalidValueError, match="noise contains NaN"):
        policy.infer(observation(policy, 2), noise * np.nan)
    with pytest.raises(InvalidValueError, match=r"\(3, 3\), expected \(2, 3\)"):
        policy.infer(observation(policy, 3), noise)
    bad = {**observation(policy, 2), "object": np.full((2, 10), np.inf)}
    with pytest.raises(InvalidValueError, match="'object' contains NaN or infinity"):
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


def renamed(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.name = new if value.name == old else value.name


def value(model: onnx.ModelProto, name: str) -> onnx.TypeProto.Tensor:
    return next(v for v in (*model.graph.input, *model.graph.output) if v.name == name).type.tensor_type


def retyped(model: onnx.ModelProto) -> None:
    value(model, "noise").elem_type = onnx.TensorProto.DOUBLE
    model.graph.node.insert(0, onnx.helper.make_node("Cast", ["noise"], ["noise_float"], to=onnx.TensorProto.FLOAT))
    for node in model.graph.node[1:]:
        node.input[:] = ["noise_float" if name == "noise" else name for name in node.input]


def respecified(model: onnx.ModelProto, **changes: object) -> None:
    kept = {p.key: p.value for p in model.metadata_props}
    spec = replace(PolicySpec.from_json(kept[policyfile.SPEC_KEY]), **changes)
    kept |= {policyfile.SPEC_KEY: spec.to_json(), policyfile.FINGERPRINT_KEY: spec.fingerprint}
    onnx.helper.set_model_props(model, kept)


def another_input(model: onnx.ModelProto) -> None:
    extra = onnx.helper.make_tensor_value_info("force", onnx.TensorProto.FLOAT, ["batch", 6])
    model.graph.input.append(extra)


def fixed_batch(model: onnx.ModelProto) -> None:
    value(model, "object").shape.dim[0].dim_value = 1


def flat(model: onnx.ModelProto) -> None:
    shape = onnx.helper.make_tensor("flat_shape", onnx.TensorProto.INT64, [2], [-1, 35])
    renamed(model, "actions", "chunk")
    model.graph.initializer.append(shape)
    model.graph.node.append(onnx.helper.make_node("Reshape", ["chunk", "flat_shape"], ["actions"]))
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("actions", onnx.TensorProto.FLOAT, ["batch", 35]))


FAULTS: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "output": (lambda m: renamed(m, "actions", "output"), "it has no output 'actions', but output"),
    "input": (lambda m: renamed(m, "object", "cube"), "it has no input 'object', but .*needs an input 'cube'"),
    "noise": (lambda m: renamed(m, "noise", "z"), "it has no input 'noise'.*needs an input 'z'"),
    "prefix": (lambda m: renamed(m, "prefix", "given"), "it takes prefix_mask alone"),
    "type": (retyped, r"input 'noise' is tensor\(double\), expected tensor\(float\)"),
    "rank": (flat, r"output 'actions' has shape \(batch, 35\), expected \(B, 5, 7\) for any B"),
    "chunk length": (
        lambda m: respecified(m, chunk_length=4),
        r"'noise' has shape \(batch, 5, 7\), expected \(B, 4, 7\)",
    ),
    "batch": (fixed_batch, r"input 'object' has shape \(1, 10\), expected \(B, 10\) for any B"),
    "more": (another_input, "needs an input 'force' that the specification does not know"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_graph_that_is_not_what_its_specification_says_is_not_served(
    policy_file: Path, tmp_path: Path, fault: str
) -> None:
    change, complaint = FAULTS[fault]
    model, path = onnx.load(policy_file), tmp_path / "served.onnx"
    change(model)
    onnx.save(model, path)
    with pytest.raises(PolicyFileError, match=complaint) as error:
        OnnxPolicy(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{path}: its graph is not what")
    shutil.copy(policy_file, path)
    with PolicyServer(OnnxPolicy(path), "tcp://127.0.0.1:*") as server:
        serving = server.policy
        onnx.save(model, path)
        assert not Reloader(server, path, watch=False).reload() and server.newest is serving
        assert "its graph is not what" in (server.meters.last_reload or {})["reason"]


def test_a_foreign_file_is_told_where_to_go(policy_file: Path, tmp_path: Path) -> None:
    model = onnx.load(policy_file)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(
        PolicyFileError, match=r"lacks sacflow_robot\.spec, .*sacflow-robot export.*docs/protocol\.md"
    ) as error:
        OnnxPolicy(tmp_path / "foreign.onnx")
    title = str(error.value).rpartition("'")[0].rpartition("'")[2]
    assert f"## {title}\n" in (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()


def test_a_file_too_large_for_a_policy_is_not_read(tmp_path: Path) -> None:
    huge = tmp_path / "huge.onnx"
    with huge.open("wb") as file:
        file.truncate(6 * 2**30)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    for read in (OnnxPolicy, policyfile.file_version):
        with pytest.raises(PolicyFileError, match=r"huge\.onnx has 6\.0 GiB, a policy file 1 GiB at most"):
            read(huge)
    assert time.monotonic() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18, "KiB"
    for no_file in (Path("/dev/zero"), tmp_path):
        with pytest.raises(PolicyFileError, match="no policy file at"):
            OnnxPolicy(no_file)


def test_int8_weights_on_an_older_runtime(policy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sacflow_robot.export.to_onnx as weights

    monkeypatch.setattr(weights, "_LEAST_SUM", 8)
    model = onnx.load(policy_file)
    weights._to_int8(model)
    onnx.save(model, tmp_path / "int8.onnx")
    needed = r"int8.onnx has int8 weights, which needs onnxruntime >= 1\.22; installed 1\.(20\.1|9\.0): pip install -U"
    for installed in ("1.20.1", "1.9.0"):
        monkeypatch.setattr(onnxruntime, "__version__", installed)
        OnnxPolicy(policy_file)
        with pytest.raises(PolicyFileError, match=needed):
            OnnxPolicy(tmp_path / "int8.onnx")
    monkeypatch.setattr(onnxruntime, "__version__", "1.22.0")
    with pytest.raises(
        PolicyFileError, match="fails its self-test"
    ):  # the golden vectors are those of the other weights
        OnnxPolicy(tmp_path / "int8.onnx")


def change_read(source: Path) -> str:
    return next(p.value for p in onnx.load(source).metadata_props if p.key == policyfile.GOLDEN_KEY)


def committed(policy: OnnxPolicy, mask: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    prefix = np.random.default_rng(0).uniform(-1, 1, (len(mask), *policy.spec.noise_shape)).astype(np.float32)
    return prefix, np.array(mask, np.float32)


def test_what_is_committed_comes_back(policy_file: Path) -> None:
    policy = OnnxPolicy(policy_file)
    assert policy.takes_prefix
    noise, seen = chunk_noise((2, 5, 7), 1), observation(policy, 2)
    prefix, mask = committed(policy, [[1, 1, 0, 0, 0], [0] * 5])
    plain, chunk = policy.infer(seen, noise), policy.infer(seen, noise, prefix, mask)
    assert np.array_equal(chunk[0, :2], prefix[0, :2])
    assert np.abs(chunk[0, 2:] - plain[0, 2:]).max() > 1e-4
    np.testing.assert_allclose(chunk[1], plain[1], atol=1e-5)
    assert {"prefix", "prefix_mask"} <= set(policy.blank_inputs(3))


def test_a_prefix_is_optional_in_the_file(policy_file: Path) -> None:
    """ONNX Runtime alone needs observation and noise, of any batch."""
    policy, session = OnnxPolicy(policy_file), onnxruntime.InferenceSession(policy_file)
    seen, noise = observation(policy, 4), chunk_noise((4, 5, 7), 2)
    assert {i.name for i in session.get_inputs()} == {*seen, "noise"}
    np.testing.assert_allclose(session.run(None, {**seen, "noise": noise})[0], policy.infer(seen, noise), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"prefix_mask": None}, "prefix and prefix_mask go together; only one is given"),
        ({"prefix": np.zeros((1, 5, 7))}, r"prefix has shape \(1, 5, 7\), expected \(2, 5, 7\)"),
        ({"prefix_mask": np.zeros((2, 7))}, r"prefix_mask has shape \(2, 7\), expected \(2, 5\)"),
        ({"prefix": np.full((2, 5, 7), np.nan)}, "prefix contains NaN or infinity"),
        ({"prefix_mask": np.full((2, 5), 2.0)}, "prefix_mask must be 1 where a step is committed and 0 elsewhere"),
    ],
)
def test_a_prefix_is_checked(policy_file: Path, changes: dict[str, np.ndarray | None], complaint: str) -> None:
    policy = OnnxPolicy(policy_file)
    prefix, mask = committed(policy, [[1, 0, 0, 0, 0]] * 2)
    given = {"prefix": prefix, "prefix_mask": mask, **changes}
    with pytest.raises(InvalidValueError, match=complaint):
        policy.infer(observation(policy, 2), chunk_noise((2, 5, 7), 1), **given)


def test_a_policy_without_a_prefix_serves_as_before(robot: RobotSpec, tmp_path: Path) -> None:
    torch.manual_seed(0)
    flow = FlowPolicy(
        "flow-g", robot.observation_dim, 5 * robot.action_dim, FlowConfig(width=32, depth=2, gate_width=16)
    )
    export_policy(flow, flow.make_spec(robot), tmp_path / "plain.onnx", prefix=False)
    policy = OnnxPolicy(tmp_path / "plain.onnx")
    assert not policy.takes_prefix
    noise, seen = chunk_noise((2, 5, 7), 1), observation(policy, 2)
    assert policy.infer(seen, noise).shape == (2, 5, 7)
    assert set(policy.blank_inputs(1)) == set(policy.check(seen, noise)) == {*seen, "noise"}
    prefix, mask = committed(policy, [[1, 0, 0, 0, 0]] * 2)
    with pytest.raises(InvalidValueError, match="takes no prefix; export it again"):
        policy.infer(seen, noise, prefix, mask)
