"""Off-screen rendering."""

import sys
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from sacflow_robot.envs import gl
from sacflow_robot.errors import InvalidValueError, one_line

_WIDTH, _HEIGHT = 640, 480
_HELP = "install OSMesa (Debian: libosmesa6) or give the machine a GPU with EGL"


class SceneRenderer:
    """Renderer of a simulated scene.

    Raises:
        InvalidValueError: Off-screen rendering does not work on this machine.
    """

    def __init__(self, model: mujoco.MjModel) -> None:
        if sys.platform == "linux" and gl.BACKEND in ("", "glfw") and not gl.has_display():
            raise InvalidValueError(f"no off-screen rendering on a machine without display; {_HELP}")
        try:
            self._renderer: Any = mujoco.Renderer(model, _HEIGHT, _WIDTH)
        except Exception as error:  # each OpenGL back end raises errors of its own
            raise InvalidValueError(
                f"off-screen rendering with MUJOCO_GL={gl.BACKEND or 'glfw'} does not work: {one_line(error)}; {_HELP}"
            ) from None
        self._options = mujoco.MjvOption()
        self._options.geomgroup[0] = 0  # collision shapes
        self._options.sitegroup[:] = 0  # markers, such as the line through the gripper

    def render(self, data: mujoco.MjData) -> npt.NDArray[np.uint8]:
        """The scene as robosuite's camera agentview sees it, RGB (480, 640, 3)."""
        self._renderer.update_scene(data, camera="agentview", scene_option=self._options)
        image: npt.NDArray[np.uint8] = self._renderer.render()
        return image

    def close(self) -> None:
        self._renderer.close()
