import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sacflow_robot.errors import SacflowError
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.run_folder import RunFolder
from sacflow_robot.learn.training_guards import FiniteWatch, ctrl_c_asks, diverged, memory_is_explained


def test_running_out_of_memory_says_what_to_lower(tmp_path: Path) -> None:
    config, folder = TrainConfig(algo="qc"), RunFolder(tmp_path, "lift")
    config = replace(config, learner=replace(config.learner, best_of=16))
    (tmp_path / "checkpoint.pt").write_text("")
    message = (
        rf"^out of memory; lower --learner.batch-size \(now 256\), --learner.best-of \(now 16\), --replay-memory-gb "
        rf"\(now 4\) and go on with --resume {tmp_path}, or in a new run --learner.critic-width \(now 256\), "
        rf"--flow.width \(now 256\), --replay-capacity \(now 300000\)$"
    )
    with pytest.raises(SacflowError, match=message), memory_is_explained(config, folder):
        torch.empty(2**60)
    said = "CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    for error in (torch.OutOfMemoryError(), *map(torch.AcceleratorError, said)):
        with pytest.raises(SacflowError, match=r"^out of the GPU's memory"), memory_is_explained(config, folder):
            raise error
    with pytest.raises(RuntimeError, match="something else"), memory_is_explained(config, folder):
        raise RuntimeError("something else")


def test_divergence_names_term_step_and_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "lift")
    plain = str(diverged("loss/critic", 7, folder))
    assert plain == (
        "training diverged: loss/critic is not finite at update 7; lower --learner.policy-lr or --learner.critic-lr, or set "
        "--learner.max-grad-norm"
    )
    folder.checkpoint.write_text("")
    assert str(diverged("loss/critic", 7, folder)).endswith(f"is kept, and --resume {tmp_path} takes these")


def test_the_first_number_that_is_not_finite_is_found_with_its_update(tmp_path: Path) -> None:
    fine, nan, inf = (torch.tensor(x) for x in (1.0, math.nan, math.inf))
    watch = FiniteWatch(torch.device("cpu"), RunFolder(tmp_path, "lift"))
    watch.add(6, {"loss/critic": fine, "loss/actor": fine})
    watch.add(7, {})
    with pytest.raises(SacflowError, match=r"loss/actor is not finite at update 8"):
        watch.add(8, {"loss/critic": fine, "loss/actor": inf, "value/policy": nan})
    late = FiniteWatch(
        torch.device("cuda"), RunFolder(tmp_path, "lift")
    )  # reads back together, wherever the numbers are
    for update in range(1, 100):
        late.add(update, {"loss/critic": nan if update >= 7 else fine})
    with pytest.raises(SacflowError, match=r"loss/critic is not finite at update 7"):
        late.add(100, {"loss/critic": nan})
    late.add(101, {"loss/critic": inf})
    with pytest.raises(SacflowError, match=r"loss/critic is not finite at update 101"):
        late.read()
    late.read()


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
