"""The training loop on a real simulator, with tiny budgets."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from sacflow_robot.data.log.episode_writer import EpisodeWriter
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.data.replay_buffer import ChunkBatch
from sacflow_robot.envs.demonstrations import collect
from sacflow_robot.envs.vector import SubprocVectorEnv
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, SacflowError, UsageError
from sacflow_robot.learn import trainer as train
from sacflow_robot.learn.algorithms.agent import Metrics
from sacflow_robot.learn.config import FlowConfig, TrainConfig, extended
from sacflow_robot.learn.exploration import uniform_actions
from sacflow_robot.learn.metrics import read_metrics
from sacflow_robot.learn.presets import preset
from sacflow_robot.learn.progress import TrainingProgress
from sacflow_robot.learn.run_folder import CHECKPOINT_LAYOUT, RunFolder
from sacflow_robot.learn.trainer import Trainer
from sacflow_robot.learn.training_guards import Interrupted

TINY = TrainConfig(
    offline_steps=6,
    online_steps=160,
    eval_every=80,
    eval_episodes=1,
    flow=FlowConfig(width=32, depth=2, gate_width=16),
)
TINY = replace(TINY, learner=replace(TINY.learner, batch_size=32, critic_width=32, critic_depth=2, warmup_steps=40))


@pytest.fixture(scope="module")
def demos() -> list[Episode]:
    return collect("lift", "proficient", range(1_000_000, 1_000_003), 2, lambda _: None)


@pytest.fixture(scope="module")
def pools() -> Iterator[tuple[SubprocVectorEnv, SubprocVectorEnv]]:
    with SubprocVectorEnv("lift", 2) as envs, SubprocVectorEnv("lift", 1) as eval_robots:
        yield envs, eval_robots


def make_trainer(path: Path, pools: tuple[SubprocVectorEnv, SubprocVectorEnv], config: TrainConfig = TINY) -> Trainer:
    folder = RunFolder(path, "lift") if (path / "config.yaml").exists() else RunFolder.create(path, config)
    progress = TrainingProgress(Console(quiet=True))
    return Trainer(config, folder, *pools, progress)


class _StopsAt:
    """Presses Ctrl-C, as it were, once the trainer has come that far."""

    def __init__(self, trainer: Trainer, offline: int, online: int) -> None:
        check = trainer.check_stop

        def watch() -> None:
            if trainer.done.offline_steps >= offline and trainer.env_steps >= online:
                trainer.ask_to_stop()
            check()

        trainer.check_stop = watch  # type: ignore[method-assign]


def assert_equal(a: object, b: object, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert isinstance(b, list) and len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(
    tmp_path: Path,
    demos: list[Episode],
    pools: tuple[SubprocVectorEnv, SubprocVectorEnv],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "METRICS_EVERY", 4)
    whole = make_trainer(tmp_path / "whole", pools)
    whole.load(demos)
    whole.run()

    # Interrupted while cloning, in the middle of episodes, and in an evaluation that was due; its buffer is in files.
    mapped = replace(TINY, replay_memory_gb=0)
    parts = make_trainer(tmp_path / "parts", pools, mapped)
    parts.load(demos)
    for offline, online in ((3, 0), (6, 40), (6, 80), (6, 120)):
        _StopsAt(parts, offline, online)
        with pytest.raises(Interrupted):
            parts.run()
        parts = make_trainer(tmp_path / "parts", pools, mapped)
        parts.resume()
    parts.run()

    assert parts.env_steps == whole.env_steps >= 160
    assert [replace(e) for e in parts.done.evaluations] == whole.done.evaluations
    assert len(whole.done.evaluations) == 3
    assert_equal(parts.agent.state_dict(), whole.agent.state_dict(), "agent")
    for key, column in whole.buffer.state_dict().items():
        assert (column == parts.buffer.state_dict()[key]).all(), key
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("whole", "parts")]
    for row in rows[0] + rows[1]:
        del row["wall_s"]
    assert rows[0] == rows[1]
    assert sum(bool(row["loss/actor"]) for row in rows[0]) >= 5, "rows after the warm-up are compared too"
    assert (tmp_path / "parts" / "curve.png").stat().st_size > 5_000


def test_a_run_extended_ends_bit_for_bit_where_a_longer_one_does(
    tmp_path: Path, demos: list[Episode], pools: tuple[SubprocVectorEnv, SubprocVectorEnv]
) -> None:
    whole = make_trainer(tmp_path / "whole", pools)
    whole.load(demos)
    whole.run()
    short = make_trainer(tmp_path / "short", pools, replace(TINY, online_steps=80))
    short.load(demos)
    short.run()
    with pytest.raises(UsageError, match=r"--online-steps 79 with --resume run, a run of 80: it is the new total"):
        extended(short.config, 79, "run")
    longer = make_trainer(tmp_path / "short", pools, extended(short.config, 160, "run"))
    longer.resume()
    longer.run()
    assert longer.env_steps == whole.env_steps >= 160 and longer.done.evaluations == whole.done.evaluations
    assert_equal(longer.agent.state_dict(), whole.agent.state_dict(), "agent")
    for key, column in whole.buffer.state_dict().items():
        assert (column == longer.buffer.state_dict()[key]).all(), key


def test_a_run_of_cloning_alone_extended_learns_online_as_if_it_had_been_meant_to(
    tmp_path: Path, demos: list[Episode], pools: tuple[SubprocVectorEnv, SubprocVectorEnv]
) -> None:
    """Without evaluations, so that nothing but the checkpoint says that cloning is over."""
    config = replace(TINY, online_steps=60, eval_episodes=0, algo="sac-flow")
    config = replace(config, learner=replace(config.learner, bc_loss="same-noise", warmup_steps=0))
    whole = make_trainer(tmp_path / "whole", pools, config)
    whole.load(demos)
    whole.run()
    clone = make_trainer(tmp_path / "clone", pools, replace(config, online_steps=0))
    clone.load(demos)
    clone.run()
    longer = make_trainer(tmp_path / "clone", pools, config)
    longer.resume()
    longer.run()
    assert longer.env_steps == whole.env_steps >= 60
    assert_equal(longer.agent.state_dict(), whole.agent.state_dict(), "agent")


def test_training_episodes_are_logged_and_resuming_cuts_what_was_lost(
    tmp_path: Path, demos: list[Episode], pools: tuple[SubprocVectorEnv, SubprocVectorEnv]
) -> None:
    config = replace(TINY, online_steps=620, eval_every=1000, eval_episodes=0, demo_ratio=0.25)
    trainer = make_trainer(tmp_path / "run", pools, config)
    trainer.load(demos)
    trainer.run()
    given = {row.tobytes() for e in demos for row in trainer.agent.robot.flatten(e.observations)}
    drawn = [row.tobytes() in given for row in trainer._sample().observation]
    assert drawn == [True] * 8 + [False] * 24, "a quarter of the batch of 32 is from the demonstrations"
    log = EpisodeLog.open(tmp_path / "run" / "episodes.zarr")
    episodes = list(log.episodes())
    assert len(episodes) == 2 and all(e.states is not None for e in episodes)
    assert min(e.info["seed"] for e in episodes) >= 1_000_000, "never an evaluation seed"
    with EpisodeWriter(log.path, log.robot) as writer:  # as if killed between log and checkpoint
        writer.append(episodes[0])
    make_trainer(tmp_path / "run", pools, config).resume()
    assert len(EpisodeLog.open(log.path)) == 2


def test_a_checkpoint_that_does_not_fit_is_refused(
    tmp_path: Path, demos: list[Episode], pools: tuple[SubprocVectorEnv, SubprocVectorEnv]
) -> None:
    config = replace(TINY, offline_steps=2, online_steps=0, eval_episodes=0)
    trainer = make_trainer(tmp_path / "run", pools, config)
    trainer.load(demos)
    trainer.run()
    other = replace(config, flow=replace(config.flow, width=16))
    with pytest.raises(DataError, match=r"checkpoint.pt does not fit the run's config.yaml: [^\n]+$"):
        make_trainer(tmp_path / "run", pools, other).resume()
    small = make_trainer(tmp_path / "small", pools, replace(config, replay_capacity=50))
    with pytest.raises(UsageError, match=r"give a --replay-capacity of at least [1-9]"):
        small.load(demos)


def test_a_checkpoint_of_something_else_is_refused_with_both_named(
    tmp_path: Path, demos: list[Episode], pools: tuple[SubprocVectorEnv, SubprocVectorEnv]
) -> None:
    config = replace(TINY, offline_steps=2, online_steps=0, eval_episodes=0)
    trainer = make_trainer(tmp_path / "run", pools, config)
    trainer.load(demos)
    trainer.run()
    for change, names in (
        ({"env": "can"}, "of task 'lift', its config.yaml says 'can'"),
        ({"algo": "bc"}, "of algorithm 'sac-flow', its config.yaml says 'bc'"),
        ({"velocity": "mlp"}, "of policy 'flow-g', its config.yaml says 'mlp'"),
    ):
        with pytest.raises(DataError, match=f"checkpoint.pt is {names}; put back the file that belongs there"):
            trainer.folder.load_checkpoint(replace(config, **change))
    state = torch.load(trainer.folder.checkpoint)
    for made_by, theirs in (
        ({"layout": 9, "version": "9.9"}, "9.9 in layout 9"),
        (None, "an earlier version in layout 1"),
    ):
        state["made_by"] = made_by
        if made_by is None:
            del state["made_by"]
        torch.save(state, trainer.folder.checkpoint)
        with pytest.raises(
            DataError,
            match=rf"written by sacflow-robot {theirs}; this is [\d.]+, which reads layout {CHECKPOINT_LAYOUT}",
        ):
            make_trainer(tmp_path / "run", pools, config).resume()
    torch.save([1, 2], trainer.folder.checkpoint)
    with pytest.raises(DataError, match=r"is not a checkpoint of a run; put back the file that belongs there"):
        make_trainer(tmp_path / "run", pools, config).resume()


def test_from_scratch_acts_at_random_first_learns_then_and_resumes(tmp_path: Path) -> None:
    config = preset("InvertedPendulum-v5", "flow-l", from_scratch=True)
    config = replace(
        config, online_steps=200, eval_every=100, eval_episodes=1, flow=replace(config.flow, width=16, gate_width=16)
    )
    learner = replace(config.learner, warmup_steps=50, batch_size=32, critic_width=32)
    config = replace(config, learner=replace(learner, bc_schedule="adaptive"))
    with SubprocVectorEnv(config.env, 1) as envs, SubprocVectorEnv(config.env, 1) as eval_robots:
        trainers = []
        for name in ("whole", "parts"):
            trainer = make_trainer(tmp_path / name, (envs, eval_robots), config)
            trainer.load([])
            if name == "parts":
                for steps in (30, 130):
                    _StopsAt(trainer, 0, steps)
                    with pytest.raises(Interrupted):
                        trainer.run()
                    assert (trainer.agent.updates > 0) == (steps > 50)
                    trainer = make_trainer(tmp_path / name, (envs, eval_robots), config)
                    trainer.resume()
            trainer.run()
            trainers.append(trainer)
    whole, parts = trainers
    assert_equal(parts.agent.state_dict(), whole.agent.state_dict(), "agent")
    assert whole.agent.updates == pytest.approx(150, abs=30), "one a step after the warm-up"
    assert whole.done.evaluations[-1].mean_return == whole.done.evaluations[-1].mean_steps - 1 > 0, (
        "1 a step but the last"
    )
    drawn = whole.buffer.sample(100, np.random.default_rng(0)).actions
    assert np.abs(drawn).max() <= 1
    with pytest.raises(DataError, match="empty"):
        make_trainer(tmp_path / "other", (envs, eval_robots), TINY).load([])


def test_random_actions_are_spread_evenly() -> None:
    actions = uniform_actions(np.random.default_rng(0).standard_normal((20_000, 1, 1)).astype(np.float32))
    counts = np.histogram(actions, bins=10, range=(-1, 1))[0]
    assert counts.sum() == 20_000 and (np.abs(counts - 2000) < 200).all()


def test_divergence_stops_the_run_at_the_update_it_happens_at(
    tmp_path: Path,
    demos: list[Episode],
    pools: tuple[SubprocVectorEnv, SubprocVectorEnv],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "_SAVE_EVERY", 5)
    trainer = make_trainer(tmp_path / "run", pools, replace(TINY, offline_steps=100))
    trainer.load(demos)
    agent, update = trainer.agent, trainer.agent.update_offline

    def spoilt(chunks: ChunkBatch) -> Metrics:
        if agent.updates == 6:  # before the seventh
            next(agent.policy.parameters()).data.fill_(math.nan)
        return update(chunks)

    monkeypatch.setattr(agent, "update_offline", spoilt)
    with pytest.raises(
        SacflowError, match=r"loss/flow_matching is not finite at update 7; .* --resume [^ ]+ takes these$"
    ):
        trainer.run()
    again = make_trainer(tmp_path / "run", pools, trainer.config)
    again.resume()
    assert again.done.offline_steps == 5 and again.agent.is_finite, "the last good checkpoint"


def test_run_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (RunFolder.create(None, TINY).path for _ in range(2))
    assert [str(first), str(second)] == ["runs/lift-flow-g-s0", "runs/lift-flow-g-s0-2"]
    with pytest.raises(UsageError, match="exists already; give another --out, or go on with it by --resume"):
        RunFolder.create(first, TINY)
    assert RunFolder.open(first)[1] == TINY
    with pytest.raises(DataError, match="not a run folder"):
        RunFolder.open(tmp_path)
    with pytest.raises(DataError, match=r"no checkpoint.pt"):
        RunFolder(first, "lift").load_checkpoint(TINY)
    (first / "checkpoint.pt").write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(DataError, match=r"checkpoint.pt cannot be read .* is it complete\?$"):
        RunFolder(first, "lift").load_checkpoint(TINY)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError):
        RunFolder.create(tmp_path / "file", TINY)
