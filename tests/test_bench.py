"""What the measurements measure; how fast it is, is for ``bench`` to say."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sacflow_robot.bench import export, serve_load, sim, train
from sacflow_robot.bench import replay_buffer as replay
from sacflow_robot.cli import main
from sacflow_robot.data.formats import hdf5
from sacflow_robot.data.formats.demonstrations import DemoSet
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.spec import Engine, RobotSpec


def test_bench_replay_says_what_it_measured_and_what_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in {"robomimic", *(name for name in sys.modules if name.startswith("robomimic."))}:
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    out = tmp_path / "new" / "replay.json"
    command = ["bench", "replay", "--steps", "1000", "1500", "--turns", "2", "--folder", str(tmp_path), "--json"]
    assert main([*command, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result == json.loads(out.read_text()) and {"date", "machine"} < set(result)
    sources = ["buffer in memory", "buffer memory-mapped", "numpy gather", "numpy take"]
    assert [row["source"] for row in result["rows"]] == 2 * sources
    assert all(880 < row["steps"] <= 1500 and row["batches_per_s"] > 0 for row in result["rows"])
    assert result["notes"] == ["no rows of robomimic: robomimic is not installed"]
    assert result["notes"][0] in captured.err
    assert main(["bench", "replay", "--steps", "10"]) == 2


def test_robomimic_reads_the_same_steps(robot: RobotSpec, tmp_path: Path) -> None:
    dataset = pytest.importorskip("robomimic.utils.dataset")
    obs_utils = pytest.importorskip("robomimic.utils.obs_utils")
    episodes = replay.made_up_episodes(robot, 400)
    hdf5.write(tmp_path / "steps.hdf5", DemoSet(robot, episodes, {"env_name": "", "type": 1, "env_kwargs": {}}))
    keys = [a.key for a in robot.observations]
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": keys}})
    read = dataset.SequenceDataset(
        str(tmp_path / "steps.hdf5"), keys, ("actions", "rewards"), seq_length=5, hdf5_cache_mode="low_dim"
    )
    assert len(read) == sum(map(len, episodes)) <= 400
    window = read[len(episodes[0]) + 7]
    assert np.array_equal(window["actions"], episodes[1].action[7:12])
    for key in keys:
        assert np.array_equal(window["next_obs"][key], episodes[1].observations[key][8:13])


def test_bench_sim_reports_ratios(
    tmp_path: Path, policy_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: dict[sim.BenchEngine, float] = {"stock": 100.0, "stripped": 110.0, "compiled": 430.0, "physics": 500.0}
    seconds: dict[Engine, float] = {"stock": 9.0, "compiled": 2.0}
    rows = [{"task": "lift", "engine": name, "workers": 1, "steps_per_s": rate} for name, rate in rates.items()]
    monkeypatch.setattr(sim, "measure", lambda *_: rows)
    evaluations = [{"engine": name, "episodes": 100, "successes": 97, "seconds": s} for name, s in seconds.items()]
    monkeypatch.setattr(sim, "measure_evaluation", lambda *_: (evaluations, True))
    out = tmp_path / "new" / "sim.json"
    command = ["bench", "sim", "--tasks", "lift", "--workers", "1", "--policy", str(policy_file), "--json"]
    assert main([*command, "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(out.read_text()) and {"date", "machine", "load_1min"} < set(result)
    assert result["ratios"] == [{"task": "lift", "workers": 1, "of_stock": 4.3, "of_physics": 0.86}]
    assert result["evaluation"]["of_stock"] == 4.5 and result["evaluation"]["same_actions"] is True
    assert main(["bench", "sim", "--tasks", "lfit"]) == main(["bench", "sim", "--turns", "0"]) == 2


@pytest.mark.slow
def test_bench_sim_measures_every_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "sim", "--tasks", "lift", "--turns", "1", "--workers", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rate = {row["engine"]: row["steps_per_s"] for row in result["rows"]}
    assert rate.keys() == {"stock", "stripped", "compiled", "physics"} and min(rate.values()) > 0
    assert all((row["workers"], row["task"]) == (1, "lift") for row in result["rows"])


@pytest.mark.slow
def test_bench_sim_times_the_same_episodes_under_both_engines() -> None:
    policy = OnnxPolicy(Path(__file__).parent.parent / "policies" / "lift.onnx")
    evaluations, same_actions = sim.measure_evaluation(policy, 2, 1)
    assert same_actions and [(row["engine"], row["successes"]) for row in evaluations] == [
        ("stock", 2),
        ("compiled", 2),
    ]


@pytest.mark.realtime  # what it holds against each other is measured one after the other
def test_bench_train_measures_each_case_in_a_process_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "train.json"
    command = [
        "bench",
        "train",
        "--cases",
        "bc:flow-g",
        "--compile",
        "off",
        "--precision",
        "float32",
        "--device",
        "cpu",
    ]
    command += ["--repeats", "1", "--seconds", "0.01", "--threads", "1", "--json", "--out", str(out)]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    (row,) = result["rows"]
    assert result == json.loads(out.read_text())
    assert {name: row[name] for name in ("algo", "velocity", "device", "precision", "compiled")} == {
        "algo": "bc",
        "velocity": "flow-g",
        "device": "cpu, 1 threads",
        "precision": "float32",
        "compiled": False,
    }
    assert row["updates_per_s"] > 0 and 100 < row["peak_mb"] < 4000
    assert row["limit"] in ("arithmetic", "memory") and 0 < row["percent_of_limit"] < 100
    assert main(["bench", "train", "--cases", "bc:flow-x"]) == 2
    assert "valid names: bc:flow-g," in capsys.readouterr().err


@pytest.mark.parametrize(("algo", "velocity"), train.CASES)
def test_bench_train_measures_the_published_sizes(algo: str, velocity: str) -> None:
    config = train.published(algo, velocity)
    learner = config.learner
    assert (config.algo, learner.batch_size, config.chunk_length * 7) == (algo, 256, 35)
    assert (learner.num_critics, learner.critic_width, learner.critic_depth, learner.policy_delay) == (2, 512, 4, 1)
    assert config.flow.euler_steps == (10 if algo == "qc-fql" else 4)


def test_limits_count_what_no_fusion_saves() -> None:
    cpu = torch.device("cpu")
    left, right = torch.ones(16, 8), torch.ones(8, 4)

    def product() -> None:
        (left @ right).relu()  # the relu can be fused away

    assert train.count_work(product, product, 2, cpu) == (2 * 16 * 8 * 4, 4 * (16 * 8 + 8 * 4 + 16 * 4), None)
    weight = torch.nn.Parameter(torch.zeros(32))
    adam = torch.optim.Adam([weight], fused=True)
    weight.grad = torch.ones(32)
    adam.step()
    read, written, step = 4 * 32 * 4, 3 * 32 * 4, 4
    assert train.count_work(adam.step, adam.step, 1, cpu) == (0, read + written + step, None)
    work, rates = train.Load(100.0, 10.0, 4.0), train.Load(1000.0, 50.0, 8.0)
    assert train.lowest_limit(work, rates) == ("launches", 2.0)
    assert train.lowest_limit(work._replace(kernels=None), rates) == ("memory", 5.0)
    assert train.lowest_limit(work._replace(bytes=0.0), rates._replace(kernels=None)) == ("arithmetic", 10.0)


@pytest.mark.gpu
def test_limits_of_a_gpu() -> None:
    gpu, x = torch.device("cuda"), torch.ones(64, 64, device="cuda")
    work = train.count_work(lambda: x @ x, lambda: x @ x, 3, gpu)
    assert work.operations == 2 * 64**3 and work.kernels is not None and 1 <= work.kernels <= 2
    rates = train.measure_rates(gpu, "bfloat16")
    assert rates.operations > 1e12 and rates.bytes > 1e11 and rates.kernels is not None and rates.kernels > 1e5


SERVE = ["bench", "serve", "--requests", "100", "--seconds", "0.5", "--endure", "200", "--fuzz", "300"]


def test_bench_serve_keeps_what_an_earlier_run_measured(
    tmp_path: Path, policy_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    many = {"clients": 50, "requests": 635, "lost": 0}
    monkeypatch.setattr(serve_load, "many_clients", lambda *_, **__: many)
    out = tmp_path / "new" / "serve.json"

    def measure(*options: str) -> dict[str, Any]:
        command = [*SERVE, "--policy", str(policy_file), "--velocities", "--out", str(out), "--json", *options]
        assert main(command) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert result == json.loads(out.read_text())
        return result

    first = measure("--parts", "clients")
    assert first["many_clients"] == [many]
    both = measure("--parts", "trips", "--requests", "150")
    assert both["parts"].keys() == {"trips", "clients"} and both["parts"]["trips"]["requests"] == 150
    assert both["many_clients"] == first["many_clients"] and both["parts"]["clients"] == first["parts"]["clients"]
    assert "measured earlier" in both["notes"][-1]
    assert [(row["velocity"], row["transport"]) for row in both["rows"]] == 2 * [("flow-g", "ipc")] + 2 * [
        ("flow-g", "tcp")
    ]
    assert all(0 < row["p50_us"] <= row["p99_us"] <= row["p999_us"] for row in both["rows"])
    assert main(["bench", "serve", "--requests", "10"]) == 2


@pytest.mark.slow
def test_bench_serve_measures_every_part(policy_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*SERVE, "--policy", str(policy_file), "--velocities", "mlp", "--episodes", "1", "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    asked = {"velocity", "transport", "p50_us", "p99_us", "p999_us", "ort_p50_us", "echo_p50_us", "ratio_p50"}
    assert [(row["velocity"], row["transport"]) for row in result["rows"]] == [
        (velocity, transport) for velocity in ("flow-g", "mlp") for transport in ("ipc", "ipc", "tcp", "tcp")
    ]
    assert all(asked <= set(row) and 0 < row["p50_us"] <= row["p99_us"] for row in result["rows"])
    assert {row["way"] for row in result["websocket_rows"]} == {
        "native",
        "openpi gateway",
        "plain websockets + msgpack",
    }
    assert [row["asked"] for row in result["websocket_rows"][:6]] == ["back to back"] * 3 + ["at 20 Hz"] * 3
    for row in result["websocket_gaps"]:
        assert all(row[f"{p}_low_us"] <= row[f"{p}_later_us"] <= row[f"{p}_high_us"] for p in ("p50", "p99"))
    assert len(result["websocket_gaps"]) == 2 * 2 * 3
    for name in ("many_clients", "endure_rest", "endure_reload"):
        (row,) = result[name]
        assert row["requests"] > 0 and row["lost"] == row.get("wrong", 0) == 0
    assert [(row["mode"], row["delay_ms"]) for row in result["seams"]][::2][:2] == [("switch", 10), ("blend", 10)]
    assert all(row["seams"] > 0 and row["seam_p99"] > 0 for row in result["seams"])
    assert next(row["mean_batch"] for row in result["throughput_rows"]) == 1
    for row in result["fuzz_rows"]:
        assert row["messages"] == 300 and row["echoed"] == row["good_wrong"] == 0
        assert (row["answered"] == 0) == (row["door"] == "native, locked"), "strangers get nothing"
    assert sorted(result["parts"]) == sorted(
        ["trips", "websockets", "clients", "throughput", "seams", "endure", "fuzz"]
    )


def test_bench_export_keeps_other_velocities(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"naive": 200.0, "folded": 50.0}
    monkeypatch.setattr(
        export,
        "measure",
        lambda robot, velocity, *_: [
            {
                "velocity": velocity,
                "variant": name,
                "euler_steps": 4,
                "bytes": 9,
                "nodes": 9,
                "p50_us": t,
                "p99_us": t,
                "max_abs_error": 1e-6,
            }
            for name, t in times.items()
        ],
    )
    out = tmp_path / "new" / "export.json"
    for velocity in ("mlp", "flow-g"):
        assert main(["bench", "export", "--velocities", velocity, "--json", "--out", str(out)]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result == json.loads(out.read_text()) and {"date", "machine", "measured"} < set(result)
    assert [(row["velocity"], row["variant"]) for row in result["rows"]] == [
        ("flow-g", "naive"),
        ("flow-g", "folded"),
        ("mlp", "naive"),
        ("mlp", "folded"),
    ]
    assert result["folded_of_naive"] == {"flow-g": 0.25, "mlp": 0.25} and result["measured"].keys() == {"flow-g", "mlp"}
    assert main(["bench", "export", "--euler-steps", "0"]) == main(["bench", "export", "--bursts", "0"]) == 2


@pytest.mark.slow
def test_bench_export_sets_graphs_side_by_side(robot: RobotSpec) -> None:
    rows = {row["variant"]: row for row in export.measure(robot, "mlp", (1,), 1)}
    kinds = ["folded, float16", "folded, bf16", "folded, int8"]
    assert list(rows) == ["naive", "as trained", "folded", *kinds, "folded, prefix", "folded, K = 1"]
    for name, row in rows.items():
        assert row["velocity"] == "mlp" and row["euler_steps"] == (1 if name == "folded, K = 1" else 4)
        assert row["p50_us"] > 0 and 0 < row["max_abs_error"] < (0.05 if name in kinds else 1e-5)
    assert rows["folded"]["nodes"] < rows["as trained"]["nodes"] < rows["naive"]["nodes"]
    assert all(rows[name]["bytes"] < 0.7 * rows["folded"]["bytes"] for name in kinds)
