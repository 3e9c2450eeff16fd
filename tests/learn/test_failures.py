from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sacflow_robot.errors import SacflowError
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.failures import ctrl_c_asks, diverged, memory_is_explained
from sacflow_robot.learn.run_folder import RunFolder


def test_running_out_of_memory_says_what_to_lower(tmp_path: Path) -> None:
    config, folder = TrainConfig(algo="qc"), RunFolder(tmp_path, "lift")
    config = replace(config, learner=replace(config.learner, best_of=16))
    (tmp_path / "checkpoint.pt").write_text("")
    message = (
        r"^out of memory; lower --learner.batch-size \(now 256\), --learner.best-of \(now 16\), "
        r"--learner.critic-width \(now 256\), --replay-memory-gb \(now 4\), or go on from the last checkpoint with --resume"
    )
    with pytest.raises(SacflowError, match=message), memory_is_explained(config, folder):
        torch.empty(2**60)
    with pytest.raises(SacflowError, match=r"^out of the GPU's memory"), memory_is_explained(config, folder):
        raise torch.OutOfMemoryError
    with pytest.raises(RuntimeError, match="something else"), memory_is_explained(config, folder):
        raise RuntimeError("something else")


def test_divergence_names_term_step_and_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "lift")
    plain = str(diverged("loss/critic", 7, folder))
    assert plain == "training diverged: loss/critic is not finite at update 7; lower the step sizes"
    folder.checkpoint.write_text("")
    assert str(diverged("loss/critic", 7, folder)).endswith(f"with --resume {tmp_path}")


def test_the_first_ctrl_c_asks_and_the_second_acts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests without
    asked = []
    with ctrl_c_asks(lambda: asked.append(1)):
        os.kill(os.getpid(), signal.SIGINT)
        assert asked == [1]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_that_is_terminated_is_asked_too() -> None:
    asked, before = [], signal.getsignal(signal.SIGTERM)
    with ctrl_c_asks(lambda: asked.append(1)):
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked == [1] and signal.getsignal(signal.SIGTERM) is before
