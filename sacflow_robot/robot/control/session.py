"""A robot at work: one episode after another, and a person who may stop it at any moment in between."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from sacflow_robot.episode import LOOP_CLOCK
from sacflow_robot.errors import RobotError, StoppedError
from sacflow_robot.interfaces import Policy, Robot
from sacflow_robot.robot.control.action_queue import SyncChunking
from sacflow_robot.robot.control.loop import EpisodeLoop
from sacflow_robot.robot.control.operator import OperatorRequests, obey
from sacflow_robot.robot.control.run_config import EpisodeRun, RunConfig, default_safety
from sacflow_robot.robot.safety.filter import SafetyFilter
from sacflow_robot.robot.safety.latch import State

_LOOK_S = 0.05


def run_episode(robot: Robot, policy: Policy, seed: int, config: RunConfig) -> EpisodeRun:
    """Run one episode.

    The noise of the chunk chosen at step t is ``chunk_noise((H, A), seed, t)``, so that the episode can be repeated.

    Args:
        seed: Decides the noise, and the start on a simulated robot.

    Raises:
        StoppedError: The robot was stopped before the first command; nothing was sent.
        RobotError: The robot was held or stopped before this episode, and nobody has enabled it since.
        InvalidValueError: On a lockstep robot, an observation or an action contains NaN or infinity; nothing was sent on it.
        LogWriteError: The recorder cannot keep the steps; the robot gets no further command.
    """
    actions = SyncChunking(policy) if config.actions is None else config.actions
    loop = EpisodeLoop(robot, actions, config, seed=seed, noise_shape=policy.spec.noise_shape)
    info = {
        "seed": seed,
        "task": robot.spec.task,
        "robot": robot.spec.robot,
        "policy_version": config.policy_version,
        "spec_fingerprint": policy.spec.fingerprint,
        "clock": LOOP_CLOCK,
        "lockstep": robot.lockstep,
        **({"safety_sha256": loop.safety.limits.sha256} if isinstance(loop.safety, SafetyFilter) else {}),
        **config.info,
    }
    return loop.result({**info, **loop.run(info)})


@contextmanager
def watched(requests: OperatorRequests) -> Iterator[None]:
    """Say that requests are looked at while this lasts; afterward end the program if that was requested.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM asked for it, and the robot is at rest.
    """
    requests.watched = True
    try:
        yield
    except StoppedError:
        if not requests.ending:  # else it is what the signal asked for
            raise
    finally:
        requests.watched = False
    if requests.ending:
        raise KeyboardInterrupt


class Session:
    """Runs episodes on one robot. After a hold or a stop, the next one waits for a person to enable the robot."""

    def __init__(
        self, robot: Robot, policy: Policy, config: RunConfig, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.robot = robot
        self.policy = policy
        self.safety = default_safety(robot) if config.safety is None else config.safety
        self.config = replace(config, safety=self.safety)
        self.operator = config.operator
        self._sleep = sleep

    def run(self, seed: int, policy_version: str) -> EpisodeRun:
        """Run one episode; one that is stopped before its first command starts again once the robot is enabled.

        Raises:
            RobotError: Nobody enabled the robot in time, or it failed.
            KeyboardInterrupt: A signal asked the program to end; the robot is at rest.
        """
        config = replace(self.config, policy_version=policy_version)
        while True:
            self.await_enabled()
            try:
                with watched(self.operator.requests):
                    return run_episode(self.robot, self.policy, seed, config)
            except StoppedError as error:
                if self.safety.may_start:  # it was not a person who stopped it
                    raise
                self.config.tell(str(error))

    def await_enabled(self) -> None:
        """After a hold or a stop, wait until a person enables the robot, then reach it anew. Returns at once otherwise.

        Raises:
            RobotError: Nobody does in time.
            KeyboardInterrupt: A signal asked the program to end.
        """
        with watched(self.operator.requests):
            try:
                if self._is_enabled():
                    self.robot.connect()
                    self.safety.allow()
                    self.config.tell("enabled")
            finally:
                self.operator.report(self.safety)

    def _is_enabled(self) -> bool:
        """Wait for a request to enable the robot; False if none is needed, or the program is to end."""
        enable = self._look()
        if self.safety.may_start:
            return False
        if not enable:
            self.config.tell(f"not enabled ({self.safety.reason}); waiting for a person")
        waited_s = 0.0
        while not enable:
            self.operator.report(self.safety)
            if self.operator.requests.ending:
                return False
            if waited_s > self.config.enable_wait_s:
                raise RobotError(
                    f"nobody enabled the robot within {self.config.enable_wait_s:g} s of its stop: {self.safety.reason}"
                )
            self._sleep(_LOOK_S)
            waited_s += _LOOK_S
            enable = self._look()
        return True

    def _look(self) -> bool:
        """Obey requests between episodes; whether to enable the robot."""
        requested = self.operator.look(np.zeros(self.robot.spec.action_dim, np.float32), between=True)
        self.safety.rest()  # the robot holds since the last episode
        before = self.safety.state
        obey(self.safety, requested)
        if self.safety.state is State.STOPPED and before is not State.STOPPED:
            self.robot.stop()
        return requested.enable
