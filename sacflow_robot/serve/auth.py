"""Access to a server: CURVE keys, a folder of the clients' public keys, and what may be bound without them.

Keys are pairs of files as ``zmq.auth`` writes them: ``NAME.key`` is public, ``NAME.key_secret`` stays with its owner.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from sacflow_robot.errors import DataError, UsageError

_LAST_PORT = 65535
_LOOK_S = 0.25  # between looks at the files of clients' keys


@dataclass(frozen=True)
class Security:
    """Keys of a server and of the clients that may connect.

    Attributes:
        key: The server's secret key file; without one, connections are neither encrypted nor checked.
        clients: Folder of the public key files of those who may connect. A key that is added counts at once, and one that is
            removed ends what its client may do within a quarter of a second.
        insecure: Whether other computers may connect without keys.
    """

    key: Path | None = None
    clients: Path | None = None
    insecure: bool = False

    def guard(self, context: zmq.Context[Any], socket: zmq.Socket[bytes]) -> Gate:
        """Set the socket up before it is bound.

        Raises:
            UsageError: There is a key without clients, or there are clients without a key.
            DataError: The key cannot be read, or the folder does not exist.
        """
        if (self.key is None) != (self.clients is None):
            raise UsageError("--key and --clients go together: the server's secret key, and a folder of clients' keys")
        if self.key is None or self.clients is None:
            return Gate()
        public, secret = load_secret(self.key)
        if not self.clients.is_dir():
            raise DataError(f"no folder of clients' public keys at {self.clients}; put their .key files there")
        from zmq.auth.thread import ThreadAuthenticator

        authenticator = ThreadAuthenticator(context)
        authenticator.start()
        authenticator.configure_curve_callback(domain="*", credentials_provider=_AllowList(self.clients))
        socket.curve_publickey, socket.curve_secretkey, socket.curve_server = public, secret, True
        return Gate(authenticator, _AllowList(self.clients))


@dataclass
class Gate:
    """Checks connections and the senders of frames until closed.

    Attributes:
        authenticator: pyzmq's authenticator; None without keys.
        allowed: The keys allowed now; None without keys. The authenticator, which has a thread of its own, does not share them.
    """

    authenticator: Any = None
    allowed: _AllowList | None = None

    def allows(self, frame: zmq.Frame) -> bool:
        if self.allowed is None:
            return True
        try:
            user = frame.get("User-Id")
        except zmq.ZMQError:
            return False
        return isinstance(user, str) and user.encode() in self.allowed

    def close(self) -> None:
        """Stop checking; nobody gets in any more."""
        if self.authenticator is not None:
            self.authenticator.stop()
            self.authenticator = None


class _AllowList:
    """The public keys (Z85) in a folder, read again when its files have changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[tuple[str, int, int, int]] | None = None
        self._keys: frozenset[bytes] = frozenset()
        self._looked_s = -math.inf

    def callback(self, domain: str, key: bytes) -> bool:
        """True if a new connection's key counts; by this name for pyzmq's authenticator."""
        self._update()
        return key in self._keys

    def __contains__(self, key: bytes) -> bool:
        """True if a key counts: one that was added does at once, and one that was removed for a quarter of a second more."""
        if key not in self._keys or time.monotonic() - self._looked_s > _LOOK_S:
            self._update()
        return key in self._keys

    def _update(self) -> None:
        self._looked_s, files = time.monotonic(), self._look()
        if files != self._files:
            self._files, self._keys = files, frozenset(self._read(name for name, *_ in files))

    def _look(self) -> list[tuple[str, int, int, int]]:
        files = []
        with contextlib.suppress(OSError), os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith(".key"):
                    with contextlib.suppress(OSError):
                        status = entry.stat()
                        files.append((entry.name, status.st_mtime_ns, status.st_size, status.st_ino))
        return sorted(files)

    def _read(self, names: Iterable[str]) -> Iterator[bytes]:
        for name in names:
            with contextlib.suppress(DataError):
                yield load_keys(self._folder / name)[0]


def new_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a pair of keys; returns the public and the secret file, the latter readable by its owner alone.

    Raises:
        UsageError: The name is not a file name, or keys of that name exist.
        DataError: They cannot be written.
    """
    import zmq.auth

    if not name or name != Path(name).name or name.startswith("."):
        raise UsageError(f"{name!r} cannot name a file; give a name such as 'robot-1'")
    public, secret = folder / f"{name}.key", folder / f"{name}.key_secret"
    if public.exists() or secret.exists():
        raise UsageError(f"there are keys named {name!r} in {folder}; give another name")
    before = os.umask(0o077)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        zmq.auth.create_certificates(folder, name)
    except OSError as error:
        raise DataError(f"cannot write keys to {folder}: {error.strerror or error}") from None
    finally:
        os.umask(before)
    public.chmod(0o644)
    return public, secret


def load_secret(path: Path) -> tuple[bytes, bytes]:
    """The public and secret key in a file, in Z85.

    Raises:
        DataError: The file cannot be read, or has no secret key.
    """
    public, secret = load_keys(path)
    if secret is None:
        raise DataError(f"{path} holds no secret key; give the .key_secret file")
    return public, secret


def load_keys(path: Path) -> tuple[bytes, bytes | None]:
    """The public key in a file, in Z85, and the secret one if it is there.

    Raises:
        DataError: The file cannot be read, or has no key.
    """
    import zmq.auth

    try:
        public, secret = zmq.auth.load_certificate(path)
        for key in (public, secret):
            if key is not None and len(zmq.utils.z85.decode(key)) != 32:
                raise ValueError("a key has 32 bytes")
    except (OSError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"no key can be read from {path} ({error}); make one with 'sacflow-robot keys new'") from None
    return public, secret


def is_local(place: str) -> bool:
    """True if ``host:port`` can be reached from this computer alone."""
    host = place.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_bind(bind: str, security: Security) -> None:
    """Refuse what ZeroMQ would accept to somebody's harm: a port that wraps round, or one that is open to a network without
    keys.
    """
    transport, _, place = bind.partition("://")
    if transport == "tcp":
        port = place.rpartition(":")[2]
        if port != "*" and not _is_port(port):
            raise UsageError(
                f"cannot bind {bind!r}: {port!r} is not a port; give e.g. tcp://127.0.0.1:5555 with --bind"
            )
        if security.key is None:
            check_open(place, security.insecure, "--key and --clients, see 'sacflow-robot keys new --help'")


def check_open(place: str, insecure: bool, remedy: str) -> None:
    """Refuse an unprotected ``host:port`` that other computers reach."""
    if not insecure and not is_local(place):
        raise UsageError(
            f"{place} can be reached from other computers, by anyone; protect it with {remedy}, or say --insecure"
        )


def split_place(place: str) -> tuple[str, int]:
    """Host and port of ``host:port``.

    Raises:
        UsageError: It does not have that form.
    """
    host, _, port = place.rpartition(":")
    if not host or not _is_port(port):
        raise UsageError(f"{place!r} is not host:port; give e.g. 127.0.0.1:8000")
    return host.strip("[]"), int(port)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text[:9]) <= _LAST_PORT
