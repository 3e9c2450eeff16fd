"""Import of robosuite without its warnings about optional extras and controller files, and with a folder for Numba's cache."""

import importlib.util
import logging
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numba

from sacflow_robot.envs import gl
from sacflow_robot.utils.caches import can_write, compiler_cache


def _choose_numba_folder() -> None:
    """Give Numba a folder for what it compiles here and in robosuite.

    Numba uses ``__pycache__`` beside the source or the user's cache. Where neither can be written, importing robosuite fails.
    """
    robosuite = importlib.util.find_spec("robosuite")
    sources = [Path(__file__)] + ([Path(robosuite.origin)] if robosuite is not None and robosuite.origin else [])
    if all(map(_numba_finds_folder, sources)):
        return
    folder = compiler_cache("numba")
    if folder is not None:
        config: Any = numba.config
        os.environ["NUMBA_CACHE_DIR"] = config.CACHE_DIR = str(folder)
        return
    macros: Any = ModuleType("robosuite.macros_private")  # robosuite imports this module of the user's if there is one
    macros.CACHE_NUMBA = False
    sys.modules["robosuite.macros_private"] = macros


def _numba_finds_folder(source: Path) -> bool:
    namespace: dict[str, Any] = {}
    exec(compile("def probe(): pass", str(source), "exec"), namespace)
    try:
        folder = numba.njit(cache=True)(namespace["probe"]).stats.cache_path
    except RuntimeError:
        return False
    return folder is not None and can_write(Path(folder))


_choose_numba_folder()
_previously_disabled = logging.root.manager.disable
logging.disable(logging.WARNING)
import robosuite  # noqa: E402

logging.disable(_previously_disabled)
if not gl.BACKEND:
    os.environ.pop("MUJOCO_GL", None)  # robosuite chose EGL, for all processes started from here
logging.getLogger("robosuite_logs").setLevel(logging.ERROR)

__all__ = ["robosuite"]
