"""robosuite, imported without its warnings: about optional extras that we do not use, and for each controller file."""

from __future__ import annotations

import logging
import os

from sacflow_robot.envs import gl

_previously_disabled = logging.root.manager.disable
logging.disable(logging.WARNING)
import robosuite  # noqa: E402

logging.disable(_previously_disabled)
if not gl.BACKEND:
    os.environ.pop("MUJOCO_GL", None)  # robosuite chose EGL, for all processes started from here
logging.getLogger("robosuite_logs").setLevel(logging.ERROR)

__all__ = ["robosuite"]
