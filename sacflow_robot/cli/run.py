"""``sacflow-robot run``, ``estop`` and ``twin``."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sacflow_robot.cli import common
from sacflow_robot.cli.operator import OperatorOptions, profile_of, safety_filter, teller, with_clock
from sacflow_robot.errors import RobotError, UsageError
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
class Run(common.ClientOptions, common.JsonOptions):
    """Drive a robot with a served policy, and log its episodes.

    A robot that moves on its own time (any but sim) is commanded through the safety filter. It holds when actions fail to come,
    and then waits for a person: `kill -USR2 PID`, `sacflow-robot estop ADDRESS --enable`, or a key of the takeover device.
    `kill -USR1 PID` and `sacflow-robot estop ADDRESS` stop it, every robot alike; so do Ctrl-C and SIGTERM, which then end
    the program.

    Attributes:
        robot: Driver and what it takes, e.g. sim:lift, or rtsim:lift?obs_delay_ms=40&jitter_ms=10.
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
    """

    robot: str = "sim:lift"
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
            driver = find_driver(with_clock(self.robot, self.clock), self.env_engine)
            profile = profile_of(self.profile)
            keys = self.keys
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
                    success = common.success_json([run.episode for run in runs])
                    bar.update(row, advance=1, success=f"success {success['success_rate']:.0%}")
            except KeyboardInterrupt:
                if self.log is not None:
                    bar.console.print(f"logged until now; see: {common.command_line('log info', self.log)}")
                raise
            return self._report(robot, client, runs)

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
            with ResilientRecorder(path, robot) as mending:
                yield mending

    def _report(self, robot: Robot, client: PolicyClient, runs: list[EpisodeRun]) -> int:
        from sacflow_robot.robot.control.timing import joined

        success = common.success_json([run.episode for run in runs])
        overruns, held = sum(run.overruns for run in runs), sum(run.held for run in runs)
        timing = joined([run.timing for run in runs])
        late = f"{overruns} late actions" + (f", {held} held" if held else "")
        self.say(f"{self.robot}: success {common.describe_success(success)}, {late}")
        if not robot.lockstep and self.clock != "virtual":
            self.say(timing.histogram())
        if self.log is not None:
            replay = common.replay_hint(robot.spec, self.log, self.robot)
            learn = common.train_hint(robot.spec, self.log)
            common.console().print(f"logged to {self.log}; replay one or learn from all with:\n  {replay}\n  {learn}")
        result = {**success, "overruns": overruns, "held": held}
        result["stopped"] = [run.stopped for run in runs if run.stopped]
        if not robot.lockstep:
            result["timing"] = timing.row()
        return self.finish({**result, "policy_version": client.policy_version})


@dataclass(frozen=True)
class Estop:
    """Stop a running robot: it comes to rest within its limits, and takes no command until it is enabled again.

    It says which state was reached: stopped, hold or running. This is software over a network. It does not take the
    place of the robot's own stop button.

    Attributes:
        address: Where the running robot listens: what was given to run --estop.
        key: Shared key file: the same that run --estop-key was given.
        reason: Shown in the terminal of the program that moves the robot.
        enable: Enable it again instead, after a hold or a stop. Look at the robot first.
        timeout: Longest wait for the state (s).
    """

    address: Annotated[str, tyro.conf.Positional]
    key: Path | None = None
    reason: str = ""
    enable: bool = False
    timeout: float = 2.0

    def run(self) -> int:
        from sacflow_robot.robot.control.estop import PENDING, read_key, request

        if not 0 < self.timeout <= 60:
            raise UsageError("--timeout must be above 0 and at most 60")
        state = request(
            self.address, "enable" if self.enable else "stop", self.reason, read_key(self.key), self.timeout
        )
        within = f"within {self.timeout:g} s"
        if self.enable and state == PENDING:
            raise RobotError(f"{self.address}: asked to enable the robot, but it was not enabled {within}; look at it")
        if self.enable and state != "running":
            raise RobotError(
                f"{self.address}: not enabled, the robot stays in {state}; the program that moves it says why"
            )
        if state == PENDING:
            raise RobotError(
                f"{self.address}: the stop was accepted, but the robot was not seen to stop {within}; "
                "USE THE ROBOT'S OWN STOP BUTTON"
            )
        if not self.enable and state == "running":
            raise RobotError(f"{self.address}: the robot was stopped, and somebody has enabled it again since")
        print(f"{self.address}: {state}")
        return 0


@dataclass(frozen=True)
class TwinFranka:
    """Stand in for a Franka Panda and its real-time computer: deoxys's wire, over robosuite's Panda, at the robot's rates.

    Whatever speaks deoxys can drive it. An episode starts anew, and faults are made, on a socket that only the twin has
    (SACFLOW.RESET in the file); object poses are published as a tracker would (SACFLOW.OBJECTS).

    Attributes:
        config: deoxys's YAML file, the same that the driver reads.
    """

    config: Path = Path("launch/deoxys_twin.yml")

    def run(self) -> int:
        from sacflow_robot.robot.drivers.deoxys.config import load_config
        from sacflow_robot.robot.drivers.deoxys.twin import FrankaTwin

        config, out = load_config(self.config), common.console()
        with closing(FrankaTwin(config)) as twin:
            for asked in (signal.SIGINT, signal.SIGTERM):
                signal.signal(asked, lambda *_: twin.stop())
            out.print(
                f"twin of a Franka Panda before {config.task}: states at tcp://{config.nuc_ip}:{config.state_port} "
                f"({config.state_rate_hz:g} Hz), commands from tcp://{config.pc_ip}:{config.command_port} "
                f"({config.policy_rate_hz:g} Hz)"
            )
            out.print(f"drive it with:\n  {common.command_line('run --robot', f'deoxys:{self.config}')}")
            twin.run()
            out.print(
                f"stopped after {twin.commands:,} robot commands, {twin.refused} refused; {twin.overruns} ticks were late"
            )
        return 0
