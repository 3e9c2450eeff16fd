"""``python -m sacflow_robot`` and the console script."""

import sys

from sacflow_robot.cli import main


def run() -> None:
    """Run the command line and exit with its status."""
    sys.exit(main())


if __name__ == "__main__":
    run()
