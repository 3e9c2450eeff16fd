import numpy as np
import pytest

from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.scene import pictures, read_scene
from sacflow_robot.errors import DataError, InvalidValueError
from sacflow_robot.spec import FloatArray


def some_states(env: RobosuiteEnv) -> tuple[list[dict[str, FloatArray]], np.ndarray]:
    results = [env.begin(3)] + [env.command(np.array([0.5, 0, -0.5, 0, 0, 0.5, 1], np.float32)) for _ in range(4)]
    return [r.observation for r in results], np.stack([r.state for r in results if r.state is not None])


def test_joints_and_objects_are_those_of_the_states(env: RobosuiteEnv) -> None:
    observations, states = some_states(env)
    joints, objects = read_scene(env, states)
    names = [f"robot0_joint{i}" for i in range(1, 8)]
    assert [name for name in joints if name.startswith("robot0")] == names
    assert np.array_equal(np.stack([joints[name] for name in names], axis=1), states[:, 1:8])
    fingers = [values for name, values in joints.items() if name.startswith("gripper0")]
    seen = np.stack([o["robot0_gripper_qpos"] for o in observations])
    assert np.stack(fingers, axis=1).astype(np.float32) == pytest.approx(seen)
    assert list(objects) == ["cube_main"]
    cube = np.stack([o["object"][:7] for o in observations])
    assert objects["cube_main"] == pytest.approx(cube, abs=1e-6)
    with pytest.raises(DataError, match="shape"):
        read_scene(env, states[:, :-1])


def test_a_picture_of_every_state(env: RobosuiteEnv) -> None:
    _, states = some_states(env)
    try:
        images = list(pictures(env, states[[0, 0, 4]]))
    except InvalidValueError as error:
        pytest.skip(str(error))
    assert np.array_equal(images[0], images[1]) and images[0].shape == (480, 640, 3)
    assert (images[0] != images[2]).any(axis=2).mean() > 0.005
