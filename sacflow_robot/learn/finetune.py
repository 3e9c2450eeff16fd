"""Fine-tuning a run for one robot: in simulation around its profile, or on its log alone. Both work on a copy of the run."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sacflow_robot.calibrate.profile import load_profile
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.envs.registry import get_robot
from sacflow_robot.errors import DataError, UsageError
from sacflow_robot.learn.config import CHANGEABLE, TrainConfig
from sacflow_robot.learn.online_learner import OnlineConfig, OnlineLearner, learn_from_log
from sacflow_robot.learn.run_folder import RunFolder
from sacflow_robot.learn.schedule import RegularizationSchedule
from sacflow_robot.learn.training_envs import training_draws
from sacflow_robot.spec import NO_ENVIRONMENT

FITTING_STEPS = 8000
"""Environment steps, unless given, in which a run is fitted to the robot of a profile."""

# Few episodes of one robot, made by nearly the same policy, do not tell what other actions would have brought: with more updates
# or a weaker pull toward what was done, Lift policies were worse on the robot than before (benchmarks/transfer.py). Measured
# on Lift alone.
_TUNING = {
    "bc_loss": "action",
    "bc_coef": 3.0,
    "bc_schedule": "constant",
    "bc_coef_final": 0.0,
}
_TUNING_LOG_SHARE = 0.5
_TUNING_WARMUP_STEPS = 200  # the critic alone learns from what comes first, for the robot is another one


def check_resumed(run: Path, given: Mapping[str, Sequence[str]]) -> None:
    """Refuse options beside ``--resume`` that the run, or what is to be done with it, leaves no room for.

    Args:
        run: The run folder.
        given: Values of the options given, by name as on the command line.

    Raises:
        UsageError: There is one.
        DataError: There is no run.
    """
    if "replay" in given and "profile" in given:
        raise UsageError(
            "--resume with both --profile and --replay; fit the run to the profile first, then fine-tune what comes of it"
        )
    same = "env", "velocity", "algo", "from-scratch", "no-from-scratch"
    taken = {"resume", "json", "full", "no-full", *same}
    if "replay" in given:
        taken |= {"replay", "out", "tune-updates"}
    elif "profile" in given:
        taken |= {"profile", "out", "online-steps"}
    else:
        taken |= {"online-steps", *CHANGEABLE}
    wrong = [" ".join([f"--{name}", *values]) for name, values in given.items() if name not in taken]
    if wrong:
        raise UsageError(f"--resume goes on with the run's own configuration; leave out {' '.join(wrong)}")
    if "full" in given:
        raise UsageError(f"--full sizes a new run, and {run} has its sizes; leave it out, or leave out --resume")
    for option in (option for option in same if option in given):
        name = option.removeprefix("no-")
        own = getattr(RunFolder.open(run)[1], name.replace("-", "_"))
        value = given[option][-1] if given[option] else option == name
        if value != own:
            said = " ".join([f"--{option}", *given[option]])
            raise UsageError(
                f"{said} with --resume {run}, a run of {name} {str(own).lower()}; leave it out, or start a new run without "
                f"--resume"
            )


def copy_to_fit(run: Path, profile: str, steps: int, out: Path | None) -> tuple[RunFolder, TrainConfig]:
    """Copy a run so that it goes on for so many environment steps more, on robots drawn around a profile.

    Raises:
        UsageError: The copy's path is taken, there are no steps, or the profile has nothing to draw from.
        DataError: There is no run to go on with, or the profile cannot be read.
        SpecMismatchError: The profile is of another robot.
    """
    if steps < 1:
        raise UsageError(f"--online-steps is {steps}; it must be at least 1")
    theirs, config = RunFolder.open(run)
    if config.env == NO_ENVIRONMENT:
        raise UsageError(
            f"{run} is a run without an environment to fit it in; --replay LOG fine-tunes it on a log alone"
        )
    path = out or _beside(run, Path(profile).stem)
    RunFolder.check_free(path)
    done = int(json.loads(theirs.load_checkpoint(config, mapped=True)["progress"])["env_steps"])
    load_profile(Path(profile)).check_fits(get_robot(config.env))
    weight = RegularizationSchedule(config).weight(done)
    config = replace(config, randomize="profile", profile=profile, online_steps=done + steps)
    if config.learner.bc_schedule == "linear":  # it stays where it has come to
        config = replace(config, learner=replace(config.learner, bc_schedule="constant", bc_coef=weight))
    training_draws(config)
    with theirs.copied(path) as folder:
        folder.write_config(config)
    return RunFolder.open(path)


def fine_tune(run: Path, logs: Sequence[str], utd_ratio: float, out: Path | None) -> tuple[RunFolder, OnlineLearner]:
    """Learn from logs alone, on a copy of a run: the copy, and what has learned.

    Raises:
        Interrupted: Ctrl-C was pressed; no copy was made.
        UsageError: The copy's path is taken, or the logs are too short to tune a policy with.
        DataError: There is no run to go on with, or a log cannot be read or does not fit.
    """
    if not 0 < utd_ratio < math.inf:
        raise UsageError(f"--tune-updates is {utd_ratio:g}; it must be positive and finite")
    theirs, _ = RunFolder.open(run)
    path = out or _beside(run, "tuned")
    RunFolder.check_free(path)
    steps = [_steps_of(log) for log in logs]
    if sum(steps) <= _TUNING_WARMUP_STEPS:
        raise UsageError(
            f"--replay {' '.join(logs)}: {sum(steps)} steps are too few to tune a policy with; log more than "
            f"{_TUNING_WARMUP_STEPS}"
        )
    with theirs.copied(path) as folder:
        for i, log in enumerate(logs):
            online = OnlineConfig(
                Path(log), publish_every=10**9, gate_episodes=0, stop_after=1, log_share=_TUNING_LOG_SHARE,
                from_average=i == 0,
            )  # fmt: skip
            warmup = max(0, _TUNING_WARMUP_STEPS - sum(steps[:i]))
            learner = learn_from_log(folder.path, online, {**_TUNING, "utd_ratio": utd_ratio, "warmup_steps": warmup})
    return RunFolder.open(path)[0], learner


def _beside(run: Path, ending: str) -> Path:
    whole = run.resolve()
    return run.with_name(f"{run.name}-{ending}") if run.name else whole.with_name(f"{whole.name}-{ending}")


def _steps_of(log: str) -> int:
    """Steps in the whole episodes of a log.

    Raises:
        DataError: It is not a log on this machine, or it has none.
    """
    if "://" in log:
        raise DataError(f"--replay {log}: a run is fine-tuned on logs of this machine; copy it here first")
    if not Path(log).exists():
        raise DataError(f"--replay {log}: there is no such log; name one that 'run --log' wrote")
    steps = EpisodeLog.open(Path(log), heal=False).steps
    if not steps:
        raise DataError(f"--replay {log} has no whole episode; log some first")
    return steps
