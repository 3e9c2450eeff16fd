import json

import mujoco
import numpy as np
import pytest
import robosuite

from sacflow_robot.envs.robomimic_metadata import env_args, model_xml
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.tasks import CONTROL_RATE_HZ, TASKS


@pytest.mark.parametrize("task", TASKS)
def test_env_args_make_the_environment_again(task: str) -> None:
    """In robosuite 1.5 itself: same controller and rate, and it takes our model and a state of ours."""
    described = json.loads(json.dumps(env_args(task)))
    assert described["type"] == 1 and described["env_version"] == robosuite.__version__
    suite = robosuite.make(described["env_name"], **described["env_kwargs"])
    ours = RobosuiteEnv(task)
    try:
        assert suite.action_dim == ours.robot.action_dim and suite.control_freq == CONTROL_RATE_HZ
        assert suite.robots[0].part_controllers["right"].name == "OSC_POSE"
        _, info = ours.reset(seed=3)
        suite.reset()
        suite.reset_from_xml_string(suite.edit_model_xml(model_xml(ours)))  # as robomimic does with a model_file
        suite.sim.set_state_from_flattened(info["state"])
        suite.sim.forward()
        theirs = suite.sim.get_state().flatten()  # ours goes on with what the model itself holds, e.g. the door's place
        assert np.array_equal(theirs, info["state"][: len(theirs)])
    finally:
        suite.close()
        ours.close()


def test_the_model_is_the_simulators_own(env: RobosuiteEnv) -> None:
    model = mujoco.MjModel.from_xml_string(model_xml(env))
    assert 1 + model.nq + model.nv == len(env.state())
    cube = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_GEOM, "cube_g0")
    assert cube >= 0 and np.allclose(model.geom_size[cube], env.model.geom_size[cube])
