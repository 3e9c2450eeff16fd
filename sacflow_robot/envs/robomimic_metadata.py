"""Metadata of a simulated task in robomimic's files: arguments of the environment, and the simulator's model."""

from typing import Any

from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.tasks import CONTROL_RATE_HZ, get_task

_ROBOSUITE_TYPE = 1  # robomimic's EnvType.ROBOSUITE_TYPE


def env_args(task: str) -> dict[str, Any]:
    """``env_args`` from which ``robosuite.make(env_name, **env_kwargs)`` makes the task's environment again.

    Raises:
        UnknownNameError: No such task.
    """
    import robosuite  # after robosuite_env, which imports it without its warnings

    name = get_task(task).robosuite_name
    return {
        "env_name": name,
        "env_version": robosuite.__version__,
        "type": _ROBOSUITE_TYPE,
        "env_kwargs": {
            "robots": ["Panda"],
            "controller_configs": robosuite.load_composite_controller_config(robot="Panda"),
            "control_freq": CONTROL_RATE_HZ,
            "has_renderer": False,
            "has_offscreen_renderer": False,
            "ignore_done": True,
            "use_camera_obs": False,
            "use_object_obs": True,
            "reward_shaping": False,
        },
    }


def model_xml(env: RobosuiteEnv) -> str:
    """The simulator's model of an environment (MJCF).

    robosuite's own text: MuJoCo itself can only save the model that was loaded last, which may be another environment's.
    """
    return str(env._suite.model.get_xml())
