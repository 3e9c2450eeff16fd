"""``sacflow-robot run``."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sacflow_robot.cli import common
from sacflow_robot.errors import RobotError, UsageError
from sacflow_robot.spec import ArmSpec, Engine, FloatArray, PolicySpec, Recorder, Robot

if TYPE_CHECKING:
    from sacflow_robot.calibrate.profile import Profile
    from sacflow_robot.robot.loop import Chooser, EpisodeRun
    from sacflow_robot.robot.safety import SafetyFilter
    from sacflow_robot.robot.switches import Switches
    from sacflow_robot.robot.takeover import HumanInput
    from sacflow_robot.serve.client import PolicyClient

_LONGEST_TIMEOUT_S = 3600
_LOCKSTEP_PATIENCE_S = 60.0
_LOOK_S = 0.05


@dataclass(frozen=True)
class Run:
    """Drive an arm with a served policy, and log its episodes.

    An arm that moves on its own time (any but sim) is commanded through the safety filter. It holds when actions fail to come,
    and then waits for a person: `kill -USR2 PID`, `sacflow-robot estop ADDRESS --arm`, or a key of the takeover device.
    `kill -USR1 PID` and `sacflow-robot estop ADDRESS` stop it.

    Attributes:
        robot: Driver and what it takes, e.g. sim:lift, or rtsim:lift?obs_delay_ms=40&jitter_ms=10.
        server: Address of the policy server.
        episodes: Episodes to run.
        seed: First seed: start of the episode (on a simulated arm) and noise of the policy.
        log: Episode log to append to; made if absent.
        note: Text to keep with every episode.
        profile: Calibration profile whose limits hold on top of the arm's.
        timeout: Longest wait for the server (s).
        env_engine: What steps a simulated arm: compiled, or robosuite's own (stock).
        clock: Of rtsim: real, or virtual, which does not wait.
        estop: Listen for stops at this address, e.g. tcp://127.0.0.1:5560.
        estop_key: Shared key file that a stop has to show.
        arm_wait: Longest wait for a person to arm the arm again (s).
        keyboard: Let a person take over, label and stop episodes with the keys of this terminal.
        handheld: The same with a gamepad or spacemouse, or e.g. gamepad:/dev/input/js1; goes with --keyboard.
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
    estop: str | None = None
    estop_key: Path | None = None
    arm_wait: float = 60.0
    keyboard: bool = False
    handheld: str | None = None
    key: Path | None = None
    server_key: Path | None = None
    json: bool = False

    def run(self) -> int:
        from sacflow_robot.robot.drivers import find_driver
        from sacflow_robot.robot.loop import check_fit
        from sacflow_robot.robot.other_clock import by_loop_clock
        from sacflow_robot.robot.switches import terminated_as_interrupted
        from sacflow_robot.serve.client import PolicyClient

        if self.episodes < 1 or self.seed < 0 or not 0 < self.timeout <= _LONGEST_TIMEOUT_S:
            raise UsageError(
                f"--episodes must be at least 1, --seed not negative, --timeout above 0 and at most {_LONGEST_TIMEOUT_S}"
            )
        runs: list[EpisodeRun] = []
        with ExitStack() as stack:
            stack.enter_context(terminated_as_interrupted())
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
            robot.connect()
            cell = self._cell(robot, client, profile, stack)
            bar = stack.enter_context(common.progress_bar("episodes"))
            row = bar.add_task("running", total=self.episodes, success="")
            cell.tell = bar.console.print
            cell.human = self._human(robot, cell.tell, stack)
            for seed in range(self.seed, self.seed + self.episodes):
                runs.append(cell.run(seed, client.begin_episode(seed)))
                solved = sum(run.episode.success for run in runs)
                bar.update(row, advance=1, success=f"success {solved / len(runs):.0%}")
                if seed < self.seed + self.episodes - 1:
                    cell.await_armed(self.arm_wait)
            self._report(robot, client, runs)
        return 0

    def _human(self, robot: Robot, say: Callable[[str], None], stack: ExitStack) -> HumanInput | None:
        inputs: list[HumanInput] = []
        if self.handheld is not None:
            from sacflow_robot.robot.handheld import open_handheld

            inputs.append(stack.enter_context(closing(open_handheld(self.handheld, robot.spec, say))))
        if self.keyboard:
            from sacflow_robot.robot.keyboard import Keyboard

            inputs.append(stack.enter_context(closing(Keyboard(robot.spec, say=say))))
        if len(inputs) < 2:
            return inputs[0] if inputs else None
        from sacflow_robot.robot.handheld import Both

        return Both(*inputs)

    def _robot_name(self) -> str:
        if self.clock is None:
            return self.robot
        return f"{self.robot}{'&' if '?' in self.robot else '?'}clock={self.clock}"

    def _cell(self, robot: Robot, client: PolicyClient, profile: Profile | None, stack: ExitStack) -> _Cell:
        from sacflow_robot.robot.clock import MonotonicClock
        from sacflow_robot.robot.estop import StopServer, read_key
        from sacflow_robot.robot.switches import Switches, signals

        engine = getattr(robot, "engine", None)
        info: dict[str, Any] = {} if self.note is None else {"note": self.note}
        if engine is not None:
            info["env_engine"] = engine
        if profile is not None:
            info["calibration_sha256"] = profile.sha256
        switches, safety, limits = Switches(), None, None
        if profile is not None and (profile.safety is not None or not robot.lockstep):
            safety = common.safety_filter(robot, profile)
        elif profile is not None:
            limits = profile.action_limits(robot.spec)
        elif not robot.lockstep:
            safety = common.safety_filter(robot, None)
        chooser: Chooser | None = None
        if not robot.lockstep:
            from sacflow_robot.serve.stream import ChunkStream

            # On a virtual clock the real time that an answer takes is no time: it is waited for.
            virtual = not isinstance(robot.clock, MonotonicClock)
            chooser = ChunkStream(_InNoTime(client) if virtual else client, clock_ns=robot.clock.now_ns)
            stack.enter_context(signals(switches))
        if self.estop is not None:
            server = stack.enter_context(StopServer(self.estop, switches, read_key(self.estop_key)))
            common.console().print(f"stop it with: {common.command_line('estop', server.address)}")
        log = None if self.log is None else stack.enter_context(self._recorder(self.log, robot.spec, robot.lockstep))
        return _Cell(robot, client, log, limits, safety, chooser, switches, info)

    @contextmanager
    def _recorder(self, path: Path, arm: ArmSpec, lockstep: bool) -> Iterator[Recorder]:
        from sacflow_robot.data.mending import MendingRecorder
        from sacflow_robot.data.recorder import StepRecorder

        if lockstep:  # it outruns any disk, and can wait
            with StepRecorder(path, arm, patience_s=_LOCKSTEP_PATIENCE_S) as log:
                yield log
        else:
            with MendingRecorder(lambda: StepRecorder(path, arm)) as mending:
                yield mending

    def _report(self, robot: Robot, client: PolicyClient, runs: list[EpisodeRun]) -> None:
        from sacflow_robot.robot.timing import joined

        solved, done = sum(run.episode.success for run in runs), len(runs)
        overruns, held = sum(run.overruns for run in runs), sum(run.held for run in runs)
        timing = joined([run.timing for run in runs])
        out = common.console()
        late = f"{overruns} late actions" + (f", {held} held" if held else "")
        out.print(f"{self.robot}: success {common.describe_success(solved, done)}, {late}")
        if not robot.lockstep and self.clock != "virtual":
            out.print(timing.histogram())
        if self.log is not None:
            out.print(f"logged to {self.log}; replay one or learn from all with:")
            out.print(f"  {common.replay_hint(robot.spec, self.log, self.robot)}")
            out.print(f"  {common.train_hint(robot.spec, self.log)}")
        if self.json:
            result = {**common.success_json(solved, done), "overruns": overruns, "held": held}
            stopped = [run.stopped for run in runs if run.stopped]
            if not robot.lockstep:
                result |= {"timing": timing.row(), "stopped": stopped}
            common.print_json({**result, "policy_version": client.policy_version})


class _InNoTime:
    """A client whose answers are always there when they are looked for."""

    def __init__(self, client: PolicyClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    @property
    def spec(self) -> PolicySpec:
        return self._client.spec

    def collect(self, number: int, wait_s: float | None = None) -> FloatArray:
        return self._client.collect(number)


@dataclass
class _Cell:
    """All that an episode needs."""

    robot: Robot
    client: PolicyClient
    log: Recorder | None
    limits: Any
    safety: SafetyFilter | None
    chooser: Chooser | None
    switches: Switches
    info: dict[str, Any]
    human: HumanInput | None = None
    tell: Callable[[str], None] = print

    def run(self, seed: int, version: str) -> EpisodeRun:
        from sacflow_robot.robot.loop import run_episode

        return run_episode(
            self.robot,
            self.client,
            seed,
            policy_version=version,
            recorder=self.log,
            limits=self.limits,
            safety=self.safety,
            chooser=self.chooser,
            human=self.human,
            switches=self.switches,
            info=self.info,
            tell=self._say,
        )

    def await_armed(self, longest_s: float) -> None:
        """After an episode that ended held or stopped: wait until a person says to go on, then reach the arm anew.

        Raises:
            RobotError: Nobody does.
        """
        from sacflow_robot.robot.safety import State

        if self.safety is None or self.safety.state is State.ARMED:
            return
        self._say(f"not armed ({self.safety.reason}); waiting for a person")
        until = time.monotonic() + longest_s
        while not self._asked_to_arm():
            if time.monotonic() > until:
                raise RobotError(f"nobody armed the arm within {longest_s:g} s of its stop: {self.safety.reason}")
            time.sleep(_LOOK_S)
        self.robot.connect()

    def _asked_to_arm(self) -> bool:
        import numpy as np

        signal = None if self.human is None else self.human.poll(np.zeros(self.robot.spec.action_dim, np.float32))
        return self.switches.take()[1] or (signal is not None and signal.arm)

    def _say(self, line: str) -> None:
        arming = f"; arm it again with: kill -USR2 {os.getpid()}" if line.startswith(("hold", "stopped")) else ""
        self.tell(f"{self.robot.spec.robot}: {line}{arming}")
