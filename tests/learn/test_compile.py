from dataclasses import replace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from sacflow_robot.learn import compile as compute
from sacflow_robot.learn.compile import Compute
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.networks.critic import Critic
from sacflow_robot.learn.presets import preset

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def make(**changes: Any) -> Compute:
    return Compute(replace(TrainConfig(), **changes), CPU)


def test_what_is_chosen_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(config: TrainConfig, device: torch.device = CPU) -> tuple[bool, str]:
        compute = Compute(config, device)
        return compute.compiled, compute.precision

    lift, full, scratch = preset("lift"), preset("lift", full=True), preset("HalfCheetah-v5", from_scratch=True)
    short = replace(lift, online_steps=1000)
    for hardware in (False, True):
        monkeypatch.setattr(compute, "multiplies_bfloat16", lambda hardware=hardware: hardware)
        half = "bfloat16" if hardware else "float32"
        assert chosen(lift) == chosen(full) == (True, half)
        assert chosen(short) == (False, half), "it would take longer to compile than to run"
        assert chosen(scratch) == (True, "float32")
    for hardware in (False, True):
        # Emulation, which an older GPU offers, is no reason to take it.
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, hardware=hardware: including_emulation or hardware,
        )
        assert chosen(short, GPU) == (True, "bfloat16" if hardware else "float32")
    monkeypatch.setattr(compute, "multiplies_bfloat16", lambda: False)
    asked = Compute(replace(lift, precision="bfloat16"), CPU)
    assert asked.precision == "bfloat16" and "no instructions for bfloat16" in asked.note
    assert chosen(replace(full, compile="off", precision="float32"), GPU) == (False, "float32")


@pytest.mark.parametrize("compiled", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_half_precision_is_near_and_values_losses_and_weights_stay_single(compiled: str) -> None:
    torch.manual_seed(0)
    critic, seen, chunk = Critic(64, 8, 64, 2, 2), torch.randn(32, 64), torch.randn(32, 8)

    def loss(seen: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
        values = critic(seen, chunk)
        assert values.dtype == torch.float32 and len(values.unique()) == 64, "not rounded to 8 bits"
        return (values - 1).square().mean()

    exact = make(compile=compiled, precision="float32").prepare(loss)(seen, chunk)
    near = make(compile=compiled, precision="bfloat16").prepare(loss)(seen, chunk)
    near.backward()
    assert near.dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in critic.parameters())  # type: ignore[union-attr]
    assert near.item() != exact.item() and near.item() == pytest.approx(exact.item(), rel=0.02)


def test_a_compiler_that_fails_is_said_once_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fails(*_: Any, **__: Any) -> Any:
        def call(*_: Any) -> None:
            calls.append(1)
            raise RuntimeError("no working C++ compiler\nfound")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    made = make(compile="on")
    double = made.prepare(lambda x: 2 * x)
    assert [double(torch.tensor(2.0)).item(), double(torch.tensor(3.0)).item()] == [4.0, 6.0]
    assert calls == [1] and not made.compiled
    assert made.note == "not compiled: no working C++ compiler found; --compile off leaves it out"


def test_every_loss_is_compiled_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, compiler = [], torch.compile

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **_: compiler(f, backend=backend, dynamic=False))
    made = make(compile="on", precision="float32")
    losses = [made.prepare(lambda x, i=i: i * x) for i in range(20)]
    assert [loss(torch.tensor(1.0)).item() for loss in losses] == list(range(20))
    assert len(compiled) == 20


def test_a_compiler_that_fails_on_the_way_back_is_done_without_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("No space left on device")

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=fails)
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiler(f, backend=backend, dynamic=False))
    made, weight = make(compile="on", precision="float32"), torch.ones(4, 4, requires_grad=True)
    made.prepare(lambda x: (x @ weight).sum())(torch.ones(2, 4)).backward()
    assert weight.grad is not None and weight.grad.tolist() == [[2.0] * 4] * 4
    assert "No space left on device" in made.note and not made.compiled


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), torch.AcceleratorError("CUDA error: out of memory")])
def test_memory_that_runs_out_is_no_failure_of_the_compiler(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    made = make(compile="on")
    with pytest.raises(RuntimeError) as raised:
        made.prepare(lambda x: 2 * x)(torch.zeros(2))
    assert raised.value is error and made.compiled and not made.note


def test_compiled_computes_the_same() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 8, requires_grad=True)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x @ weight).sum()

    made, x = make(compile="on", precision="float32"), torch.randn(4, 8)
    gradients = []
    for one in (loss, made.prepare(loss)):
        (gradient,) = torch.autograd.grad(one(x), weight)
        gradients.append(gradient)
    if made.note:
        pytest.skip(made.note)
    torch.testing.assert_close(*gradients)


def test_what_a_graph_returned_is_copied_before_it_runs_again() -> None:
    weight = torch.ones(2, requires_grad=True)
    loss, value = compute._own((2 * weight, memory := torch.zeros(3)))
    memory += 1
    assert value.tolist() == [0.0, 0.0, 0.0]
    loss.sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [2.0, 2.0]
