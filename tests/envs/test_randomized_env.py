"""Randomized training robots: seeded, logged, and late by what they say."""

import numpy as np
import pytest

from sacflow_robot.envs.collector import rollout
from sacflow_robot.envs.environment import HistoryEnv
from sacflow_robot.envs.randomization import FRANKA, TWIN_PARTS, Draws, RandomizedEnv, draw_around, draw_twin
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.envs.robot_parameters import Measured, RobotParameters
from sacflow_robot.envs.transport import Sensors
from sacflow_robot.envs.vector import make_vector_env
from sacflow_robot.errors import UnknownNameError, UsageError
from sacflow_robot.interfaces import VectorEnv
from sacflow_robot.spec import FloatArray, RobotSpec
from sacflow_robot.utils.seeding import random_stream

PUSH = np.array([0.5, 0, -0.2, 0, 0, 0.1, -1], np.float32)


def test_twins_are_within_their_ranges_and_differ_in_one_thing_where_asked() -> None:
    for seed in range(50):
        twin = draw_twin(seed)
        assert twin == draw_twin(seed)
        assert 0 <= twin.number("transport.command_delay_ms") <= 150 and 0 <= twin.number("payload.mass_kg") <= 0.5
        assert 0.6 <= twin.number("controller.translation_stiffness_per_s2") / 150 <= 1.4
        for name in ("joints.damping_nm_s_per_rad", "joints.friction_loss_nm"):
            ratio = np.array(twin.values[name]) / FRANKA.values[name]
            assert (ratio >= 0.3 - 1e-9).all() and (ratio <= 3 + 1e-9).all()
    for part in TWIN_PARTS:
        changed = {n.split(".")[0] for n, v in draw_twin(4, part).values.items() if FRANKA.values.get(n) != v}
        assert len(changed) == 1, part
    with pytest.raises(UnknownNameError, match="delay"):
        draw_twin(1, "color")


def test_draws_around_a_profile_have_its_uncertainty_and_stay_possible() -> None:
    measured = {"payload.mass_kg": Measured((0.1,), (0.1,), "2026-11-23", "x")}
    masses = [draw_around(measured, random_stream(s)).number("payload.mass_kg") for s in range(400)]
    assert min(masses) == 0.0 and np.mean(np.array(masses) > 0.1) == pytest.approx(0.5, abs=0.1)
    with pytest.raises(UsageError, match="measured values"):
        Draws("profile")


def test_an_episode_is_decided_by_its_seed_and_says_what_was_drawn() -> None:
    def play(envs: VectorEnv) -> list[tuple[FloatArray, str]]:
        episodes = rollout(envs, (5, 7), lambda seen, noise: np.tile(PUSH, (len(noise), 5, 1)), range(3, 5))
        return sorted(
            ((e.observations["robot0_eef_pos"][:40], str(e.info["arm_model"])) for e in episodes),
            key=lambda pair: pair[1],
        )

    draws = Draws("wide")
    with make_vector_env("lift", 1, draws=draws) as one, make_vector_env("lift", 2, draws=draws) as two:
        alone, together = play(one), play(two)
    for (a, about), (b, other) in zip(alone, together, strict=True):
        assert np.array_equal(a, b) and about == other
        assert RobotParameters.from_json(about).number("transport.command_delay_ms") > 0
    assert alone[0][1] != alone[1][1]


def test_delays_move_what_is_seen_and_losses_repeat_it() -> None:
    env = RobosuiteEnv("lift", engine="compiled")

    def play(model: RobotParameters) -> FloatArray:
        made = RandomizedEnv(env, Draws(model=model))
        made.begin(5)
        return np.stack([made.command(PUSH).observation["robot0_eef_pos"] for _ in range(14)])

    prompt = play(RobotParameters())
    observed_late = play(RobotParameters({"transport.observation_delay_ms": (100.0,)}))
    assert np.array_equal(observed_late[2:], prompt[:-2])
    commanded_late = play(RobotParameters({"transport.command_delay_ms": (100.0,)}))
    assert (
        np.abs(commanded_late[2:] - prompt[:-2]).max() < 2e-3
        and np.abs(commanded_late[:2] - commanded_late[0]).max() < 1e-3
    )
    lost = play(RobotParameters({"transport.observation_drop_ratio": (0.8,)}))
    assert (np.diff(lost, axis=0) == 0).all(axis=1).any() and not (np.diff(prompt, axis=0) == 0).all(axis=1).any()
    env.close()


def test_the_last_actions_are_seen_newest_last() -> None:
    made = HistoryEnv(RandomizedEnv(RobosuiteEnv("lift", engine="compiled"), Draws()), 2)
    start = made.begin(1)
    assert made.robot.observations[-1].key == "action_history" and not start.observation["action_history"].any()
    made.command(PUSH)
    seen = made.command(0.5 * PUSH).observation
    assert np.array_equal(seen["action_history"], [PUSH, 0.5 * PUSH])
    made.robot.check_observation(seen)


def test_sensors_bias_what_is_relative_too_and_round(robot: RobotSpec) -> None:
    truth = {a.key: np.zeros(a.shape, np.float32) for a in robot.observations}
    truth["robot0_eef_quat"][3] = truth["object"][6] = 1
    bias = (0.01, 0.0, -0.02)
    model = RobotParameters({"sensors.robot0_eef_pos.bias_m": bias, "sensors.object.noise_m": (1e-3,)})
    seen = Sensors(robot, model).read(truth, random_stream(1))
    assert seen["robot0_eef_pos"] == pytest.approx(bias)
    difference = seen["object"][:3] - seen["robot0_eef_pos"]
    assert seen["object"][7:] == pytest.approx(difference, abs=1e-6), "cube from gripper is the difference of the two"
    assert np.array_equal(seen["robot0_eef_quat"], truth["robot0_eef_quat"])
    coarse = RobotParameters(
        {"sensors.robot0_eef_pos.noise_m": (0.01,), "sensors.robot0_eef_pos.resolution_m": (0.005,)}
    )
    read = Sensors(robot, coarse).read(truth, random_stream(2))["robot0_eef_pos"] / 0.005
    assert read == pytest.approx(np.round(read), abs=1e-4) and read.any()
