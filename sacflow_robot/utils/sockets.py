"""One server at a time on a Unix socket.

ZeroMQ removes whatever lies at the path of an ``ipc:`` address before it binds: a second server would take the address
over from the first without a word, and a file of that name would be gone.
"""

import errno
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sacflow_robot.errors import UsageError, one_line

_LONGEST_PATH = 107  # bytes that the system accepts as the path of a Unix socket


class AddressClaim:
    """The right to bind an ``ipc:`` address, held by one process until it is released or the process ends.

    Make it before binding, and release it after the socket was closed. A socket file that nobody listens on, left by a
    process that was killed, is removed. Addresses of other transports, and abstract names (``ipc://@name``), need no
    claim: the system refuses a second server there; for them nothing is done.

    A lock file stays beside the socket; removing it could let in two servers.

    Args:
        address: ZeroMQ address, e.g. ``ipc:///run/robot/policy.sock``.

    Raises:
        UsageError: Somebody listens there, or something else than a socket has that name, or the folder cannot be
            written.
    """

    def __init__(self, address: str) -> None:
        self._lock: FileLock | None = None
        transport, _, name = address.partition("://")
        if transport != "ipc" or name.startswith("@") or name in ("", "*"):
            return
        if len(os.fsencode(name)) > _LONGEST_PATH:
            raise UsageError(f"cannot listen at {address}: the path is longer than {_LONGEST_PATH} bytes; shorten it")
        path = Path(name)
        if not path.parent.is_dir():
            raise UsageError(f"cannot listen at {address}: there is no folder {path.parent}; make it first")
        # Any thread may release it.
        lock = FileLock(path.with_name(f"{path.name}.lock"), timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise UsageError(_in_use(address)) from None
        except (OSError, NotImplementedError, ValueError) as error:
            raise UsageError(f"cannot listen at {address}: {one_line(error)}; it needs a folder to write to") from None
        try:
            _remove_if_stale(path, address)
        except BaseException:
            lock.release()
            raise
        self._lock, self._path, self._address = lock, path, address

    def release(self) -> None:
        """Let others have the address; the socket file, which ZeroMQ may leave behind, is removed."""
        if self._lock is not None:
            with suppress(UsageError):
                _remove_if_stale(self._path, self._address)
            self._lock.release()
            self._lock = None


def _remove_if_stale(path: Path, address: str) -> None:
    """Remove a socket file on which nobody listens, with the lock held."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"cannot listen at {address}: {one_line(error)}") from None
    if not stat.S_ISSOCK(mode):
        raise UsageError(
            f"cannot listen at {address}: {path} exists and is not a socket; remove it, or give another path"
        )
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # a server whose queue is full is a server all the same
        refused = probe.connect_ex(str(path))
    if refused not in (errno.ECONNREFUSED, errno.ENOENT):
        raise UsageError(_in_use(address))
    try:
        with suppress(FileNotFoundError):
            path.unlink()
    except OSError as error:
        raise UsageError(f"cannot remove {path}, which a server that is gone has left: {one_line(error)}") from None


def _in_use(address: str) -> str:
    return f"cannot listen at {address}: another process serves there; stop it, or give another address"
