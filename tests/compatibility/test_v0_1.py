"""Files and options of version 0.1 keep working. README.md beside this file says how they were made."""

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sacflow_robot.calibrate.profile import load_profile
from sacflow_robot.cli import main
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.episode import Episode, Source
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.serve.client import PolicyClient
from sacflow_robot.serve.server import PolicyServer

OLD = Path(__file__).parent / "v0_1"
SHIPPED = OLD.parents[2] / "policies" / "lift.onnx"
EXPECTED = json.loads((OLD / "expected.json").read_text())
OPTIONS: dict[str, list[str]] = json.loads((OLD / "options.json").read_text())

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, which is the current one, with a copy of every old file."""
    for archive in OLD.glob("*.tar.gz"):
        with tarfile.open(archive) as tar:
            tar.extractall(tmp_path, filter="data")
    for file in ("profile.yaml", "motion.npz", "best_of_float16.onnx"):
        (tmp_path / file).write_bytes((OLD / file).read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def called(capsys: Capture, *words: object) -> dict[str, Any]:
    """The JSON of a command that must succeed."""
    assert main([*map(str, words), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def columns(episode: Episode) -> dict[str, npt.NDArray[Any] | None]:
    """Every column of an episode, under the names of expected.json."""
    return {
        **{f"observation.{key}": rows for key, rows in episode.observations.items()},
        "action": episode.action,
        "policy_action": episode.policy_action,
        "intervention_action": episode.intervention_action,
        "measured": episode.measured,
        "source": episode.source,
        "flags": episode.flags,
        "reward": episode.rewards,
        "terminated": episode.terminated,
        "truncated": episode.truncated,
        "time_ns": episode.time_ns,
        "received_ns": episode.received_ns,
        "inferred_ns": episode.inferred_ns,
        "sent_ns": episode.sent_ns,
        "state": episode.states,
    }


def sums(rows: npt.NDArray[Any] | None) -> list[float] | None:
    """Rows, finite numbers, their sum, and their sum weighted by their place, which tells their order."""
    if rows is None:
        return None
    flat = np.asarray(rows, np.float64).reshape(-1)
    finite = np.isfinite(flat)
    weights = np.cos(np.arange(len(flat)))
    return [len(rows), int(finite.sum()), float(flat[finite].sum()), float((flat * weights)[finite].sum())]


@pytest.mark.parametrize("name", ["episodes.zarr", "held.zarr"])
def test_a_log_holds_what_was_recorded(old: Path, capsys: Capture, name: str) -> None:
    log = EpisodeLog.open(old / name)
    assert len(log) == len(EXPECTED[name])
    for index, expected in enumerate(EXPECTED[name]):
        episode = log.read(index)
        found = columns(episode)
        assert set(found) == set(expected["columns"])
        for column, rows in found.items():
            wanted = expected["columns"][column]
            assert sums(rows) == (None if wanted is None else pytest.approx(wanted, rel=1e-12, abs=1e-9)), column
        assert {key: episode.info[key] for key in expected["info"]} == expected["info"]
        assert episode.success == expected["info"]["success"]
        assert {each.name: int((episode.source == each).sum()) for each in Source} == expected["sources"]
    assert called(capsys, "log", "info", name)["episodes"] == len(log)


@pytest.mark.parametrize("index", range(3))
def test_a_log_is_replayed(old: Path, capsys: Capture, index: int) -> None:
    replayed = called(capsys, "replay", "episodes.zarr", "--episode", index)
    assert replayed["steps"] == EXPECTED["episodes.zarr"][index]["columns"]["action"][0]
    assert replayed["max_state_deviation"] <= 1e-9
    assert replayed["success"] == (index != 1)


@pytest.mark.parametrize(
    ("run", "options"),
    [("run-sac-flow", ("--learner.policy-rate", "1e-4", "--learner.gradient-clip", "1")), ("run-qc-fql", ())],
)
def test_a_run_is_resumed(old: Path, capsys: Capture, run: str, options: tuple[str, ...]) -> None:
    trained = called(capsys, "train", "--resume", run, "--online-steps", 240, *options)
    assert trained["env_steps"] == 240, "in chunks of 5, of which the run had done 220"
    policy = OnnxPolicy(old / run / "lift.onnx")
    changed = [answer(policy, each) - np.array(each["actions"]) for each in EXPECTED["actions"][run]]
    assert 1e-7 < np.abs(changed).max() < 1e-2, "it has learned, from where it was"


def test_a_run_is_exported(old: Path, capsys: Capture) -> None:
    called(capsys, "export", "run-qc-fql", "--out", "again.onnx")
    policy = OnnxPolicy(old / "again.onnx")
    for each in EXPECTED["actions"]["run-qc-fql"]:
        assert answer(policy, each) == pytest.approx(np.array(each["actions"]), abs=1e-5)


def answer(policy: Any, question: dict[str, Any]) -> npt.NDArray[Any]:
    """The chunk (H, A) for an observation and noise of expected.json."""
    observation = {key: np.array([row], np.float32) for key, row in question["observation"].items()}
    return np.asarray(policy.infer(observation, np.array([question["noise"]], np.float32))[0])


@pytest.mark.parametrize("name", sorted(EXPECTED["actions"]))
def test_a_policy_is_served(old: Path, name: str) -> None:
    path = old / (name if name.endswith(".onnx") else f"{name}/lift.onnx")
    policy = OnnxPolicy(path)
    with PolicyServer(policy, "tcp://127.0.0.1:*") as server, PolicyClient(server.start().address) as client:
        assert client.spec == policy.spec
        for each in EXPECTED["actions"][name]:
            assert answer(client, each) == pytest.approx(np.array(each["actions"]), abs=1e-5)


def test_a_profile_limits_the_robot(old: Path) -> None:
    profile, expected = load_profile(old / "profile.yaml"), EXPECTED["profile"]
    assert profile.version == expected["version"]
    measured = {name: [list(each.value), list(each.uncertainty)] for name, each in profile.measured.items()}
    assert measured == expected["measured"]
    limits = profile.safety_limits(EpisodeLog.open(old / "episodes.zarr").robot)
    assert limits.speed_m_per_s == pytest.approx(expected["speed_m_per_s"])
    assert limits.workspace is not None
    assert [list(limits.workspace.low), list(limits.workspace.high)] == expected["workspace"]
    times = limits.max_observation_age_s, limits.max_action_age_s, limits.patience_s, limits.hold_to_stop_s
    assert list(times) == expected["times_s"]


def test_a_robot_appends_to_an_old_log(old: Path, capsys: Capture) -> None:
    log = ("--log", "episodes.zarr", "--profile", "profile.yaml")
    with PolicyServer(OnnxPolicy(SHIPPED), "tcp://127.0.0.1:*") as server:
        ran = called(capsys, "run", "--server", server.start().address, "--episodes", 1, "--seed", 30_002, *log)
    assert ran["episodes"] == ran["successes"] == 1
    before, after = (EpisodeLog.open(old / "episodes.zarr").read(index) for index in (2, 3))
    assert np.array_equal(before.action, after.action), "the same policy, seed and limits"


def test_a_recording_is_measured_again(old: Path, capsys: Capture) -> None:
    measured = called(capsys, "calibrate", "latency", "--profile", "profile.yaml", "--recording", "motion.npz")
    for name, expected in EXPECTED["latency"].items():
        assert measured["values"][name]["value"] == pytest.approx(expected["value"], abs=0.02)


def refusal(capsys: Capture, *words: str) -> str:
    """Message of a command that gets an option that no version has."""
    assert main([*words, "--no-such-option"]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_is_known(capsys: Capture, command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    shown = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out))
    assert "--never-was" in refusal(capsys, *command.split(), "x", "x", "--never-was")
    for option in set(OPTIONS[command]) - shown:  # renamed since
        unrecognized = refusal(capsys, *command.split(), "x", "x", option).partition("Unrecognized options:")[2]
        assert option not in unrecognized.partition("Perhaps")[0].replace(",", " ").split(), option
