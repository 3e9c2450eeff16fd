"""MuJoCo without OpenGL until something is rendered, and the choice of its OpenGL back end.

On import, MuJoCo loads the library that the environment variable MUJOCO_GL names. With OSMesa's, the process then dies of a
segmentation fault when triton is imported, which comes with torch's builds for CUDA: each has an LLVM of its own, and triton's
must be loaded first. So the package ``envs`` imports this module before anything else.
"""

import contextlib
import ctypes.util
import importlib
import os
import sys
from pathlib import Path
from typing import Any


def _pick_backend() -> str:
    """Value for MUJOCO_GL: the user's choice, else what a machine without display can load; empty is GLFW."""
    chosen = os.environ.get("MUJOCO_GL")
    if chosen is not None:
        return chosen.lower().strip()
    if sys.platform != "linux" or has_display():
        return ""
    if Path("/dev/nvidiactl").exists() and ctypes.util.find_library("EGL"):
        return "egl"
    return "osmesa" if ctypes.util.find_library("OSMesa") else ""


def has_display() -> bool:
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


BACKEND = _pick_backend()


def _backend_module() -> str:
    if BACKEND in ("disable", "disabled", "off", "false", "0"):
        raise RuntimeError("rendering is switched off")
    if sys.platform == "darwin":
        return "mujoco.cgl"
    if sys.platform == "linux" and BACKEND in ("egl", "osmesa"):
        return f"mujoco.{BACKEND}"
    if BACKEND not in ("", "glfw", "glx", "wgl", "enable", "enabled", "on", "true", "1"):
        raise RuntimeError("there is no such back end; valid ones: egl, osmesa, glfw")
    return "mujoco.glfw"


def _make_context(width: int, height: int) -> Any:
    """Stand-in for ``mujoco.GLContext``, which loads the back end at the first call.

    Raises:
        Exception: The back end does not work; each raises errors of its own.
    """
    name = _backend_module()
    with contextlib.suppress(ImportError):
        importlib.import_module("triton")  # before OpenGL, see above
    return importlib.import_module(name).GLContext(width, height)


def _import_mujoco() -> None:
    os.environ["MUJOCO_GL"] = "disabled"
    try:
        importlib.import_module("mujoco")
    except ModuleNotFoundError:  # a robot PC without simulator
        return
    finally:
        if BACKEND:
            os.environ["MUJOCO_GL"] = BACKEND  # for robosuite, and for the processes started from here
        else:
            del os.environ["MUJOCO_GL"]
    for name in ("mujoco", "mujoco.gl_context", "mujoco.rendering.classic.gl_context"):
        module: Any = sys.modules.get(name)
        if module is not None and not hasattr(module, "GLContext"):  # else somebody imported it before us
            module.GLContext = _make_context


_import_mujoco()
