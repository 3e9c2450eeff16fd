"""Everything this package raises on purpose.

SacflowError                     exit status 1: the run failed
├── UsageError                   exit status 2: the call itself is wrong
│   └── UnknownNameError         a name that is not in its table; lists the valid ones
├── DataError                    a file or an episode that cannot be read or does not fit
│   └── LogWriteError            an episode could not be appended; what was logged before is intact
├── InvalidValueError            a NaN, an infinity or a wrong shape in an observation or an action
├── SpecMismatchError            a policy and a robot, or a policy and a data set, do not fit together
├── ExportError                  a policy could not be exported, or the export differs from the original
├── PolicyFileError              an ONNX policy that cannot be read or fails its own golden vectors
├── WireError                    a message that breaks the wire protocol
├── RobotError                   a robot that cannot be reached, is not ready, or does not answer any more
│   ├── RobotFaultError            a robot that reports an error, a reflex or a user stop, or has stopped by itself
│   ├── StaleStateError           a robot whose last state is too old to act on
│   └── StoppedError             a robot that was stopped and takes no command until it is connected and enabled again
└── ServerError                  the server is unreachable, or answered with an error
    ├── DeadlineExceeded                the answer would have come after the request's deadline; nothing was computed
    ├── RefusedError             the server refused the request, or this client
    ├── ConnectionLost          the server does not answer any more
    └── ServerRestartedError     the server does not know this session; what was asked before is forgotten

Each message is one line: what was wrong, what was expected, what to do.
"""

import difflib
from collections.abc import Iterable


class SacflowError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_status = 1


class UsageError(SacflowError):
    """The command or the call is wrong as it stands; running it again will not help."""

    exit_status = 2


class UnknownNameError(UsageError):
    """A name that is not in its table.

    Args:
        kind: What the name should have named, e.g. ``"task"``.
        name: The name as given.
        valid: The names that would have worked; the one that is nearest to the name given is proposed.
        also: In words, what would have worked beside them.
    """

    def __init__(self, kind: str, name: str, valid: Iterable[str], also: str = "") -> None:
        names = sorted(valid)
        message = f"unknown {kind} {name!r}; valid names: {', '.join(names)}"
        message += f", {also}" if also else ""
        plain = {known.removesuffix(":...").lower(): known for known in names}
        nearest = difflib.get_close_matches(name.lower(), plain, n=1)
        super().__init__(f"{message}; did you mean {plain[nearest[0]]!r}?" if nearest else message)


class DataError(SacflowError):
    """A file or an episode that cannot be read, or does not fit the task."""


class LogWriteError(DataError):
    """An episode could not be appended; the episodes logged before it are intact."""


class InvalidValueError(SacflowError):
    """A NaN, an infinity or a wrong shape in an observation or an action."""


class SpecMismatchError(SacflowError):
    """Two sides that do not fit together; the message names every field that differs."""


class ExportError(SacflowError):
    """A policy could not be exported, or the exported graph differs from the original."""


class PolicyFileError(SacflowError):
    """An ONNX policy file that cannot be read or fails its own golden vectors."""


class WireError(SacflowError):
    """A message that breaks the wire protocol."""


class RobotError(SacflowError):
    """A robot that cannot be reached, is not ready, or does not answer any more."""


class RobotFaultError(RobotError):
    """A robot that reports an error, a reflex or a user stop, or has stopped by itself."""


class StaleStateError(RobotError):
    """A robot whose last state, or what comes with it, is too old to act on."""


class StoppedError(RobotError):
    """A robot that was stopped; it takes no command until it is connected and enabled again."""


class ServerError(SacflowError):
    """The policy server is unreachable, or answered with an error."""


class DeadlineExceeded(ServerError):
    """The answer would have come after the request's deadline; the next request may be in time again."""


class RefusedError(ServerError):
    """The server refused the request, or refuses this client."""


class ConnectionLost(ServerError):
    """The server does not answer any more; the next call tries to reach it again."""


class ServerRestartedError(ServerError):
    """The server has been restarted, and knows nothing of what was asked before; the next call starts a new session."""


def reason_of(error: Exception) -> BaseException:
    """The operating system's error that an error was raised for, else the error itself."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found or error


def one_line(error: BaseException, limit: int = 200) -> str:
    """Another library's message on one line, for use inside ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."
