"""Connected clients: one session per client, with its own stream of noise."""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.spec import PolicySpec, RobotSpec

_MOST_SESSIONS = 4096
_MOST_OF_A_CONNECTION = 64
_IDLE_NS = 60_000_000_000
_NAME_LENGTH = 64
_SEED_LIMIT = 2**63
ACTIVE_NS = 5_000_000_000


class Refusal(Exception):
    """A request that is not met, and why.

    Args:
        kind: One of the protocol's kinds of error.
        message: Why, in one line for people; never a client's own words.
        fields: More fields of the answer.
    """

    def __init__(self, kind: str, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.kind, self.fields = kind, fields


@dataclass
class Session:
    """One client, from its ``hello`` on.

    Attributes:
        token: What the client names it by; nobody else can guess it.
        peer: The connection that it was opened over, or taken up again.
        client: What it calls itself.
        seed: Seed of its noise stream.
        policy: The policy it keeps until its next episode; None where it follows every swap at once.
        step: Step of the noise stream that its next request draws from.
        last_id: Highest request id so far; what comes with that or a lower one is a repetition.
        last_ns: When it was last heard from (server's clock, ns).
        requests: Requests answered with actions so far.
        late: Requests refused because the answer would have come too late.
        refused: Requests refused for other reasons.
    """

    token: str
    peer: bytes
    client: str
    seed: int
    policy: OnnxPolicy | None
    last_ns: int
    step: int = 0
    last_id: int = -1
    requests: int = 0
    late: int = 0
    refused: int = 0


class Sessions:
    """All sessions of one server process; a new process knows none of an earlier one's."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._of_peer: dict[bytes, dict[str, Session]] = {}

    def open(self, header: Mapping[str, Any], policy: OnnxPolicy, now_ns: int, peer: bytes = b"") -> Session:
        """The session that a ``hello`` asks for: the one it names, if it is one of these, or a new one.

        A connection has 64 at most; one more takes the place of the one of these that was silent the longest.

        Raises:
            Refusal: The client expects another policy, or there is no room for it.
        """
        expect = header.get("expect")
        if expect is not None:
            different = differing_fields(policy.spec, policy.fingerprint, expect)
            if different:
                names = ", ".join(different)
                served = f"the policy served, for {policy.spec.robot.robot} {policy.spec.robot.task},"
                raise Refusal("mismatch", f"{served} differs from what is expected in: {names}", differs=names)
        token = header.get("session")
        known = self._sessions.get(token) if isinstance(token, str) else None
        if known is not None:
            known.last_ns = now_ns
            self._move(known, peer)
            return known
        swap = header.get("swap", "now")
        if swap not in ("now", "episode"):
            raise Refusal("invalid", "swap is neither 'now' nor 'episode'")
        name, seed = header.get("client"), checked_seed(header.get("seed"))
        self._make_room(peer, now_ns)
        session = Session(
            token=secrets.token_hex(8),
            peer=peer,
            client=_printable(name) if isinstance(name, str) else "",
            seed=seed,
            policy=policy if swap == "episode" else None,
            last_ns=now_ns,
        )
        self._sessions[session.token] = session
        self._of_peer.setdefault(peer, {})[session.token] = session
        return session

    def _make_room(self, peer: bytes, now_ns: int) -> None:
        """Forget a session where there are too many: of this connection; or one that asked for nothing yet, of the connection
        with most of these; or one that has been silent for a minute.
        """
        own = self._of_peer.get(peer, {})
        if len(own) >= _MOST_OF_A_CONNECTION:
            self.close(min(own.values(), key=lambda session: session.last_ns))
        if len(self._sessions) < _MOST_SESSIONS:
            return
        unused = {
            peer: [session for session in theirs.values() if session.requests == 0]
            for peer, theirs in self._of_peer.items()
        }
        candidates = max(unused.values(), key=len) or list(self._sessions.values())
        oldest = min(candidates, key=lambda session: session.last_ns)
        if oldest.requests and now_ns - oldest.last_ns < _IDLE_NS:
            raise Refusal("limit", f"{_MOST_SESSIONS} clients are connected, which is as many as there may be")
        self.close(oldest)

    def _move(self, session: Session, peer: bytes) -> None:
        if session.peer != peer:
            self._let_go(session)
            session.peer = peer
            self._of_peer.setdefault(peer, {})[session.token] = session

    def _let_go(self, session: Session) -> None:
        theirs = self._of_peer[session.peer]
        del theirs[session.token]
        if not theirs:
            del self._of_peer[session.peer]

    def find(self, header: Mapping[str, Any], now_ns: int) -> Session:
        """The session of a request.

        Raises:
            Refusal: The session is not one of this process, or the request's id does not increase.
        """
        token, identifier = header.get("session"), header.get("id")
        session = self._sessions.get(token) if isinstance(token, str) else None
        if session is None:
            raise Refusal("session", "this server does not know that session; it was restarted, or say hello first")
        session.last_ns = now_ns
        if type(identifier) is not int or identifier <= session.last_id:
            raise Refusal(
                "replayed", "request ids must increase within a session; this one was used before or is not an integer"
            )
        session.last_id = identifier
        return session

    def close(self, session: Session) -> None:
        if self._sessions.pop(session.token, None) is not None:
            self._let_go(session)

    def close_all_of(self, peer: bytes) -> None:
        for session in list(self._of_peer.get(peer, {}).values()):
            self.close(session)

    def active(self, now_ns: int) -> list[Session]:
        """Those heard from in the last five seconds."""
        return [session for session in self._sessions.values() if now_ns - session.last_ns <= ACTIVE_NS]


def checked_seed(seed: object) -> int:
    """A client's seed, or a random one for None.

    Raises:
        Refusal: It is not a seed.
    """
    if seed is None:
        return secrets.randbits(63)
    if type(seed) is not int or not 0 <= seed < _SEED_LIMIT:
        raise Refusal("invalid", "a seed or step is a non-negative integer below 2**63")
    return seed


def differing_fields(spec: PolicySpec, fingerprint: str, expect: object) -> list[str]:
    """Names of the fields in which ``expect``, a part of a specification as plain data, differs from ``spec``.

    Raises:
        Refusal: It names a field that does not exist.
    """
    if not isinstance(expect, dict):
        raise Refusal("invalid", "expect is not a map")
    served = {**json.loads(spec.to_json()), "fingerprint": fingerprint}
    robot = served["robot"] = served.pop("arm")
    names = [field.name for field in fields(RobotSpec)]
    different = []
    for name, value in expect.items():
        if name in ("robot", "arm"):  # clients of version 0.1 say arm
            if not isinstance(value, dict) or not set(value) <= set(names):
                raise Refusal("invalid", f"expect.robot is not a map of some of {', '.join(names)}")
            for arrays in (robot["observations"], value.get("observations")):
                for array in arrays if isinstance(arrays, list) else ():
                    if isinstance(array, dict):
                        array.pop("quaternions", None)  # a hint for learners
            different += [f"robot.{field}" for field in names if field in value and robot[field] != value[field]]
        elif name not in served:
            raise Refusal("invalid", f"expect has a field that is not one of {', '.join(served)}")
        elif served[name] != value:
            different.append(name)
    return different


def _printable(name: str) -> str:
    return "".join(c for c in name[:_NAME_LENGTH] if c.isprintable())
