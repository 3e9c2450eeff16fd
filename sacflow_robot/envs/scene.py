"""Joint angles, object poses and pictures of logged simulator states."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.spec import Array

_ROBOT_PARTS = "robot", "gripper"
_PARKED_M = 5.0  # robosuite puts objects that a task does not use some 10 m away from the origin


def read_scene(env: RobosuiteEnv, states: Array) -> tuple[dict[str, Array], dict[str, Array]]:
    """The movable things of simulator states (T + 1, S); the episode in progress is lost.

    Returns:
        Per joint of robot and gripper its positions (T + 1,), in radians, or meters for the fingers; per other movable body
        that the task uses its poses (T + 1, 7) in the world: position (m), unit quaternion x y z w.

    Raises:
        DataError: The states are not of this task.
    """
    model, data = env.model, env.data
    joints: dict[str, int] = {}
    bodies: dict[str, int] = {}
    for joint in map(model.joint, range(model.njnt)):
        if joint.name.startswith(_ROBOT_PARTS):
            joints[joint.name] = int(joint.qposadr[0])
        else:
            bodies[model.body(joint.bodyid[0]).name] = int(joint.bodyid[0])
    positions = np.empty((len(states), len(joints)))
    poses = np.empty((len(states), len(bodies), 7))
    rows, ids = list(joints.values()), list(bodies.values())
    for t, state in enumerate(states):
        env.observe_state(state)
        positions[t] = data.qpos[rows]
        poses[t] = np.concatenate([data.xpos[ids], data.xquat[ids][:, [1, 2, 3, 0]]], axis=1)
    near = np.linalg.norm(poses[0, :, :3], axis=-1) < _PARKED_M
    objects = {name: poses[:, i] for i, name in enumerate(bodies) if near[i]}
    return {name: positions[:, i] for i, name in enumerate(joints)}, objects


def pictures(env: RobosuiteEnv, states: Array) -> Iterator[npt.NDArray[np.uint8]]:
    """A picture (480, 640, 3) of each simulator state (T + 1, S); the episode in progress is lost.

    Raises:
        DataError: The states are not of this task.
        InvalidValueError: Off-screen rendering does not work on this machine.
    """
    for state in states:
        env.observe_state(state)
        yield env.render()
