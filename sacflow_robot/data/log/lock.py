"""The exclusive right to write to an episode log, by whatever name the log is reached.

Where a lock cannot be made OSError is raised.
"""

import errno
import fcntl
import os
import time
from pathlib import Path

from filelock import FileLock, Timeout

_WAIT_S = 0.02
# What file systems say that cannot lock a folder, such as NFS.
_UNSUPPORTED = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class LogLock:
    """Two locks of the operating system, which end with the process at the latest.

    The first is a file beside the folder that the path leads to, symbolic links resolved; it is there before the log is.
    The second is on the folder itself, which a bind mount shows under another name.
    """

    def __init__(self, log: Path) -> None:
        self.folder = Path(os.path.realpath(log))
        # The lock file stays: were it removed, two writers could hold locks on two files of that name.
        self._beside = FileLock(self.folder.with_name(f".{self.folder.name}.lock"))
        self._descriptor = -1

    def acquire(self, patience_s: float = 0.0) -> bool:
        """Take the lock; returns whether that worked within that time (s)."""
        until = time.monotonic() + patience_s
        try:
            self._beside.acquire(timeout=patience_s, poll_interval=_WAIT_S)
        except Timeout:
            return False
        while not self.lock_folder():
            if time.monotonic() >= until:
                self.release()
                return False
            time.sleep(_WAIT_S)
        return True

    def lock_folder(self) -> bool:
        """Lock the folder itself, once it is there; returns False where another process has."""
        try:
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return True  # not there yet, or no folder
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            return error.errno in _UNSUPPORTED
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Let others write."""
        if self._descriptor >= 0:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # also where a child process holds a copy
            os.close(self._descriptor)
            self._descriptor = -1
        self._beside.release()
