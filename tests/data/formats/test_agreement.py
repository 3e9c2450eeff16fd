from dataclasses import replace

import numpy as np
import pytest

from sacflow_robot.data.formats.agreement import (
    AgreementOptions,
    Claims,
    Controller,
    action_scale,
    check_agreement,
    check_robot,
    claims_of_robot,
    controller_of,
    disagreements,
)
from sacflow_robot.data.formats.checks import check_log_times, check_times
from sacflow_robot.data.formats.hdf5_header import claims_of_env
from sacflow_robot.errors import DataError, SpecMismatchError, UsageError
from sacflow_robot.spec import RobotSpec

OSC = {"type": "OSC_POSE", "output_max": [0.05] * 3 + [0.5] * 3, "output_min": [-0.05] * 3 + [-0.5] * 3}


def composite(**changes: object) -> dict[str, object]:
    return {"type": "BASIC", "body_parts": {"right": {**OSC, "input_type": "delta", "gripper": {}, **changes}}}


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"robots": "Panda", "controller_configs": {**OSC, "control_delta": True}, "control_freq": 20},
        {"robots": ["Panda"], "controller_configs": [{**OSC, "input_max": 1, "input_min": -1}], "control_freq": 20.0},
        {"robots": ["Panda"], "controller_configs": composite()},
        {"robots": ["Panda"], "controller_configs": composite(input_ref_frame="world")},
        {
            "robots": ["Panda"],
            "controller_configs": {"body_parts": {"envs": {"right": {**OSC, "input_type": "delta"}}}},
        },
        {"robots": ["Panda"], "controller_configs": "OSC_POSE"},
    ],
)
def test_what_fits_needs_no_option(robot: RobotSpec, kwargs: dict[str, object]) -> None:
    check_agreement("a.hdf5", claims_of_env(kwargs), robot, AgreementOptions())


@pytest.mark.parametrize(
    ("kwargs", "message", "way_out"),
    [
        ({"control_freq": 10}, "says 10 Hz, the task expects 20 Hz (give --resample", {"resample": True}),
        ({"control_freq": 0}, "control rate of 0 Hz", None),
        ({"robots": ["Sawyer"]}, "robot Sawyer, the task expects Panda (if it is one, give", {"as_robot": "Panda"}),
        ({"robots": ["Panda", "Panda"]}, "robot Panda + Panda", {"as_robot": "panda"}),
        (
            {"controller_configs": {**OSC, "control_delta": False}},
            "controller OSC_POSE absolute, the task expects OSC_POSE delta (give --controller-map",
            {"controller_map": True},
        ),
        ({"controller_configs": composite(input_type="absolute")}, "OSC_POSE absolute", {"controller_map": True}),
        ({"controller_configs": {"type": "JOINT_VELOCITY"}}, "JOINT_VELOCITY cannot be converted", None),
        ({"controller_configs": composite(input_ref_frame="eef")}, "OSC_POSE in eef axes cannot be converted", None),
        ({"controller_configs": {"type": "WHOLE_BODY_IK", "body_parts": {}}}, "WHOLE_BODY_IK", None),
        (
            {"controller_configs": [OSC, {**OSC, "control_delta": False}]},
            "controller OSC_POSE + OSC_POSE absolute",
            None,
        ),
        (
            {"controller_configs": {**OSC, "output_max": 0.2, "output_min": -0.2}},
            "moves by 0.2, 0.2, 0.2, 0.2, 0.2, 0.2 for an action of 1 (output_max), the task's by 0.05",
            {"controller_map": True},
        ),
        (
            {"controller_configs": {**OSC, "input_max": 10, "input_min": -10}},
            "moves by 0.005",
            {"controller_map": True},
        ),
    ],
)
def test_each_difference_is_named_with_its_way_out(
    robot: RobotSpec, kwargs: dict[str, object], message: str, way_out: dict[str, object] | None
) -> None:
    claims = claims_of_env(kwargs)
    (found,) = disagreements(claims, robot, AgreementOptions())
    assert message in found
    others = AgreementOptions(resample=True, controller_map=True)
    assert disagreements(claims, robot, AgreementOptions(**way_out) if way_out else others) == (
        [] if way_out else [found]
    )


def test_all_differences_are_named_at_once(robot: RobotSpec) -> None:
    claims = Claims("Sawyer", 10, Controller("JOINT_POSITION", False))
    with pytest.raises(SpecMismatchError) as refusal:
        check_agreement("a.hdf5", claims, robot, AgreementOptions())
    message = str(refusal.value)
    assert "\n" not in message and message.startswith("a.hdf5 does not agree with task 'lift'")
    assert all(word in message for word in ("Sawyer", "10 Hz", "JOINT_POSITION", "--as-robot Panda", "--resample"))
    assert "--as-robot says UR5e" in disagreements(claims, robot, AgreementOptions(as_robot="UR5e"))[0]


@pytest.mark.parametrize("robot", ["panda", "franka", "Franka Emika Panda", "unknown", None])
def test_one_robot_has_many_names(robot_spec: RobotSpec, robot: str | None) -> None:
    assert disagreements(Claims(robot=robot), robot_spec, AgreementOptions()) == []


def test_a_robots_own_specification(robot: RobotSpec) -> None:
    assert action_scale(robot) == (0.05, 0.05, 0.05, 0.5, 0.5, 0.5)
    joints = replace(robot, controller="joint position", action_units=("rad", *robot.action_units[1:]))
    assert controller_of(joints) == Controller("joint position") and action_scale(joints) is None
    for mine in (robot, joints):
        check_robot("a.zarr", mine, mine, AgreementOptions())
        assert disagreements(claims_of_robot(mine), mine, AgreementOptions()) == []
    ten = replace(robot, control_rate_hz=10.0)
    assert check_robot("a.zarr", ten, robot, AgreementOptions(resample=True)).rate_hz == 10
    with pytest.raises(SpecMismatchError, match=r"10 Hz, the task expects 20 Hz .*task: lift, can"):
        check_robot("a.zarr", replace(ten, task="can"), robot, AgreementOptions())


def test_options_that_contradict_each_other(robot: RobotSpec) -> None:
    for options, message in (
        (AgreementOptions(reward="dense"), "give --success-above X too"),
        (AgreementOptions(success_above=0.9), "goes with --reward dense"),
    ):
        with pytest.raises(UsageError, match=message):
            check_agreement("a.hdf5", Claims(), robot, options)


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        (np.zeros(9), "all 0 s"),
        (np.arange(9) / 50, "50 Hz apart, and the file says 20 Hz"),
        (np.r_[0.0, 0.05, 0.1, 0.05, 0.2], r"a, step 3: its timestamp runs backwards \(0.1 s, then 0.05 s\)"),
        (np.r_[0.0, 0.05, 0.05, 0.1], "a, step 2: its timestamp repeats"),
        (np.r_[0.0, np.nan, 0.1], "a, step 1: its timestamp is nan"),
    ],
)
def test_times_that_cannot_be(seconds: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_times(seconds, 20.0, "a")


def test_times_of_a_late_loop_pass() -> None:
    rng = np.random.default_rng(0)
    times = np.cumsum(0.05 + rng.exponential(0.004, 200))
    measured = check_times(times, 20.0, "a")
    assert measured is not None and 18 < measured < 20
    ns = np.round(times * 1e9).astype(np.int64)
    check_log_times("a.zarr", [ns, ns[:2], np.array([0, 200_000_000])], 20.0)
    stuck = ns.copy()
    stuck[5] = stuck[4]  # a sensor that was late once
    check_log_times("a.zarr", [stuck], 20.0)
    with pytest.raises(DataError, match=r"a\.zarr, episode 1: its timestamps are all 0 s"):
        check_log_times("a.zarr", [ns, np.zeros(9, np.int64)], 20.0)
    with pytest.raises(DataError, match="40 Hz apart"):
        check_log_times("a.zarr", [np.arange(9) * 25_000_000], 20.0)
