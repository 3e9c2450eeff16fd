"""``sacflow-robot run``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from sacflow_robot.cli import common
from sacflow_robot.cli.operator import OperatorOptions, safety_filter, teller
from sacflow_robot.errors import UsageError
from sacflow_robot.interfaces import Recorder, Robot, SimulatedRobot
from sacflow_robot.spec import Engine, RobotSpec
from sacflow_robot.utils.atomic_files import check_output

if TYPE_CHECKING:
    from sacflow_robot.calibrate.profile import Profile
    from sacflow_robot.robot.control.action_queue import ActionSource
    from sacflow_robot.robot.control.operator import OperatorRequests
    from sacflow_robot.robot.control.run_config import EpisodeRun
    from sacflow_robot.robot.control.session import Session
    from sacflow_robot.serve.client import PolicyClient

_LONGEST_TIMEOUT_S = 3600
_LOCKSTEP_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Run:
    """Drive a robot with a served policy, and log its episodes.

    A robot that moves on its own time (any but sim) is commanded through the safety filter. It holds when actions fail to come,
    and then waits for a person: `kill -USR2 PID`, `sacflow-robot estop ADDRESS --enable`, or a key of the takeover device.
    `kill -USR1 PID` and `sacflow-robot estop ADDRESS` stop it, every robot alike; so do Ctrl-C and SIGTERM, which then end
    the program.

    Attributes:
        robot: Driver and what it takes, e.g. sim:lift, or rtsim:lift?obs_delay_ms=40&jitter_ms=10.
        server: Address of the policy server.
        episodes: Episodes to run.
        seed: First seed: start of the episode (on a simulated robot) and noise of the policy.
        log: Episode log to append to; made if absent.
        note: Text to keep with every episode.
        profile: Calibration profile whose limits hold on top of the robot's.
        timeout: Longest wait for the server (s).
        env_engine: What steps a simulated robot: compiled, or robosuite's own (stock).
        clock: Of rtsim: real, or virtual, which does not wait.
        enable_wait: Longest wait for a person to enable the robot again (s).
        operator: How a person stops the robot, and takes it over.
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
    clock: Literal["real", "virtual"] | None = None
    enable_wait: float = 60.0
    operator: tyro.conf.OmitArgPrefixes[OperatorOptions] = field(default_factory=OperatorOptions)
    key: Path | None = None
    server_key: Path | None = None
    json: bool = False

    def run(self) -> int:
        from sacflow_robot.robot.control.operator import OperatorRequests, operator_signals
        from sacflow_robot.robot.control.run_config import check_fit
        from sacflow_robot.robot.drivers.registry import find_driver
        from sacflow_robot.robot.drivers.wrappers import by_loop_clock
        from sacflow_robot.serve.client import PolicyClient

        if self.episodes < 1 or self.seed < 0 or not 0 < self.timeout <= _LONGEST_TIMEOUT_S:
            raise UsageError(
                f"--episodes must be at least 1, --seed not negative, --timeout above 0 and at most {_LONGEST_TIMEOUT_S}"
            )
        check_output(self.log, "--log", folder=True)
        runs: list[EpisodeRun] = []
        with ExitStack() as stack:
            requests = OperatorRequests()
            stack.enter_context(operator_signals(requests))
            driver, profile = find_driver(self._robot_name(), self.env_engine), None
            if self.profile is not None:
                from sacflow_robot.calibrate.profile import load_profile

                profile = load_profile(self.profile)
            keys = common.client_keys(self.key, self.server_key)
            robot = stack.enter_context(closing(driver()))
            if profile is not None:
                robot = by_loop_clock(robot, profile.model.number("transport.clock_offset_ms"))
            client = stack.enter_context(
                PolicyClient(self.server, self.timeout, expect=robot.spec, swap="episode", name=self.robot, keys=keys)
            )
            check_fit(client, robot.spec)
            self.operator.listen(requests, stack)
            robot.connect()
            bar = stack.enter_context(common.progress_bar("episodes"))
            row = bar.add_task("running", total=self.episodes, success="")
            session = self._session(robot, client, profile, requests, stack, bar.console.print)
            try:
                for seed in range(self.seed, self.seed + self.episodes):
                    session.await_enabled()
                    runs.append(session.run(seed, client.begin_episode(seed)))
                    solved = sum(run.episode.success for run in runs)
                    bar.update(row, advance=1, success=f"success {solved / len(runs):.0%}")
            except KeyboardInterrupt:
                if self.log is not None:
                    bar.console.print(f"logged until now; see: {common.command_line('log info', self.log)}")
                raise
            self._report(robot, client, runs)
        return 0

    def _robot_name(self) -> str:
        if self.clock is None:
            return self.robot
        return f"{self.robot}{'&' if '?' in self.robot else '?'}clock={self.clock}"

    def _session(
        self,
        robot: Robot,
        client: PolicyClient,
        profile: Profile | None,
        requests: OperatorRequests,
        stack: ExitStack,
        say: Callable[[str], None],
    ) -> Session:
        from sacflow_robot.robot.control.operator import Operator
        from sacflow_robot.robot.control.run_config import RunConfig
        from sacflow_robot.robot.control.session import Session
        from sacflow_robot.robot.drivers.wrappers import unwrapped

        info: dict[str, Any] = {} if self.note is None else {"note": self.note}
        inner = unwrapped(robot)
        if isinstance(inner, SimulatedRobot):
            info["env_engine"] = inner.engine
        if profile is not None:
            info["calibration_sha256"] = profile.sha256
        actions: ActionSource | None = None
        if not robot.lockstep:
            from sacflow_robot.robot.control.action_queue import queue_for

            client.interrupted = lambda: requests.halt_pending  # the first chunk may be waited for as long as --timeout
            actions = queue_for(client, robot)
        log = None if self.log is None else stack.enter_context(self._recorder(self.log, robot.spec, robot.lockstep))
        config = RunConfig(
            safety=safety_filter(robot, profile),
            actions=actions,
            operator=Operator(requests, self.operator.teleoperator(robot.spec, say, stack)),
            recorder=log,
            info=info,
            enable_wait_s=self.enable_wait,
            tell=teller(robot.spec.robot, say),
        )
        return Session(robot, client, config)

    @contextmanager
    def _recorder(self, path: Path, robot: RobotSpec, lockstep: bool) -> Iterator[Recorder]:
        from sacflow_robot.data.log.recorder import StepRecorder
        from sacflow_robot.data.log.resilient_recorder import ResilientRecorder

        if lockstep:  # it outruns any disk, and can wait
            with StepRecorder(path, robot, patience_s=_LOCKSTEP_PATIENCE_S) as log:
                yield log
        else:
            with ResilientRecorder(lambda: StepRecorder(path, robot)) as mending:
                yield mending

    def _report(self, robot: Robot, client: PolicyClient, runs: list[EpisodeRun]) -> None:
        from sacflow_robot.robot.control.timing import joined

        solved, done = sum(run.episode.success for run in runs), len(runs)
        overruns, held = sum(run.overruns for run in runs), sum(run.held for run in runs)
        timing = joined([run.timing for run in runs])
        out, hints = common.results(self.json), common.console()
        late = f"{overruns} late actions" + (f", {held} held" if held else "")
        out.print(f"{self.robot}: success {common.describe_success(solved, done)}, {late}")
        if not robot.lockstep and self.clock != "virtual":
            out.print(timing.histogram())
        if self.log is not None:
            hints.print(f"logged to {self.log}; replay one or learn from all with:")
            hints.print(f"  {common.replay_hint(robot.spec, self.log, self.robot)}")
            hints.print(f"  {common.train_hint(robot.spec, self.log)}")
        if self.json:
            result = {**common.success_json(solved, done), "overruns": overruns, "held": held}
            result["stopped"] = [run.stopped for run in runs if run.stopped]
            if not robot.lockstep:
                result["timing"] = timing.row()
            common.print_json({**result, "policy_version": client.policy_version})
