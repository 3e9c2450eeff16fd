"""A robot at work: one episode after another, and a person who may stop it at any moment in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from sacflow_robot.errors import RobotError, StoppedError
from sacflow_robot.interfaces import Policy, Recorder, Robot
from sacflow_robot.robot.control.action_sources import ActionSource
from sacflow_robot.robot.control.episode_loop import EpisodeRun
from sacflow_robot.robot.control.loop import run_episode
from sacflow_robot.robot.control.operator import Operator, obey
from sacflow_robot.robot.control.operator_requests import OperatorRequests
from sacflow_robot.robot.safety.action_clipper import ActionClipper
from sacflow_robot.robot.safety.filter import SafetyFilter
from sacflow_robot.robot.safety.latch import State
from sacflow_robot.robot.teleop.intervention import Teleoperator

_LOOK_S = 0.05


@contextmanager
def watched(switches: OperatorRequests) -> Iterator[None]:
    """Say that requests are looked at while this lasts; afterward end the program if that was asked for.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM asked for it, and the robot is at rest.
    """
    switches.watched = True
    try:
        yield
    except StoppedError:
        if not switches.ending:  # else it is what the signal asked for
            raise
    finally:
        switches.watched = False
    if switches.ending:
        raise KeyboardInterrupt


class Session:
    """Runs episodes on one robot. After a hold or a stop, the next one waits for a person to enable the robot.

    Args:
        robot: The robot, connected.
        policy: Local or remote policy.
        safety: What every command passes.
        switches: Requests over the network and by signals.
        human: Keyboard, gamepad or SpaceMouse.
        recorder: Gets every step.
        chooser: Where actions come from; the policy, chunk by chunk, if None.
        info: What else to record about each episode; JSON values.
        enable_wait_s: Longest wait for a person to enable the robot again (s).
        tell: Where to say what a person has to know at once; must not wait.
        sleep: Waits so many seconds between two looks for requests.
    """

    def __init__(
        self,
        robot: Robot,
        policy: Policy,
        safety: SafetyFilter | ActionClipper,
        *,
        switches: OperatorRequests | None = None,
        human: Teleoperator | None = None,
        recorder: Recorder | None = None,
        chooser: ActionSource | None = None,
        info: Mapping[str, Any] | None = None,
        enable_wait_s: float = 60.0,
        tell: Callable[[str], None] = lambda line: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.robot = robot
        self.policy = policy
        self.safety = safety
        self.operator = Operator(switches, human)
        self.recorder = recorder
        self.chooser = chooser
        self.info = dict(info or {})
        self.enable_wait_s = enable_wait_s
        self.tell = tell
        self._sleep = sleep

    def run(self, seed: int, policy_version: str) -> EpisodeRun:
        """Run one episode; one that is stopped before its first command starts again once the robot is enabled.

        Raises:
            RobotError: Nobody enabled the robot in time, or it failed.
            KeyboardInterrupt: A signal asked the program to end; the robot is at rest.
        """
        while True:
            self.await_enabled()
            try:
                with watched(self.operator.switches):
                    return run_episode(
                        self.robot,
                        self.policy,
                        seed,
                        policy_version=policy_version,
                        recorder=self.recorder,
                        safety=self.safety,
                        chooser=self.chooser,
                        operator=self.operator,
                        info=self.info,
                        tell=self.tell,
                    )
            except StoppedError as error:
                if self.safety.may_start:  # it was not a person who stopped it
                    raise
                self.tell(str(error))

    def await_enabled(self) -> None:
        """After a hold or a stop, wait until a person robots the robot, then reach it anew. Returns at once otherwise.

        Raises:
            RobotError: Nobody does in time.
            KeyboardInterrupt: A signal asked the program to end.
        """
        with watched(self.operator.switches):
            try:
                if self._is_enabled():
                    self.robot.connect()
                    self.safety.allow()
                    self.tell("enabled")
            finally:
                self.operator.report(self.safety)

    def _is_enabled(self) -> bool:
        """Wait for a request to enable the robot; False if none is needed, or the program is to end."""
        enable = self._look()
        if self.safety.may_start:
            return False
        if not enable:
            self.tell(f"not enabled ({self.safety.reason}); waiting for a person")
        waited_s = 0.0
        while not enable:
            self.operator.report(self.safety)
            if self.operator.switches.ending:
                return False
            if waited_s > self.enable_wait_s:
                raise RobotError(
                    f"nobody enabled the robot within {self.enable_wait_s:g} s of its stop: {self.safety.reason}"
                )
            self._sleep(_LOOK_S)
            waited_s += _LOOK_S
            enable = self._look()
        return True

    def _look(self) -> bool:
        """Obey what is asked for between episodes; whether it is to enable the robot."""
        requests = self.operator.look(np.zeros(self.robot.spec.action_dim, np.float32), between=True)
        self.safety.rest()  # the robot holds since the last episode
        before = self.safety.state
        obey(self.safety, requests)
        if self.safety.state is State.STOPPED and before is not State.STOPPED:
            self.robot.stop()
        return requests.enable
