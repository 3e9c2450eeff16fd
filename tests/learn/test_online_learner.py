"""Following a log that grows, on a real simulator with tiny budgets."""

import csv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sacflow_robot.data.log.episode_writer import EpisodeWriter
from sacflow_robot.envs.collector import Chunker
from sacflow_robot.envs.demonstrations import collect
from sacflow_robot.envs.vector import SubprocVectorEnv
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, PolicyFileError, SacflowError, UsageError
from sacflow_robot.export.metadata import file_version
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.learn import online_learner, publish_gate
from sacflow_robot.learn.config import FlowConfig, TrainConfig
from sacflow_robot.learn.metrics import Evaluation
from sacflow_robot.learn.online_learner import OnlineConfig, OnlineLearner
from sacflow_robot.learn.progress import TrainingProgress
from sacflow_robot.learn.publish_gate import check_policy
from sacflow_robot.learn.run_folder import RunFolder
from sacflow_robot.learn.trainer import Trainer
from sacflow_robot.learn.training_guards import Interrupted
from sacflow_robot.spec import RobotSpec

TINY = TrainConfig(offline_steps=4, online_steps=0, eval_episodes=0, flow=FlowConfig(width=32, depth=2, gate_width=16))
TINY = replace(TINY, learner=replace(TINY.learner, batch_size=32, critic_width=32, critic_depth=2, warmup_steps=0))


@pytest.fixture(scope="module")
def demos() -> list[Episode]:
    return collect("lift", "proficient", range(1_000_000, 1_000_003), 2, lambda _: None)


@pytest.fixture(scope="module")
def pools() -> Iterator[tuple[SubprocVectorEnv, SubprocVectorEnv]]:
    with SubprocVectorEnv("lift", 1) as envs, SubprocVectorEnv("lift", 1) as eval_envs:
        yield envs, eval_envs


@pytest.fixture
def ready_export(policy_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish a file that is there already, where it does not matter what is published: exporting one takes seconds."""
    content = policy_file.read_bytes()
    monkeypatch.setattr(publish_gate, "export_agent", lambda agent, notes, path: path.write_bytes(content))


Make = Callable[..., OnlineLearner]


@pytest.fixture
def make(
    tmp_path: Path,
    demos: list[Episode],
    pools: tuple[SubprocVectorEnv, SubprocVectorEnv],
    monkeypatch: pytest.MonkeyPatch,
) -> Make:
    """Followers of ``log.zarr`` that go on from one short run."""
    monkeypatch.setattr(online_learner, "_POLL_S", 0.01)
    quiet = TrainingProgress(Console(quiet=True))
    first = Trainer(TINY, RunFolder.create(tmp_path / "run", TINY), *pools, quiet)
    first.load(demos)
    first.run()

    def made(gate_episodes: int = 0, stop_after: int | None = None, inject_bad_candidate: int = 0) -> OnlineLearner:
        folder, config = RunFolder.open(tmp_path / "run")
        trainer = Trainer(replace(config, eval_episodes=gate_episodes), folder, *pools, quiet)
        trainer.resume(same_robots=False)
        log, served = tmp_path / "log.zarr", tmp_path / "served.onnx"
        online = OnlineConfig(log, served, 30, gate_episodes, stop_after, inject_bad_candidate=inject_bad_candidate)
        return OnlineLearner(trainer, online)

    return made


def log_of(path: Path, robot: RobotSpec, episodes: list[Episode]) -> None:
    with EpisodeWriter(path / "log.zarr", robot) as log:
        log.extend(episodes)


def for_each_episode(monkeypatch: pytest.MonkeyPatch, call: Callable[[], None]) -> None:
    """Call something when an episode of the log is taken, where its seed is checked."""
    monkeypatch.setattr(online_learner, "check_seeds", lambda episodes, config, log: call())


def test_it_learns_from_a_growing_log_and_publishes(
    make: Make, tmp_path: Path, robot: RobotSpec, demos: list[Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_of(tmp_path, robot, demos[:1])
    learner = make(stop_after=len(demos[0]) + len(demos[1]))
    trainer, grown = learner.trainer, False

    def grow() -> None:
        nonlocal grown
        if not grown:  # while it is being followed
            log_of(tmp_path, robot, demos[1:2])
            grown = True

    for_each_episode(monkeypatch, grow)
    before = trainer.agent.updates
    learner.run()
    assert trainer.env_steps == len(demos[0]) + len(demos[1])
    assert trainer.agent.updates - before == int(trainer.env_steps * TINY.learner.utd_ratio)
    assert learner.gate.published >= 2 and learner.gate.refused == 0, "first what there was, then what was learned"
    policy = OnnxPolicy(tmp_path / "served.onnx")
    assert policy.spec.notes["online_steps"] == trainer.env_steps
    assert not list(tmp_path.glob(".*candidate*")), "no candidate is left"

    log_of(tmp_path, robot, demos[2:])
    again = make(stop_after=trainer.env_steps + 1)
    again.run()
    assert again.trainer.env_steps == sum(map(len, demos)), "no episode is taken twice"


@pytest.mark.usefixtures("ready_export")
def test_a_run_from_scratch_learns_from_the_log_as_well(
    make: Make, tmp_path: Path, robot: RobotSpec, demos: list[Episode]
) -> None:
    log_of(tmp_path, robot, demos[:1])
    learner = make(stop_after=len(demos[0]))
    trainer = learner.trainer
    trainer.config = replace(trainer.config, from_scratch=True, demos="none", offline_steps=0)
    before = len(trainer.buffer)
    learner.run()
    assert len(trainer.buffer) == before + len(demos[0])


def test_a_candidate_whose_weights_are_broken_is_refused(
    make: Make, tmp_path: Path, robot: RobotSpec, demos: list[Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make(stop_after=len(demos[0]))
    learner.gate.publish()
    served = file_version(tmp_path / "served.onnx")
    log_of(tmp_path, robot, demos[:1])

    def corrupt() -> None:
        with torch.no_grad():
            next(learner.trainer.agent.average_policy.parameters()).view(-1)[0] = float("nan")

    for_each_episode(monkeypatch, corrupt)
    learner.run()
    assert learner.gate.published == 1 and learner.gate.refused >= 1
    assert file_version(tmp_path / "served.onnx") == served
    assert make().trainer.agent.is_finite, "the checkpoint is not of the broken one"


@pytest.mark.usefixtures("ready_export")
def test_a_candidate_that_does_worse_is_refused(
    make: Make, tmp_path: Path, policy_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, rates = make(gate_episodes=20), iter([12, 11, 2, 3, 20, 19, 14, 14, 14])
    trainer, gate = learner.trainer, learner.gate
    (tmp_path / "served.onnx").write_bytes(policy_file.read_bytes())

    def evaluate(phase: str, act: object) -> None:
        trainer.done.evaluations.append(Evaluation("online", 0, next(rates), 20, 50.0, 0.5))

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    assert gate.begin() == " from success 12/20"
    for published, refused in ((1, 0), (1, 1), (1, 2), (2, 2), (3, 2), (3, 3), (3, 4)):
        gate.publish()
        assert (gate.published, gate.refused) == (published, refused)
    with pytest.raises(SacflowError, match="3 candidates in a row were refused"):
        gate.publish()
    with (tmp_path / "run" / "candidates.csv").open(newline="") as file:
        told = [(row["outcome"], row["successes"], row["reason"]) for row in csv.DictReader(file)]
    assert told[4] == ("published", "19", ""), "one failure after none is no evidence"
    assert told[5] == ("refused", "14", "success 14/20, worse than success 20/20"), "of the best, not of the last"


def test_what_is_served_is_what_candidates_are_held_against(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make().gate.publish()
    learner, judged = make(gate_episodes=1, stop_after=0), []
    evaluate = learner.trainer.evaluate

    def judge(phase: str, act: Chunker) -> None:
        judged.append(act.__self__.version)  # type: ignore[attr-defined]
        evaluate(phase, act)

    served = file_version(tmp_path / "served.onnx")
    monkeypatch.setattr(learner.trainer, "evaluate", judge)
    learner.run()
    assert judged == [served, file_version(tmp_path / "served.onnx")], "what was served, then the candidate"
    assert [(e.phase, e.episodes) for e in learner.trainer.done.evaluations] == [("online", 1)] * 2


def test_the_fault_switch_corrupts_one_candidate_and_leaves_the_learner_as_it_was(make: Make, tmp_path: Path) -> None:
    gate, versions = make(inject_bad_candidate=2).gate, []
    for _ in range(3):
        gate.publish()
        versions.append(file_version(tmp_path / "served.onnx"))
    assert versions[0] == versions[2] != versions[1]


def test_a_candidate_that_the_server_would_refuse_is_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = make().gate

    def refuse(path: Path) -> None:
        assert path.exists() and path.parent == tmp_path, "on the same disk, so that it replaces in one step"
        raise PolicyFileError("no")

    monkeypatch.setattr(publish_gate, "check_policy", refuse)
    gate.publish()
    assert gate.refused == 1 and not list(tmp_path.glob("*.onnx")) and not list(tmp_path.glob(".*.onnx"))


@pytest.mark.usefixtures("ready_export")
def test_ctrl_c_saves_what_was_taken(
    make: Make, tmp_path: Path, robot: RobotSpec, demos: list[Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_of(tmp_path, robot, demos[:2])
    learner = make()
    for_each_episode(monkeypatch, learner.trainer.ask_to_stop)
    with pytest.raises(Interrupted):
        learner.run()
    log_of(tmp_path, robot, demos[2:])
    for_each_episode(monkeypatch, lambda: None)
    again = make(stop_after=sum(map(len, demos)))
    assert again.trainer.env_steps == len(demos[0]) + len(demos[1])
    again.run()
    assert again.trainer.env_steps == sum(map(len, demos))


@pytest.mark.usefixtures("ready_export")
def test_a_robot_that_is_far_ahead_is_followed_with_what_is_newest(
    make: Make, tmp_path: Path, robot: RobotSpec, demos: list[Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_of(tmp_path, robot, demos)
    monkeypatch.setattr(online_learner, "_MOST_OWED", 1)
    learner = make(stop_after=sum(map(len, demos)))
    before = learner.trainer.agent.updates
    learner.run()
    assert learner.trainer.env_steps == sum(map(len, demos)), "everything is in the buffer"
    assert learner.trainer.agent.updates - before == int(30 * TINY.learner.utd_ratio), "and the rest forgotten"


def test_a_run_that_was_stopped_while_cloning_is_not_followed(make: Make) -> None:
    learner = make()
    learner.trainer.done.offline_steps = 3
    with pytest.raises(
        UsageError, match=r"stopped while cloning, after 3 of 4 updates; finish it first with train --resume"
    ):
        learner.run()


@pytest.mark.usefixtures("ready_export")
def test_another_log_or_a_broken_note_is_said(
    make: Make, tmp_path: Path, robot: RobotSpec, demos: list[Episode]
) -> None:
    log_of(tmp_path, robot, demos[:1])
    note = tmp_path / "run" / "followed.json"
    note.write_text(f'{{"log": "{(tmp_path / "log.zarr").resolve()}", "episodes": 7, "learned": 0}}')
    with pytest.raises(DataError, match="has 1 episodes, of which 7 were taken"):
        make().run()
    note.write_text("{")
    with pytest.raises(DataError, match=r"followed.json cannot be read"):
        make().run()


def test_what_puts_out_of_bounds_actions_is_not_accepted(policy_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_policy(policy_file)
    honest = OnnxPolicy.run
    monkeypatch.setattr(
        OnnxPolicy, "run", lambda self, inputs: honest(self, inputs) * (5 if len(inputs["noise"]) == 32 else 1)
    )
    with pytest.raises(PolicyFileError, match="out of bounds"):
        check_policy(policy_file)
