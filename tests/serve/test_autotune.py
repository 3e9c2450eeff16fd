from pathlib import Path

from sacflow_robot.export.onnx_policy import Engine, OnnxPolicy
from sacflow_robot.serve import autotune as tune


def test_engines_that_make_sense() -> None:
    assert tune.candidates(1) == [Engine()]
    two = tune.candidates(2)
    assert two == [Engine(), Engine(threads=2), Engine(threads=2, spin=True)]
    assert max(engine.threads for engine in tune.candidates(64)) == 8


def test_the_quickest_was_measured_and_passed_the_self_test(policy_file: Path) -> None:
    policy, trials = tune.quickest(policy_file, budget_s=0.2)
    assert isinstance(policy, OnnxPolicy) and policy.engine in [trial.engine for trial in trials]
    assert trials[0].engine == Engine() and all(0 < trial.p50_us <= trial.p90_us for trial in trials)
    one = trials[0].p50_us
    if policy.engine != Engine():
        assert min(trial.p50_us for trial in trials) < 0.91 * one
