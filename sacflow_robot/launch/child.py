"""Run as a script between the launcher and a program: it sets up the process, then becomes the program.

Usage: python -I -S child.py LAUNCHER_PID PROGRAM [ARGUMENT ...]

On Linux the kernel sends the program a SIGTERM when the launcher dies, however it dies. This is no ``preexec_fn``
because that runs Python between fork and exec of a process with threads, which may hang.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    launcher, *command = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A launcher in the background of a script ignores SIGINT, and so would we.
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(launcher):  # it died before we asked to be told
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
