"""Following a log that grows, on a real simulator with tiny budgets."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sacflow_robot.cli.follow import check_policy
from sacflow_robot.data.log.episode_writer import EpisodeWriter
from sacflow_robot.envs.vector_env import SubprocVectorEnv, collect
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, PolicyFileError, SacflowError, UsageError
from sacflow_robot.export.metadata import file_version
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.learn import online_learner as follow
from sacflow_robot.learn.config import FlowConfig, TrainConfig
from sacflow_robot.learn.online_learner import FollowConfig, FollowingTrainer
from sacflow_robot.learn.progress import TrainingProgress
from sacflow_robot.learn.run_folder import Evaluation, RunFolder
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
    with SubprocVectorEnv("lift", 1) as envs, SubprocVectorEnv("lift", 1) as eval_robots:
        yield envs, eval_robots


Make = Callable[..., FollowingTrainer]


@pytest.fixture
def make(
    tmp_path: Path,
    demos: list[Episode],
    pools: tuple[SubprocVectorEnv, SubprocVectorEnv],
    monkeypatch: pytest.MonkeyPatch,
) -> Make:
    """Followers of ``log.zarr`` that go on from one short run."""
    monkeypatch.setattr(follow, "_POLL_S", 0.01)
    quiet = TrainingProgress(Console(quiet=True))
    first = Trainer(TINY, RunFolder.create(tmp_path / "run", TINY), *pools, quiet)
    first.load(demos)
    first.run()

    def made(gate_episodes: int = 0, stop_after: int | None = None) -> FollowingTrainer:
        folder, config = RunFolder.open(tmp_path / "run")
        trainer = FollowingTrainer(replace(config, eval_episodes=gate_episodes), folder, *pools, quiet)
        trainer.follow = FollowConfig(tmp_path / "log.zarr", tmp_path / "served.onnx", 30, gate_episodes, stop_after)
        trainer.accept, trainer.check = check_policy, lambda episode: None
        trainer.load_policy = lambda path: OnnxPolicy(path).infer
        trainer.resume(same_robots=False)
        return trainer

    return made


def log_of(path: Path, robot: RobotSpec, episodes: list[Episode]) -> None:
    with EpisodeWriter(path / "log.zarr", robot) as log:
        log.extend(episodes)


def test_it_learns_from_a_growing_log_and_publishes(
    make: Make, tmp_path: Path, robot: RobotSpec, demos: list[Episode]
) -> None:
    log_of(tmp_path, robot, demos[:1])
    trainer = make(stop_after=len(demos[0]) + len(demos[1]))
    grown = False

    def grow(episode: Episode) -> None:
        nonlocal grown
        if not grown:  # while it is being followed
            log_of(tmp_path, robot, demos[1:2])
            grown = True

    trainer.check = grow
    before = trainer.agent.updates
    trainer.run()
    assert trainer.env_steps == len(demos[0]) + len(demos[1])
    assert trainer.agent.updates - before == int(trainer.env_steps * TINY.learner.utd_ratio)
    assert trainer.published >= 2 and trainer.refused == 0, "first what there was, then what was learned"
    policy = OnnxPolicy(tmp_path / "served.onnx")
    assert policy.spec.notes["online_steps"] == trainer.env_steps
    assert not list(tmp_path.glob(".*candidate*")), "no candidate is left"

    again = make(stop_after=trainer.env_steps)
    log_of(tmp_path, robot, demos[2:])
    again.follow = replace(again.follow, stop_after=trainer.env_steps + 1)
    again.run()
    assert again.env_steps == sum(map(len, demos)), "no episode is taken twice"


def test_a_run_from_scratch_learns_from_the_log_as_well(
    make: Make, tmp_path: Path, robot: RobotSpec, demos: list[Episode]
) -> None:
    log_of(tmp_path, robot, demos[:1])
    trainer = make(stop_after=len(demos[0]))
    trainer.config = replace(trainer.config, from_scratch=True, demos="none", offline_steps=0)
    before = len(trainer.buffer)
    trainer.run()
    assert len(trainer.buffer) == before + len(demos[0])


def test_a_candidate_whose_weights_are_broken_is_refused(
    make: Make, tmp_path: Path, robot: RobotSpec, demos: list[Episode]
) -> None:
    trainer = make(stop_after=len(demos[0]))
    trainer._publish()
    served = file_version(tmp_path / "served.onnx")
    log_of(tmp_path, robot, demos[:1])

    def corrupt(episode: Episode) -> None:
        with torch.no_grad():
            next(trainer.agent.average_policy.parameters()).view(-1)[0] = float("nan")

    trainer.check = corrupt
    trainer.run()
    assert trainer.published == 1 and trainer.refused >= 1
    assert file_version(tmp_path / "served.onnx") == served
    assert make().agent.is_finite, "the checkpoint is not of the broken one"


def test_a_candidate_that_does_worse_is_refused(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, rates = make(gate_episodes=20), iter([12, 11, 2, 3, 20, 19, 14, 14, 14])
    trainer.load_policy = lambda path: trainer.act

    def evaluate(phase: str) -> None:
        trainer.evaluations.append(Evaluation("online", 0, next(rates), 20, 50.0, 0.5))

    monkeypatch.setattr(trainer, "_evaluate", evaluate)
    monkeypatch.setattr(follow, "export_agent", lambda agent, notes, path: path.write_bytes(b"a policy"))
    trainer.accept = lambda path: None
    trainer._best = trainer._gate_result(tmp_path / "served.onnx")
    for published, refused in ((1, 0), (1, 1), (1, 2), (2, 2), (3, 2), (3, 3), (3, 4)):
        trainer._publish()
        assert (trainer.published, trainer.refused) == (published, refused)
    with pytest.raises(SacflowError, match="3 candidates in a row were refused"):
        trainer._publish()
    with (tmp_path / "run" / "candidates.csv").open(newline="") as file:
        told = [(row["outcome"], row["successes"], row["reason"]) for row in csv.DictReader(file)]
    assert told[4] == ("published", "19", ""), "one failure after none is no evidence"
    assert told[5] == ("refused", "14", "success 14/20, worse than success 20/20"), "of the best, not of the last"


def test_what_is_served_is_what_candidates_are_held_against(make: Make, tmp_path: Path) -> None:
    make()._publish()
    trainer, judged = make(gate_episodes=1, stop_after=0), []
    trainer.load_policy = lambda path: judged.append(path.name) or OnnxPolicy(path).infer  # type: ignore[func-returns-value]
    trainer.run()
    assert judged == ["served.onnx", ".served.candidate.onnx"]
    assert [(e.phase, e.episodes) for e in trainer.evaluations] == [("online", 1)] * 2


def test_the_fault_switch_spoils_one_candidate_and_leaves_the_learner_as_it_was(make: Make, tmp_path: Path) -> None:
    trainer, versions = make(), []
    trainer.follow = replace(trainer.follow, inject_bad_candidate=2)
    for _ in range(3):
        trainer._publish()
        versions.append(file_version(tmp_path / "served.onnx"))
    assert versions[0] == versions[2] != versions[1]


def test_a_candidate_that_the_server_would_refuse_is_refused(make: Make, tmp_path: Path) -> None:
    trainer = make()

    def refuse(path: Path) -> None:
        assert path.exists() and path.parent == tmp_path, "on the same disk, so that it replaces in one step"
        raise PolicyFileError("no")

    trainer.accept = refuse
    trainer._publish()
    assert trainer.refused == 1 and not list(tmp_path.glob("*.onnx")) and not list(tmp_path.glob(".*.onnx"))


def test_ctrl_c_saves_what_was_taken(make: Make, tmp_path: Path, robot: RobotSpec, demos: list[Episode]) -> None:
    log_of(tmp_path, robot, demos[:2])
    trainer = make()

    def stop(episode: Episode) -> None:
        trainer._stop = True

    trainer.check = stop
    with pytest.raises(Interrupted):
        trainer.run()
    log_of(tmp_path, robot, demos[2:])
    again = make(stop_after=sum(map(len, demos)))
    assert again.env_steps == len(demos[0]) + len(demos[1])
    again.run()
    assert again.env_steps == sum(map(len, demos))


def test_an_arm_that_is_far_ahead_is_followed_with_what_is_newest(
    make: Make, tmp_path: Path, robot: RobotSpec, demos: list[Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_of(tmp_path, robot, demos)
    monkeypatch.setattr(follow, "_MOST_OWED", 1)
    trainer = make(stop_after=sum(map(len, demos)))
    before = trainer.agent.updates
    trainer.run()
    assert trainer.env_steps == sum(map(len, demos)), "everything is in the buffer"
    assert trainer.agent.updates - before == int(30 * TINY.learner.utd_ratio), "and the rest forgotten"


def test_a_run_that_was_stopped_while_cloning_is_not_followed(make: Make) -> None:
    trainer = make()
    trainer.offline_steps = 3
    with pytest.raises(
        UsageError, match=r"stopped while cloning, after 3 of 4 updates; finish it first with train --resume"
    ):
        trainer.run()


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
