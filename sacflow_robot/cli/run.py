"""``sacflow-robot run``."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from sacflow_robot.cli import common
from sacflow_robot.errors import UsageError
from sacflow_robot.spec import Engine

_LONGEST_TIMEOUT_S = 3600
_LOCKSTEP_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Run:
    """Drive an arm with a served policy, and log its episodes.

    Attributes:
        robot: Driver and what it takes, e.g. sim:lift.
        server: Address of the policy server.
        episodes: Episodes to run.
        seed: First seed: start of the episode (on a simulated arm) and noise of the policy.
        log: Episode log to append to; made if absent.
        note: Text to keep with every episode.
        profile: Calibration profile whose action limits hold on top of the arm's.
        timeout: Longest wait for the server (s).
        env_engine: What steps a simulated arm: compiled, or robosuite's own (stock).
        key: Secret key file of this client, where the server asks for keys.
        server_key: Public key file of the server, likewise.
        json: Print the result as one JSON object.
    """

    robot: str = "sim:lift"
    server: str = "tcp://127.0.0.1:5555"
    episodes: int = 10
    seed: int = common.RUN_SEED
    log: Path | None = None
    note: str | None = None
    profile: Path | None = None
    timeout: float = 2.0
    env_engine: Engine = "compiled"
    key: Path | None = None
    server_key: Path | None = None
    json: bool = False

    def run(self) -> int:
        from sacflow_robot.robot.drivers import find_driver
        from sacflow_robot.robot.loop import check_fit, run_episode
        from sacflow_robot.serve.client import PolicyClient

        if self.episodes < 1 or self.seed < 0 or not 0 < self.timeout <= _LONGEST_TIMEOUT_S:
            raise UsageError(
                f"--episodes must be at least 1, --seed not negative, --timeout above 0 and at most {_LONGEST_TIMEOUT_S}"
            )
        solved = done = overruns = 0
        with ExitStack() as stack:
            driver, profile = find_driver(self.robot, self.env_engine), None
            if self.profile is not None:
                from sacflow_robot.calibrate.profile import load_profile

                profile = load_profile(self.profile)
            keys = common.client_keys(self.key, self.server_key)
            client = stack.enter_context(
                PolicyClient(self.server, self.timeout, swap="episode", name=self.robot, keys=keys)
            )
            robot = stack.enter_context(closing(driver()))
            robot.connect()
            check_fit(client, robot.spec)
            limits = None if profile is None else profile.action_limits(robot.spec)
            engine = getattr(robot, "engine", None)
            log = None
            if self.log is not None:
                from sacflow_robot.data.recorder import StepRecorder

                patience = 0.0 if engine is None else _LOCKSTEP_PATIENCE_S
                log = stack.enter_context(StepRecorder(self.log, robot.spec, patience_s=patience))
            info = {} if self.note is None else {"note": self.note}
            if engine is not None:
                info["env_engine"] = engine
            if self.profile is not None:
                info["calibration_sha256"] = hashlib.sha256(self.profile.read_bytes()).hexdigest()
            bar = stack.enter_context(common.progress_bar("episodes"))
            row = bar.add_task("running", total=self.episodes, success="")
            for seed in range(self.seed, self.seed + self.episodes):
                version = client.begin_episode(seed)
                run = run_episode(robot, client, seed, policy_version=version, recorder=log, limits=limits, info=info)
                done, solved, overruns = done + 1, solved + run.episode.success, overruns + run.overruns
                bar.update(row, advance=1, success=f"success {solved / done:.0%}")
        out = common.console()
        out.print(f"{self.robot}: success {common.describe_success(solved, done)}, {overruns} late actions")
        if self.log is not None:
            out.print(f"logged to {self.log}; replay one or learn from all with:")
            out.print(f"  {common.command_line('replay', self.log, '--episode 0')}")
            out.print(f"  {common.command_line('train --env', robot.spec.task, '--demos none --replay', self.log)}")
        if self.json:
            result = common.success_json(solved, done)
            common.print_json({**result, "overruns": overruns, "policy_version": client.policy_version})
        return 0
