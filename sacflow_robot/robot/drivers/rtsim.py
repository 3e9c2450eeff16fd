"""The simulated robot on its own time, as a driver: in a process of its own by the machine's clock, or by a virtual one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import msgpack
import numpy as np
import zmq

from sacflow_robot.envs.tasks import get_task
from sacflow_robot.episode import StepResult
from sacflow_robot.errors import RobotError, StoppedError, one_line
from sacflow_robot.interfaces import Clock
from sacflow_robot.robot.drivers.clock import MonotonicClock
from sacflow_robot.robot.drivers.rtsim_options import RtsimOptions
from sacflow_robot.spec import Engine, FloatArray, RobotSpec

if TYPE_CHECKING:
    from sacflow_robot.robot.drivers.plant import Plant

_START_S, _ANSWER_S = 180.0, 10.0  # on a fresh machine it compiles first
_PHASE = 4  # a loop looks this part of a tick after observations arrive, so that none comes just too late


class VirtualClock:
    """Time that passes only in sleep; what happens meanwhile happens then. A ``Clock``."""

    def __init__(self) -> None:
        self.time_ns = 1_000_000_000
        self.plant: Plant | None = None

    def now_ns(self) -> int:
        return self.time_ns

    def sleep_until(self, time_ns: int) -> None:
        if time_ns > self.time_ns:
            if self.plant is not None:
                self.plant.advance(time_ns)
            self.time_ns = time_ns


class _Robot:
    """A robot by either clock."""

    lockstep = False

    def __init__(self, task: str, options: RtsimOptions, engine: Engine, clock: Clock) -> None:
        self.task = task
        self.options = options
        self.engine = engine
        self.clock = clock
        self._stopped = True
        self._newest: StepResult | None = None

    @property
    def spec(self) -> RobotSpec:
        return self.options.robot(get_task(self.task).robot)

    def observe(self) -> StepResult:
        self._receive()
        if self._newest is None:
            raise RobotError("no episode has begun; begin one first")
        if not (self.options.clock_offset_ms or self.options.clock_drift_ppm):
            return self._newest
        return replace(self._newest, time_ns=self.options.stamp_ns(self._newest.time_ns or 0))

    def _receive(self) -> None:
        raise NotImplementedError

    def _check_going(self) -> None:
        if self._stopped:
            raise StoppedError("the robot has been stopped, or never connected; connect it")

    def _await_first(self) -> StepResult:
        """The first observation of an episode, and the loop's place within the robot's cycle."""
        give_up_ns = self.clock.now_ns() + round(_ANSWER_S * 1e9)
        while self._newest is None:
            if self.clock.now_ns() > give_up_ns:
                raise RobotError(f"rtsim:{self.task} sent no observation within {_ANSWER_S:g} s; is its network down?")
            self.clock.sleep_until(self.clock.now_ns() + 1_000_000)
            self._receive()
        captured_ns, tick_ns = self._newest.time_ns or 0, self.options.tick_ns
        due_ns = captured_ns + round(self.options.obs_delay_ms * 1e6) + tick_ns // _PHASE
        ticks = max(0, -((due_ns - self.clock.now_ns()) // tick_ns))
        self.clock.sleep_until(due_ns + ticks * tick_ns)
        return self.observe()


class VirtualRobot(_Robot):
    """``rtsim:TASK?clock=virtual``: the same events in the same order, without waiting for them."""

    clock: VirtualClock

    def __init__(self, task: str, options: RtsimOptions | None = None, engine: Engine = "compiled") -> None:
        from sacflow_robot.robot.drivers.plant import Plant

        super().__init__(task, options or RtsimOptions(), engine, VirtualClock())
        self.plant = Plant(task, self.options, engine)

    def connect(self) -> None:
        self.plant.flush()
        self._stopped = False

    def begin(self, seed: int) -> StepResult:
        self._check_going()
        self._newest = None
        self.plant.begin(seed, self.clock.now_ns())
        self.clock.plant = self.plant
        return self._await_first()

    def command(self, action: FloatArray, valid_until_ns: int) -> None:
        self._check_going()
        self.plant.send(self.spec.check_action(action), valid_until_ns, self.clock.now_ns())

    def hold(self) -> None:
        self.plant.flush()

    def stop(self) -> None:
        self._stopped = True
        self.plant.flush(gripper=True)

    def network(self, down: bool) -> None:
        self.plant.network(down)

    def close(self) -> None:
        self.clock.plant = None
        self.plant.arrived = None
        self._stopped = True
        self.plant.env.close()

    def _receive(self) -> None:
        self._newest = self.plant.arrived


class ProcessRobot(_Robot):
    """``rtsim:TASK``: the robot moves in a process of its own, whether or not a command arrives."""

    def __init__(self, task: str, options: RtsimOptions | None = None, engine: Engine = "compiled") -> None:
        super().__init__(task, options or RtsimOptions(), engine, MonotonicClock())
        get_task(task)
        self._process: subprocess.Popen[bytes] | None = None
        self._context: zmq.Context[Any] | None = None
        self._episode, self._failure = 0, ""
        self.applied: list[tuple[int, int]] = []

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def connect(self) -> None:
        self._stopped = False  # a stop that comes from here on is not undone by connecting
        if self._process is None or self._process.poll() is not None:
            self._start()
        self._failure = ""
        self._check_going()
        self._send({"do": "connect"})

    def begin(self, seed: int) -> StepResult:
        self._check_going()
        self._newest = None
        self._episode += 1
        self._send({"do": "begin", "seed": seed, "episode": self._episode})
        return self._await_first()

    def command(self, action: FloatArray, valid_until_ns: int) -> None:
        self._check_going()
        given = self.spec.check_action(action)
        self._send({"do": "command", "action": given.tobytes(), "until": valid_until_ns, "at": self.clock.now_ns()})

    def hold(self) -> None:
        self._tell("hold")

    def stop(self) -> None:
        """Stop; the robot's process takes nothing more, not even what is on its way, until it is connected again."""
        self._stopped = True
        self._tell("stop")

    def _tell(self, what: str) -> None:
        """Say what holds in any state: a robot whose process is gone has nothing left that could move."""
        with contextlib.suppress(RobotError):
            self._send({"do": what})

    def network(self, down: bool) -> None:
        """Have the network fail, or come back."""
        self._send({"do": "network", "down": down})

    def close(self) -> None:
        process, self._process, self._newest = self._process, None, None
        if process is not None:
            with contextlib.suppress(RobotError, zmq.ZMQError):
                self._socket.send(msgpack.packb({"do": "end"}), zmq.NOBLOCK)
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None

    def _start(self) -> None:
        self.close()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        numbers = {name: value for name, value in vars(self.options).items() if name != "model"}
        query = urlencode({**numbers, **({"model": self.options.model.to_json()} if self.options.model else {})})
        command = [
            sys.executable,
            "-P",  # not what the working folder has by that name
            "-m",
            "sacflow_robot.robot.drivers.plant",
            self.task,
            self.engine,
            str(port),
            query,
        ]
        # In a session of its own: a Ctrl-C meant for the loop must not stop a robot in the middle of a motion.
        self._process = subprocess.Popen(
            [*command, str(os.getpid())], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        until = time.monotonic() + _START_S
        while not self._socket.poll(100):
            if self._process.poll() is not None or time.monotonic() > until:
                self.close()
                raise RobotError(f"rtsim:{self.task} did not start; what it said is above")
        self._socket.recv()

    def _check_process(self) -> None:
        if self._process is None:
            raise RobotError(f"rtsim:{self.task} is not connected; connect it")
        status = self._process.poll()
        if status is not None:
            raise RobotError(f"rtsim:{self.task} does not run; connect it (its process ended with status {status})")

    def _send(self, message: dict[str, Any]) -> None:
        self._check_process()
        try:
            self._socket.send(msgpack.packb(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise RobotError(f"rtsim:{self.task} does not answer: {one_line(error)}") from None

    def _receive(self) -> None:
        """Take in what has arrived; only the newest observation counts."""
        self._check_process()
        message = None
        with contextlib.suppress(zmq.Again):
            while True:
                heard = msgpack.unpackb(self._socket.recv(zmq.NOBLOCK))
                self._failure = self._failure or heard.get("failure", "")
                message = message if "failure" in heard else heard
        failure, self._failure = self._failure, ""
        if failure:
            raise RobotError(f"rtsim:{self.task} failed: {failure}")
        if message is None or message["episode"] != self._episode:
            return
        arrays = {
            a.key: np.frombuffer(message["seen"][a.key], a.dtype).reshape(a.shape).copy()
            for a in self.spec.observations
        }
        measured = np.frombuffer(message["measured"], np.float32) if message["measured"] else None
        self.applied = [tuple(pair) for pair in message["applied"]]
        self._newest = StepResult(
            arrays, message["reward"], message["terminated"], message["truncated"], measured=measured,
            time_ns=message["time_ns"],
        )  # fmt: skip
