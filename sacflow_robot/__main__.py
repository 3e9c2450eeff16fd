"""``python -m sacflow_robot`` and the console script."""

import os
import sys

from sacflow_robot.cli import main


def run() -> None:
    """Run the command line and exit with its status."""
    try:
        try:
            status: int | str | None = main()
        except SystemExit as stopped:  # after a help text
            status = stopped.code
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has left, e.g. head; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)


if __name__ == "__main__":
    run()
