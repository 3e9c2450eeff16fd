"""Policy server: one loop on a ZeroMQ ROUTER socket.

A round of the loop takes the requests that wait, evaluates those for actions together, and then answers others, as long as
nothing new has come. A request that comes alone is evaluated alone, at once. ROUTER takes from its clients in turn, and what
has to wait is answered in turn, so that one that asks a lot gets no more than its share; answers that a client does not take
are dropped, so that it holds up nobody.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import zmq

from sacflow_robot.errors import InvalidValueError, UsageError
from sacflow_robot.export.metadata import NOISE
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.serve import protocol as wire
from sacflow_robot.serve.auth import Gate, Security, check_bind
from sacflow_robot.serve.batching import Backlog, Pace, Request, TimeBudget, checked, join, too_late, warm_up
from sacflow_robot.serve.handlers import Answers, Operations
from sacflow_robot.serve.metrics import Meters
from sacflow_robot.serve.session import Refusal, Session, Sessions, checked_seed
from sacflow_robot.spec import FloatArray, all_finite
from sacflow_robot.utils.seeding import chunk_noise
from sacflow_robot.utils.sockets import AddressClaim

_POLL_MS = 100
_MESSAGES_A_ROUND = 256
_OTHERS_A_ROUND = 16  # messages that are not for actions, put off while those for actions are looked for
_OTHERS_NS = 20_000_000  # longest time for these at once, however many wait
_UPKEEP_NS = 1_000_000_000
_DRAIN_S = 0.3  # for what is still on its way; clients that ask on are told by the lost connection
_RECENT = 64
_NO_STOP_SERVER = (
    b"this is a policy server, which moves and stops no robot; a robot's stop listens where run --estop said"
)


class PolicyServer:
    """Serves one policy at a time.

    Args:
        policy: The policy, self-tested by its loading; it is warmed up before anybody can connect.
        bind: Address, e.g. ``tcp://127.0.0.1:5555``; port 0 or ``*`` takes a free one, see ``address``.
        max_batch: Rows evaluated together, and rows of one request, at most.
        heartbeat_s: Time between heartbeats that clients are asked for; a connection is dead after two without one.
        security: Who may connect; by default anyone on this computer.

    Raises:
        UsageError: The address is malformed, in use, or open to others without keys.
    """

    def __init__(
        self,
        policy: OnnxPolicy,
        bind: str,
        *,
        max_batch: int = 64,
        heartbeat_s: float = 1.0,
        security: Security | None = None,
        meters: Meters | None = None,
    ) -> None:
        security = security or Security()
        check_bind(bind, security)
        warm_up(policy, max_batch)
        self.policy, self._max_batch = policy, max_batch
        self.server_id = secrets.token_hex(8)
        self.sessions, self.meters = Sessions(), meters or Meters()
        self.recent: deque[tuple[dict[str, FloatArray], FloatArray]] = deque(maxlen=_RECENT)
        self._offered: OnnxPolicy | None = None
        self._swap = threading.Lock()
        self._pace, self._backlog, self._budget = Pace(), Backlog(), TimeBudget()
        self._next_upkeep_ns = 0
        self._claim = AddressClaim(bind)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._gate = Gate()
        try:
            wire.configure_router(self._socket, _POLL_MS, bind)
            self._gate = security.guard(self._context, self._socket)
            self._socket.bind(bind)
        except BaseException as error:
            self._gate.close()
            self._context.destroy(linger=0)
            self._claim.release()
            if not isinstance(error, zmq.ZMQError):
                raise
            reason = "it is in use" if error.errno == zmq.EADDRINUSE else str(error)
            raise UsageError(f"cannot bind {bind}: {reason}; give another address with --bind") from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._answers = Answers(self._socket, self.meters)
        self._operations = Operations(self, heartbeat_s, max_batch)
        self.meters.serves(policy.version, policy.spec.velocity)

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    @property
    def newest(self) -> OnnxPolicy:
        """The policy served from the next round on."""
        return self._offered or self.policy

    @property
    def requests(self) -> int:
        """Requests answered with actions so far."""
        return self.meters.counts["requests"]

    @np.errstate(over="ignore")  # a float64 too large for float32 becomes infinite, and is refused
    def run(self) -> None:
        """Answer requests until :meth:`stop` is called, then those that have come by then."""
        while not self._stop.is_set():
            self._round()
        self._drain()

    def _round(self) -> None:
        """Take what waits and answer it; wait a while for something to come where there is nothing."""
        try:
            waiting = self._collect(self._next(wire.NOBLOCK if self._backlog else 0))
        except zmq.Again:
            waiting = []
        if len(waiting) == 1:
            self._infer(waiting)
        elif waiting:
            for policy in {id(request.policy): request.policy for request in waiting}.values():
                self._infer([request for request in waiting if request.policy is policy])
        self._work_off()
        self._upkeep(time.monotonic_ns())

    def _next(self, flags: int = 0) -> list[Any]:
        """The next message, its connection and its header as bytes; empty where its client may not ask any more."""
        frames = wire.receive_frames(self._socket, flags)
        allowed = self._gate.allows(frames[0])
        frames = wire.as_heads(frames, 2)
        if allowed:
            return frames
        self.sessions.close_all_of(frames[0])
        self._answers.refuse(
            frames[0], None, None, Refusal("key", "this client's key is not on the server's list any more")
        )
        return []

    def _collect(self, frames: list[Any]) -> list[Request]:
        """The requests for actions among the messages that wait, these frames first; others are put off."""
        waiting, rows, others = [], 0, 0
        for _ in range(_MESSAGES_A_ROUND):
            if not frames or self._may_wait(frames):
                if frames and not self._backlog.put(frames):
                    too_many = "too many requests of this connection wait already; read their answers first"
                    self._answers.refuse(frames[0], None, None, Refusal("limit", too_many))
                others += 1
            else:
                request = self._accept(frames)
                if request is not None:
                    waiting.append(request)
                    rows += request.rows
            if rows >= self._max_batch or others >= _OTHERS_A_ROUND or not wire.has_come(self._socket):
                break
            frames = self._next()
        return waiting

    def _may_wait(self, frames: list[Any]) -> bool:
        """True if a message brings no arrays, or is behind such a one, or its connection has had more than its share."""
        peer = frames[0]
        return len(frames) <= 2 or peer in self._backlog or self._budget.exceeded(peer, time.monotonic_ns())

    def _work_off(self) -> None:
        """Answer one message that was put off, if any, and more as long as nothing else has come."""
        until = time.monotonic_ns() + _OTHERS_NS
        while self._backlog:
            request = self._accept(self._backlog.take())
            if request is not None:
                self._infer([request])
            if wire.has_come(self._socket) or time.monotonic_ns() > until:
                return

    def _accept(self, frames: list[Any]) -> Request | None:
        """The inference request in these frames; None if they held something else, which is then answered."""
        received_ns = time.monotonic_ns()
        peer, identifier, session = frames[0], None, None
        if frames[1] in wire.STOP_REQUESTS:
            self._answers.send_frames(peer, [wire.STOP_REFUSED, _NO_STOP_SERVER])
            return None
        try:
            header = wire.decode_header(frames[1:])
            if type(header.get("id")) is int:
                identifier = header["id"]
            operation = header.get("op")
            if operation == "infer":
                session = self.sessions.find(header, received_ns)
                return self._admit(peer, header, frames, session, received_ns)
            answer = self._operations.answer(operation, header, peer)
            if operation == "bye":
                self._answers.polite.append(peer)
            self._answers.send(peer, {"id": identifier, "ok": True, **answer, "server_ns": time.monotonic_ns()})
        except Exception as error:  # whatever one client sends, the others are served on
            self._answers.refuse(peer, identifier, session, error)
        now_ns = time.monotonic_ns()
        self._budget.charge(peer, now_ns - received_ns, now_ns)
        return None

    def _admit(
        self, peer: bytes, header: dict[str, Any], frames: list[Any], session: Session, received_ns: int
    ) -> Request:
        """Check an inference request; raises Refusal, WireError or InvalidValueError where it cannot be met."""
        deadline_ns, policy = header.get("deadline_ns"), session.policy or self.policy
        if deadline_ns is not None and type(deadline_ns) is not int:
            raise Refusal("invalid", "deadline_ns is not an integer")
        if deadline_ns is not None and received_ns > deadline_ns:
            raise too_late()
        seed = step = None
        _, arrays = wire.decode_arrays(header, frames[1:])
        first = arrays.get(policy.spec.robot.observations[0].key)
        rows = max(1, len(first) if first is not None and first.ndim else 0)
        if rows > self._max_batch:
            raise Refusal("limit", f"{rows} rows, at most {self._max_batch} are answered at once")
        noise = arrays.get(NOISE)
        if noise is None:
            if header.get("seed") is not None:
                seed, step = checked_seed(header["seed"]), checked_seed(header.get("step", 0))
            else:
                seed, step = session.seed, session.step
                session.step += 1
            noise = chunk_noise((rows, *policy.spec.noise_shape), seed, step)
        inputs = checked(policy, arrays, noise)
        return Request(peer, header["id"], session, policy, inputs, rows, seed, step, deadline_ns, received_ns)

    def _infer(self, requests: Sequence[Request]) -> None:
        """Evaluate requests for one policy together, and answer them."""
        policy, began_ns = requests[0].policy, time.monotonic_ns()
        batch, late = self._pace.split(requests, began_ns)
        for request in late:
            self._answers.refuse(request.peer, request.identifier, request.session, too_late())
        if not batch:
            return
        try:
            inputs = join(batch)
            actions = policy.run(inputs)
        except Exception as error:  # as above: the loop goes on
            for request in batch:
                self._answers.refuse(request.peer, request.identifier, request.session, error)
            return
        infer_ns = time.monotonic_ns() - began_ns
        answered, start = [], 0
        for request in batch:
            part = actions if len(batch) == 1 else actions[start : start + request.rows]
            start += request.rows
            if not all_finite(part):
                nonsense = InvalidValueError("the policy put out NaN or infinity; its actions were withheld")
                self._answers.refuse(request.peer, request.identifier, request.session, nonsense)
                continue
            ended_ns = time.monotonic_ns()
            times = began_ns - request.received_ns, infer_ns, ended_ns - request.received_ns
            answered.append(times)
            self._answers.actions(request, part, len(actions), times, ended_ns)
            request.session.requests += 1
        wire.give_way()  # to the thread that writes the answers out; nobody waits for what follows
        self._pace.learn(start, infer_ns)
        self.recent.append((inputs, actions))
        self.meters.evaluated(start, answered)

    def offer(self, policy: OnnxPolicy) -> None:
        """Serve this policy from the next round on, once it is warm; may be called from any thread.

        Raises:
            PolicyFileError: Its graph cannot be evaluated; the policy before it is served on.
        """
        warm_up(policy, self._max_batch)
        with self._swap:
            self._offered = policy

    def _upkeep(self, now_ns: int) -> None:
        if self._offered is not None:
            with self._swap:
                self.policy, self._offered = self._offered, None
            self.meters.serves(self.policy.version, self.policy.spec.velocity)
        if now_ns >= self._next_upkeep_ns:
            self._next_upkeep_ns = now_ns + _UPKEEP_NS
            self._answers.count_dropped()
            self.meters.clients(len(self.sessions.active(now_ns)))

    def _drain(self) -> None:
        """Open no new sessions, and answer what has come. (To unbind would end the connections that there are.)"""
        deadline = time.monotonic() + _DRAIN_S
        while time.monotonic() < deadline:
            self._round()

    def start(self) -> PolicyServer:
        self._thread = threading.Thread(target=self.run, name="policy-server", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ask :meth:`run` to return; may be called from a signal handler."""
        self._stop.set()

    def close(self) -> None:
        self.stop()
        if self._thread is not None:
            self._thread.join()
        self._gate.close()
        self._context.destroy(linger=500)
        self.meters.close()
        self._claim.release()

    def __enter__(self) -> PolicyServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
