"""The command line: help, exit statuses and one-line errors."""

import io
import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sacflow_robot.cli import COMMANDS, GROUPS, main
from sacflow_robot.data.log.episode_writer import write_log
from sacflow_robot.episode import Episode
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.config_file import from_yaml, to_yaml
from sacflow_robot.learn.presets import preset
from sacflow_robot.learn.run_folder import RunFolder
from sacflow_robot.spec import RobotSpec

Capture = pytest.CaptureFixture[str]


def fails(capsys: Capture, status: int, *words: object) -> str:
    """Run a command that must fail with this status; returns its one line."""
    assert main([str(word) for word in words]) == status
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("sacflow-robot: error: ")]
    assert len(lines) == 1 and not captured.out, captured
    return lines[0]


def test_overview_and_help_of_every_command(capsys: Capture) -> None:
    assert main([]) == 0
    overview = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name} " in overview
        with pytest.raises(SystemExit) as stopped:
            main([*name.split(), "--help"])
        assert stopped.value.code == 0
        assert f"usage: sacflow-robot {name}" in capsys.readouterr().out
    assert main(["--version"]) == 0


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_of_commands_lists_its_own(capsys: Capture, group: str) -> None:
    overviews = set()
    for words in ([group], [group, "--help"], [group, "-h"], ["help", group]):
        assert main(words) == 0
        overviews.add(capsys.readouterr().out)
    (overview,) = overviews
    listed = [line for line in overview.splitlines() if line.startswith("  ")]
    assert listed and all(line.startswith(f"  {group} ") for line in listed)
    known = next(name for name in COMMANDS if name.startswith(f"{group} "))
    assert fails(capsys, 2, *known[:-1].split()).endswith(f"; did you mean {known!r}?")


def test_help_is_a_command_too(capsys: Capture) -> None:
    assert main([]) == main(["--help"]) == main(["help"]) == 0
    assert "usage: sacflow-robot COMMAND" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["help", "keys", "new"])
    assert stopped.value.code == 0 and "usage: sacflow-robot keys new" in capsys.readouterr().out
    assert "unknown command 'nothing'" in fails(capsys, 2, "help", "nothing")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("trian",), "train"),
        (("demo", "info"), "demos"),
        (("log", "inof", "x"), "log info"),
        (("eval", "--policy", "policies/lift.onnx", "--env", "Lift"), "lift"),
        (("train", "--algo", "sac_flow"), "sac-flow"),
        (("run", "--robot", "smi:lift"), "sim:..."),
        (("run", "--robot", "sim:lfit"), "lift"),
        (("run", "--robot", "rtsim:lift?obs_delay=3"), "obs_delay_ms"),
    ],
)
def test_the_nearest_name_is_proposed(capsys: Capture, words: tuple[str, ...], meant: str) -> None:
    assert fails(capsys, 2, *words).endswith(f"; did you mean {meant!r}?")


def test_unknown_names_list_the_valid_ones(capsys: Capture) -> None:
    listed = fails(capsys, 2, "trian")
    assert (
        "bench log, bench loop, bench replay" in listed
        and "demos collect, demos convert, demos info, doctor, estop, eval" in listed
    )
    assert "valid names: demos collect" in fails(capsys, 2, "demos", "colect")
    assert "unknown task 'lfit'; valid names: can, door, lift, none, square, stack, any Gymnasium id" in fails(
        capsys, 2, "train", "--env", "lfit"
    )
    assert "valid names: flow-g, flow-l, flow-t, mlp" in fails(capsys, 2, "train", "--velocity", "flow")
    assert "Unrecognized options: --ofline-steps" in fails(capsys, 2, "train", "--ofline-steps", 3)
    assert "unknown algorithm 'foo'; valid names: bc, qc, qc-fql, rlpd, sac" in fails(
        capsys, 2, "train", "--algo", "foo"
    )
    assert "--velocity: expected one argument" in fails(capsys, 2, "train", "--velocity")
    assert "error: missing: --policy PATH Policy file. (required); see 'sacflow-robot eval --help'" in fails(
        capsys, 2, "eval"
    )
    assert "leave out --seed 3" in fails(capsys, 2, "train", "--resume", "run", "--seed", 3)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_bad_options_are_said_in_one_line_without_a_frame(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser draws a frame around what it says, in dashes where the terminal takes ASCII only."""
    for words, message in (
        (("eval",), "missing: --policy PATH Policy file. (required)"),
        (("eval", "--nope", "3", "--policy", "x"), "Unrecognized options: --nope, 3"),
        (
            ("eval", "--episods", "3", "--policy", "x"),
            "Unrecognized options: --episods, 3 Perhaps you meant: --episodes INT Episodes to run. (default: 100)",
        ),
        (
            ("eval", "--policy", "x", "--episodes", "many"),
            "Error parsing --episodes: invalid literal for int() with base 10: 'many'",
        ),
    ):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2)]
        with monkeypatch.context() as patch:
            for name, stream in zip(("stdout", "stderr"), streams, strict=True):
                patch.setattr(sys, name, stream)
            assert main(words) == 2
        out, err = (stream.buffer.getvalue().decode() for stream in streams)  # type: ignore[attr-defined]
        assert not out and err == f"sacflow-robot: error: {message}; see 'sacflow-robot eval --help'\n"


def test_bad_use_of_each_command(
    capsys: Capture, tmp_path: Path, policy_file: Path, make_episode: Callable[..., Episode], robot: RobotSpec
) -> None:
    absent, out = tmp_path / "absent", tmp_path / "out"
    assert "no file or folder" in fails(capsys, 1, "train", "--demos", absent, "--out", out)
    assert "nothing to learn from" in fails(capsys, 2, "train", "--demos", "none", "--out", out)
    assert "not a run folder" in fails(capsys, 1, "train", "--resume", absent)
    assert "not a run folder" in fails(capsys, 1, "export", absent)
    run = RunFolder.create(tmp_path / "run", preset("lift")).path
    for option, theirs in (
        (("--env", "can"), "env lift"),
        (("--velocity", "flow-t"), "velocity flow-g"),
        (("--algo", "bc"), "algo sac-flow"),
        (("--from-scratch",), "from-scratch false"),
    ):
        said = fails(capsys, 2, "train", "--resume", run, *option)
        assert f"{' '.join(option)} with --resume {run}, a run of {theirs}; leave it out" in said
    assert "--full sizes a new run" in fails(capsys, 2, "train", "--resume", run, "--full")
    assert "has no checkpoint.pt" in fails(capsys, 1, "train", "--resume", run, "--env", "lift", "--no-from-scratch")
    assert "no policy file" in fails(capsys, 1, "eval", "--policy", absent)
    assert "unknown task" in fails(capsys, 2, "eval", "--policy", policy_file, "--env", "x")
    assert "--episodes must be at least 1" in fails(capsys, 2, "eval", "--policy", policy_file, "--episodes", 0)
    assert "no policy file" in fails(capsys, 1, "serve", "--policy", absent)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bind = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        assert "it is in use" in fails(capsys, 2, "serve", "--policy", policy_file, "--bind", bind)
    serve = "serve", "--threads", 1, "--policy", policy_file
    assert "cannot bind" in fails(capsys, 2, *serve, "--bind", "tcp://256.0.0.1:1", "--insecure")
    for place in ("*:5555", "0.0.0.0:5555", "256.0.0.1:1", "[::]:5555"):
        assert "can be reached from other computers, by anyone" in fails(capsys, 2, *serve, "--bind", f"tcp://{place}")
    assert "can be reached from other" in fails(
        capsys, 2, *serve, "--bind", "tcp://127.0.0.1:*", "--metrics", "0.0.0.0:0"
    )
    assert "--key and --clients go together" in fails(capsys, 2, *serve, "--bind", "tcp://127.0.0.1:*", "--key", absent)
    keyed = *serve, "--bind", "tcp://127.0.0.1:*", "--clients", tmp_path, "--key"
    assert "no key can be read from" in fails(capsys, 1, *keyed, absent)
    assert main(["keys", "new", "server", "--out", str(tmp_path / "keys")]) == 0
    capsys.readouterr()
    assert "there are keys named 'server'" in fails(capsys, 2, "keys", "new", "server", "--out", tmp_path / "keys")
    assert "cannot name a file" in fails(capsys, 2, "keys", "new", "../server", "--out", tmp_path / "keys")
    assert "holds no secret key" in fails(capsys, 1, *keyed, tmp_path / "keys" / "server.key")
    assert "valid names: cpu, cuda, tensorrt" in fails(capsys, 2, *serve, "--provider", "tpu")
    assert "has no CUDAExecutionProvider; it has cpu" in fails(capsys, 2, *serve, "--provider", "cuda")
    assert "--key and --server-key go together" in fails(capsys, 2, "top", "--key", absent)
    nobody = "tcp://127.0.0.1:9"
    for timeout in ("inf", "nan", "0"):
        assert "--timeout above 0" in fails(capsys, 2, "run", "--server", nobody, "--timeout", timeout)
    assert "unknown robot driver" in fails(capsys, 2, "run", "--server", nobody, "--robot", "foo:bar")
    assert "no answer from" in fails(capsys, 1, "run", "--server", nobody, "--timeout", 0.2, "--log", out)
    assert "no episode log" in fails(capsys, 1, "replay", absent)
    assert "no episode log" in fails(capsys, 1, "log", "info", absent)
    assert "launch file" in fails(capsys, 1, "launch", absent)
    assert not out.exists(), "a command that failed left nothing behind"

    log = tmp_path / "log.zarr"
    write_log(log, robot, [make_episode(3)])
    assert "there is no episode 7" in fails(capsys, 2, "replay", log, "--episode", 7)
    assert "exists already" in fails(capsys, 2, "demos", "collect", "--out", log)
    assert "ends in .mp4" in fails(capsys, 2, "replay", log, "--video", tmp_path / "a.gif")
    assert "folder that exists" in fails(capsys, 2, "replay", log, "--video", absent / "a.mp4")
    (tmp_path / "taken").write_text("")
    assert "exists already" in fails(
        capsys, 2, "train", "--demos", "none", "--replay", log, "--out", tmp_path / "taken"
    )


def test_log_info_reports_and_speaks_json(
    capsys: Capture, tmp_path: Path, make_episode: Callable[..., Episode], robot: RobotSpec
) -> None:
    log = tmp_path / "log.zarr"
    write_log(log, robot, [make_episode(3), make_episode(5, success=False)])
    assert main(["log", "info", str(log), "--json"]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert (data["episodes"], data["successes"], data["steps"]) == (2, 1, 8)
    assert data["sources"] == {"policy": 8}
    assert "OSC_POSE delta" in captured.err


def test_launch_files_are_checked(capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "cell.yaml"
    for content, message in (
        ("- serve", "not a map"),
        ("a: [", "cannot be read"),
        ("a: rm -rf .", "starts with no command of this program"),
        ("a: 3", "not a map of process names to command lines"),
        ("a: serve --policy 'x", "a command line cannot be read"),
    ):
        file.write_text(content)
        assert message in fails(capsys, 1, "launch", file)


def test_episodes_on_evaluation_seeds_are_not_trained_on(
    capsys: Capture, tmp_path: Path, make_episode: Callable[..., Episode], robot: RobotSpec
) -> None:
    """Success on seeds that the learner has seen says nothing."""
    log, out = tmp_path / "log.zarr", tmp_path / "out"
    for seed in (10_000, 10_099, 20_049):
        write_log(log, robot, [make_episode(3, seed=1), make_episode(3, seed=seed)])
        message = fails(capsys, 1, "train", "--demos", "none", "--replay", log, "--out", out)
        assert f"episode 1, has seed {seed}, on which this run evaluates" in message and not out.exists()
        shutil.rmtree(log)


def test_an_evaluation_is_the_same_on_both_engines(policy_file: Path, capsys: Capture) -> None:
    results = {}
    for engine in ("stock", "compiled"):
        assert main(["eval", "--policy", str(policy_file), "--episodes", "1", "--env-engine", engine, "--json"]) == 0
        results[engine] = json.loads(capsys.readouterr().out)
        assert results[engine].pop("env_engine") == engine and results[engine].pop("wall_s") > 0
    assert results["stock"] == results["compiled"]
    assert "invalid choice" in fails(capsys, 2, "eval", "--policy", policy_file, "--env-engine", "quick")


def test_a_run_takes_up_a_configuration_from_before_there_were_engines() -> None:
    text = to_yaml(TrainConfig())
    assert from_yaml(text).env_engine == "compiled"
    assert from_yaml(text.replace("env_engine: compiled\n", "")).env_engine == "stock"


def test_options_that_an_algorithm_has_no_use_for_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for algo, option in (
        ("bc", ("--learner.bc-coef", "0.5")),
        ("qc", ("--learner.bc-loss=same-noise",)),
        ("qc-fql", ("--learner.initial-temperature", "0.1")),
        ("rlpd", ("--velocity", "flow-t")),
        ("sac", ("--flow.no-drift",)),
    ):
        name = option[0].split("=")[0].replace("no-", "")
        assert f"{name} does nothing with --algo {algo}; leave it out" in fails(
            capsys, 2, "train", "--algo", algo, *option
        )
