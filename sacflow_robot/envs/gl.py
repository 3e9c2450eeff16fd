"""Choice of MuJoCo's OpenGL back end. MuJoCo picks one when it is imported, by the environment variable MUJOCO_GL, and
without it one that needs a display; so the package ``envs`` imports this module before anything else."""

from __future__ import annotations

import ctypes.util
import os
import sys
from pathlib import Path


def _pick_backend() -> str:
    """Value for MUJOCO_GL: the user's choice, else what a machine without display can load; empty is GLFW."""
    chosen = os.environ.get("MUJOCO_GL")
    if chosen is not None:
        return chosen.lower()
    if sys.platform != "linux" or has_display():
        return ""
    if Path("/dev/nvidiactl").exists() and ctypes.util.find_library("EGL"):
        return "egl"
    return "osmesa" if ctypes.util.find_library("OSMesa") else ""


def has_display() -> bool:
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


BACKEND = _pick_backend()
if BACKEND:
    os.environ["MUJOCO_GL"] = BACKEND
