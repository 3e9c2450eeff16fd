"""A robot's own dynamics in the compiled step."""

from collections.abc import Iterator

import numpy as np
import pytest

from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.robot_parameters import RobotParameters
from sacflow_robot.errors import UsageError
from sacflow_robot.spec import FloatArray

PUSH = np.array([0.4, -0.2, -0.3, 0.1, 0.2, -0.2, 0], np.float32)


@pytest.fixture(scope="module")
def robot() -> Iterator[RobosuiteEnv]:
    made = RobosuiteEnv("lift", engine="compiled")
    assert made.engine == "compiled"
    yield made
    made.close()


def moved(env: RobosuiteEnv, model: RobotParameters, action: FloatArray = PUSH, steps: int = 10) -> np.ndarray:  # type: ignore[type-arg]
    env.set_robot_model(model)
    env.begin(3)
    return np.stack([env.command(action).observation["robot0_eef_pos"] for _ in range(steps)])


def test_the_nominal_model_and_none_are_the_same_to_the_last_bit(robot: RobosuiteEnv) -> None:
    first = moved(robot, RobotParameters())
    assert not np.array_equal(first, moved(robot, RobotParameters({"joints.damping_nm_s_per_rad": (5.0,) * 7})))
    assert robot._physics is not None
    assert np.array_equal(first, moved(robot, robot._physics.nominal())), "written down and read again"
    assert np.array_equal(first, moved(robot, RobotParameters())), "and nothing stays behind"


def test_each_quantity_does_what_it_says(robot: RobosuiteEnv) -> None:
    nominal = moved(robot, RobotParameters())
    reach = np.linalg.norm(nominal[-1] - nominal[0])

    def share(**values: float) -> float:
        model = RobotParameters().having({name.replace("__", "."): v for name, v in values.items()})
        path = moved(robot, model)
        return float(np.linalg.norm(path[-1] - path[0]) / reach)

    assert share(controller__translation_stiffness_per_s2=300) > 1.2
    assert share(controller__translation_stiffness_per_s2=75, controller__damping_ratio=2) < 0.7
    friction = RobotParameters({"joints.friction_loss_nm": (60.0,) * 7})
    stuck = moved(robot, friction)
    assert np.linalg.norm(stuck[-1] - stuck[0]) < 0.15 * reach, (
        "dry friction that no command overcomes (MuJoCo lets it creep)"
    )
    late = moved(robot, RobotParameters({"controller.actuator_delay_ms": (8.0,)}))
    assert 1e-4 < np.abs(late - nominal).max() < 0.02


def test_a_load_that_the_controller_does_not_know_of_sags_by_its_weight(robot: RobosuiteEnv) -> None:
    still = np.zeros(7, np.float32)
    begin = moved(robot, RobotParameters(), still, 1)[0]
    sags = []
    for mass in (0.25, 0.5):
        # The controller sets its goal anew each period to where the robot is: a held goal shows the weight.
        robot.set_robot_model(RobotParameters({"payload.mass_kg": (mass,), "payload.center_m": (0.0, 0.0, 0.02)}))
        robot.begin(3)
        made = robot.compiled.follow(np.append([0.0, 1e6], still)[None], 25, 60, 25)
        sags.append(begin - made.observations[-1, :3])
    assert sags[0][2] > 1e-4
    assert sags[1][2] == pytest.approx(2 * sags[0][2], rel=0.35), "dry friction takes its part of both"


def test_following_is_the_control_step_where_commands_come_once_a_period(robot: RobosuiteEnv) -> None:
    nominal = moved(robot, RobotParameters())
    robot.begin(3)
    commands = np.array([[25.0 * i, 50.0, *PUSH] for i in range(10)])
    made = robot.compiled.follow(commands, 25, 10, 25)
    assert np.abs(made.observations[:, :3] - nominal).max() < 1e-6
    robot.begin(3)
    halves = [robot.compiled.follow(part, 25, 5, 25) for part in (commands[:5], commands[:5])]
    assert np.array_equal(np.concatenate([h.joints for h in halves]), made.joints), "in two pieces as in one"
    robot.begin(3)
    expired = robot.compiled.follow(np.array([[0.0, 25.0, *PUSH]]), 25, 20, 25)
    ends = expired.observations[-5:, :3]
    assert np.abs(ends - ends[0]).max() < 1e-3, "a robot whose command has expired holds"


def test_the_stock_engine_refuses_dynamics_of_its_own() -> None:
    env = RobosuiteEnv("lift", engine="stock")
    env.set_robot_model(RobotParameters({"transport.command_delay_ms": (5.0,)}))  # not its matter
    with pytest.raises(UsageError, match="need the compiled engine"):
        env.set_robot_model(RobotParameters({"payload.mass_kg": (0.1,)}))
    env.close()
