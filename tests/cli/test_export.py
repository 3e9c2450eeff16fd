"""What can be chosen at export, from the command line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from sacflow_robot.cli import main
from sacflow_robot.envs.vector import make_vector_env
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.learn.config import FlowConfig, TrainConfig
from sacflow_robot.learn.progress import TrainingProgress
from sacflow_robot.learn.run_folder import RunFolder
from sacflow_robot.learn.trainer import Trainer


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few updates, without demonstrations."""
    folder = tmp_path_factory.mktemp("runs") / "pendulum"
    command = ["train", "--env", "InvertedPendulum-v5", "--from-scratch", "--online-steps", "20", "--out", str(folder)]
    command += ["--learner.warmup-steps", "10", "--eval-episodes", "0", "--final-eval-episodes", "0"]
    assert main([*command, "--flow.width", "32", "--learner.critic-width", "32"]) == 0
    return folder


def export(run_dir: Path, out: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, object]:
    capsys.readouterr()
    assert main(["export", str(run_dir), "--out", str(out), "--json", *options]) == 0
    result: dict[str, object] = json.loads(capsys.readouterr().out)
    return result


def test_weights_steps_and_best_of_are_chosen_at_export(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.onnx"
    plain = export(run_dir, out, capsys)
    assert (plain["weights"], plain["best_of"], plain["prefix"]) == ("float32", 1, True)
    options = ["--weights", "bf16", "--euler-steps", "2", "--best-of", "3", "--no-prefix", "--eval-episodes", "2"]
    result = export(run_dir, out, capsys, *options)
    assert (result["weights"], result["euler_steps"], result["best_of"], result["prefix"]) == ("bf16", 2, 3, False)
    assert result["episodes"] == 2 and result["plain"]["episodes"] == 2  # type: ignore[index]
    assert result["plain"]["euler_steps"] == plain["euler_steps"] == 4  # type: ignore[index]
    policy = OnnxPolicy(out)
    assert (policy.version, policy.spec.euler_steps, policy.takes_prefix) == (result["version"], 2, False)
    assert policy.spec.notes["weights"] == "bf16" and policy.spec.notes["best_of"] == 3
    assert np.isfinite(policy.run(policy.blank_inputs(2))).all()


def test_a_run_that_observes_its_last_actions_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig(action_history=2, flow=FlowConfig(width=16, depth=2, gate_width=8))
    config = replace(config, learner=replace(config.learner, critic_width=16))
    run = RunFolder.create(tmp_path / "run", config)
    with make_vector_env("lift", 1, background=False, history=2) as envs:
        trainer = Trainer(replace(config, offline_steps=0, online_steps=0, eval_episodes=0), run, envs, envs,
                          TrainingProgress(Console(quiet=True)))  # fmt: skip
        trainer.run()
    out = tmp_path / "a.onnx"
    export(run.path, out, capsys)
    assert [a.shape for a in OnnxPolicy(out).spec.robot.observations if a.key == "action_history"] == [(2, 7)]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--weights", "int4"], "invalid choice"),
        (["--euler-steps", "0"], "--euler-steps is 0; it must be from 1 to 100"),
        (["--best-of", "-1"], "--best-of is -1; it must be from 1 to 100"),
        (["--eval-episodes", "-1"], "--eval-episodes is -1; it must be at least 0"),
    ],
)
def test_bad_options_give_one_line(
    options: list[str], complaint: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["export", str(run_dir), *options]) == 2
    said = capsys.readouterr().err
    assert complaint in said and said.count("\n") == 1
