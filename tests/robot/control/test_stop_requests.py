"""Stops, holds and enabling by a person: single cases, each of which was once wrong."""

import itertools
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sacflow_robot.episode import StepResult
from sacflow_robot.errors import RobotError, StoppedError
from sacflow_robot.robot.control import operator as requests_module
from sacflow_robot.robot.control.operator import Operator, OperatorInput, OperatorRequests, operator_signals
from sacflow_robot.robot.control.run_config import RunConfig
from sacflow_robot.robot.control.session import Session, watched
from sacflow_robot.robot.safety.filter import SafetyFilter
from sacflow_robot.robot.safety.latch import State
from sacflow_robot.robot.teleop.intervention import TeleopSignal
from sacflow_robot.spec import FloatArray
from tests.robot.safety.following_robot import LIMITS, MOTIONS, Labels, Person, Policy, made, moving, run


@pytest.mark.parametrize("how", ["network", "hand", "signal", "hangup", "device"])
def test_a_robot_in_lockstep_without_a_profile_obeys_a_stop(how: str) -> None:
    robot, requests, person = made(lockstep=True), OperatorRequests(), Person()

    def fail(commanded: FloatArray) -> TeleopSignal:
        raise OSError("unplugged")

    def stop() -> None:
        if how == "network":
            requests.stop("over the network")
        elif how == "hand":
            person.next = TeleopSignal(stop=True)
        elif how == "signal":
            os.kill(os.getpid(), signal.SIGUSR1)
        elif how == "hangup":
            person.action = np.zeros(7, np.float32)  # a person is in charge
            os.kill(os.getpid(), signal.SIGHUP)
        else:
            person.poll = fail  # type: ignore[method-assign]

    with operator_signals(requests):
        said = run(robot, [0.1], {10: stop}, operator=Operator(requests, person))
    assert len(robot.commands) - 1 == 10 and robot.stopped
    assert any(line.startswith("stopped: ") for line in said) and requests.state == "stopped"


def test_a_hangup_holds_a_robot_that_nobody_moves_until_somebody_enables_it() -> None:
    robot, requests = made(lockstep=True), OperatorRequests()
    said: list[str] = []

    def tell(line: str) -> None:
        said.append(line)
        requests.enable()

    with operator_signals(requests):
        run(robot, [0.1], {10: lambda: os.kill(os.getpid(), signal.SIGHUP)}, tell=tell, operator=Operator(requests))
    assert said == ["hold: the terminal is gone", "enabled"]
    assert len(robot.commands) - 1 == 60, "a hold waits, and is no stop"


def test_a_held_robot_in_lockstep_is_stopped_after_a_while() -> None:
    robot, requests = made(lockstep=True), OperatorRequests()
    said = run(robot, [0.1], {10: lambda: requests.hold("asked to") and None}, operator=Operator(requests))
    assert said == ["hold: asked to", "stopped: held for 5 s: asked to"] and len(robot.commands) - 1 == 10


@pytest.mark.parametrize("by", ["hand", "network"])
def test_an_enabling_refused_while_braking_is_forgotten(by: str) -> None:
    robot, requests, person = made(), OperatorRequests(), Person()
    at: dict[int, Callable[[], Any]] = {20: lambda: requests.hold("asked to"), 22: requests.enable}
    if by == "hand":
        at[24] = lambda: setattr(person, "next", TeleopSignal(stop=True))
    else:
        at[24] = lambda: requests.stop("over the network")

    # While the robot is not enabled nobody chooses: what happens then is counted in looks.
    looks = iter(range(10_000))
    poll = person.poll

    def polling(commanded: FloatArray) -> TeleopSignal:
        at.get(next(looks), lambda: None)()
        return poll(commanded)

    person.poll = polling  # type: ignore[method-assign]
    limits = replace(LIMITS, workspace=None)
    said = run(robot, [1.0], {}, safety=SafetyFilter(MOTIONS, limits), operator=Operator(requests, person))
    assert "cannot enable: the robot is still coming to rest; try again in a moment" in said
    assert "enabled" not in said and said[-1].startswith("stopped: ")
    assert max(moving(robot)) < 40 and robot.stopped


def test_a_stop_wins_over_an_enabling_in_the_same_look() -> None:
    requests, person = OperatorRequests(), Person()
    operator = Operator(requests, person)
    for stop, enable in itertools.product((requests.stop, None), (requests.enable, None)):
        for order in (1, -1):
            for request in [stop, enable][::order]:
                if request is not None:
                    request(*(("",) if request == requests.stop else ()))
            person.next = TeleopSignal(stop=stop is None, enable=enable is None)
            found = operator.look(np.zeros(7, np.float32))
            assert found.stop and not found.enable


def test_a_stop_between_episodes_holds_until_a_later_request() -> None:
    robot, requests, person = made(), OperatorRequests(), Person()
    said: list[str] = []
    config = RunConfig(
        safety=SafetyFilter(MOTIONS, LIMITS),
        operator=Operator(requests, person),
        enable_wait_s=0,
        tell=said.append,
    )
    session = Session(robot, Policy(robot), config, sleep=lambda seconds: None)
    number = requests.stop("between")
    person.next = TeleopSignal(enable=True)
    with pytest.raises(RobotError, match="nobody enabled the robot within 0 s of its stop: between"):
        session.await_enabled()
    assert robot.stopped and requests.outcome(number) == "stopped"
    enabled = requests.enable()
    session.await_enabled()
    assert not robot.stopped and requests.outcome(enabled) == "running" and requests.outcome(number) == "stopped"
    assert said == ["not enabled (between); waiting for a person", "enabled"]


def test_an_episode_does_not_enable_a_robot_that_was_stopped() -> None:
    robot, requests, safety = made(), OperatorRequests(), SafetyFilter(MOTIONS, LIMITS)
    run(robot, [1.0], {5: lambda: requests.stop("enough") and None}, safety=safety, operator=Operator(requests))
    robot.connect()
    sent = len(robot.commands)
    with pytest.raises(RobotError, match="the robot is not enabled: enough; enable it before the next episode"):
        run(robot, [1.0], {}, safety=safety, operator=Operator(requests))
    assert len(robot.commands) == sent


def test_a_stop_during_the_last_step_is_kept() -> None:
    """The episode ends while the robot still brakes."""
    robot, requests, safety = made(), OperatorRequests(), SafetyFilter(MOTIONS, LIMITS)
    numbers: list[int] = []
    run(
        robot,
        [1.0],
        {29: lambda: numbers.append(requests.stop("late"))},
        safety=safety,
        max_steps=30,
        operator=Operator(requests),
    )
    assert safety.state is State.STOPPED and robot.stopped and requests.outcome(numbers[0]) == "stopped"


def test_signals_ask_a_watched_program_to_stop_and_interrupt_any_other() -> None:
    requests = OperatorRequests()
    with pytest.raises(KeyboardInterrupt), operator_signals(requests):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert requests.take() == OperatorInput()
    with pytest.raises(KeyboardInterrupt), operator_signals(requests), watched(requests):
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.take().stop == "stopped by SIGTERM", "first the robot comes to rest"
    requests = OperatorRequests()
    with pytest.raises(KeyboardInterrupt), operator_signals(requests), watched(requests):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    with operator_signals(OperatorRequests()):
        assert signal.getsignal(signal.SIGHUP) != signal.SIG_DFL
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_a_program_that_is_stuck_is_interrupted_by_one_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_module, "_ENDING_S", 0.1)
    requests = OperatorRequests()
    with pytest.raises(KeyboardInterrupt), operator_signals(requests), watched(requests):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_a_hold_while_an_episode_begins_waits_for_a_person() -> None:
    robot, requests = made(), OperatorRequests()
    said: list[str] = []
    policy = Policy(robot)
    policy.action[0] = 0.2
    operator = Operator(requests, Labels(30))
    config = RunConfig(safety=SafetyFilter(MOTIONS, LIMITS), actions=policy, operator=operator, tell=said.append)
    session = Session(robot, policy, config, sleep=lambda seconds: requests.enable() and None)
    begin, hangups = robot.begin, iter([requests.hangup])

    def beginning(seed: int) -> StepResult:
        next(hangups, lambda: 0)()
        return begin(seed)

    robot.begin = beginning  # type: ignore[method-assign]
    assert len(session.run(0, "v1").episode) >= 30
    assert said == [
        "held before the first command: the terminal is gone",
        "not enabled (the terminal is gone); waiting for a person",
        "enabled",
    ]


def test_a_hold_before_the_robot_was_ever_enabled_keeps_its_reason() -> None:
    robot, requests = made(), OperatorRequests()
    config = RunConfig(safety=SafetyFilter(MOTIONS, LIMITS), operator=Operator(requests), enable_wait_s=0)
    session = Session(robot, Policy(robot), config, sleep=lambda seconds: None)
    requests.hangup()
    with pytest.raises(RobotError, match="the terminal is gone"):
        session.await_enabled()


def test_a_stop_by_a_signal_that_ends_the_program_is_an_interruption() -> None:
    requests = OperatorRequests()
    with pytest.raises(KeyboardInterrupt), watched(requests):
        requests.end("SIGTERM")
        raise StoppedError("stopped before the first command: stopped by SIGTERM")
    with pytest.raises(StoppedError), watched(OperatorRequests()):
        raise StoppedError("stopped by hand")
