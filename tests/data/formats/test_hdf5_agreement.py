"""Genuine-looking robomimic files of the simulated robot, each wrong in one way, and what is said of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from sacflow_robot.data.formats.agreement import AgreementOptions
from sacflow_robot.data.formats.demonstrations import DemoOptions
from sacflow_robot.data.formats.sources import load_demos, read_demos, write_demos
from sacflow_robot.envs.robomimic_metadata import env_args
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.errors import DataError, SpecMismatchError, UnknownNameError, UsageError
from sacflow_robot.spec import RobotSpec

Arrays = dict[str, Any]
OSC = {
    "type": "OSC_POSE", "input_max": 1, "input_min": -1, "output_max": [0.05] * 3 + [0.5] * 3,
    "output_min": [-0.05] * 3 + [-0.5] * 3, "kp": 150, "control_delta": True,
}  # fmt: skip
STEPS = 24


@pytest.fixture(scope="module")
def demonstration(env: RobosuiteEnv) -> Arrays:
    """The arrays of a demonstration as robomimic keeps them; the task is solved from step 20 on."""
    rng = np.random.default_rng(0)
    observation, info = env.reset(seed=0)
    rows, states = [observation], [info["state"]]
    actions = rng.uniform(-0.5, 0.5, (STEPS, 7))
    actions[:, 6] = np.where(np.arange(STEPS) < 10, -1, 1)
    for t, action in enumerate(actions):
        observation, _, _, _, info = env.step(action.astype(np.float32))
        state = info["state"].copy()
        if t >= 20:
            state[12] += 0.2  # the cube, lifted
            observation = env.observe_state(state)[0]
            env.observe_state(info["state"])
        rows.append(observation)
        states.append(state)
    solved = np.arange(STEPS) >= 20
    arrays: Arrays = {"actions": actions, "states": np.stack(states)[:-1], "rewards": solved.astype(float)}
    arrays["dones"] = (np.arange(STEPS) == STEPS - 1).astype(np.int64)
    for key in rows[0]:
        whole = np.stack([row[key] for row in rows]).astype(np.float64)
        arrays[f"obs/{key}"], arrays[f"next_obs/{key}"] = whole[:-1], whole[1:]
    return arrays


@pytest.fixture
def write(demonstration: Arrays, tmp_path: Path) -> Callable[..., Path]:
    """Write two demonstrations; keyword arguments change ``env_kwargs``, ``edit`` the arrays."""

    def make(edit: Callable[[Arrays], Any] = lambda _: None, **kwargs: Any) -> Path:
        path = tmp_path / "a.hdf5"
        said = {"robots": ["Panda"], "controller_configs": OSC, "control_freq": 20, "reward_shaping": False, **kwargs}
        with h5py.File(path, "w") as file:
            data = file.create_group("data")
            data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": said})
            for i in range(2):
                arrays = {key: values.copy() for key, values in demonstration.items()}
                edit(arrays)
                demo = data.create_group(f"demo_{i}")
                for key, values in arrays.items():
                    demo[key] = values
        return path

    return make


@pytest.fixture
def options(robot: RobotSpec, env: RobosuiteEnv) -> Callable[..., DemoOptions]:
    def make(**agreement: Any) -> DemoOptions:
        return DemoOptions(robot, "Lift", env.observe_state, agreement=AgreementOptions(**agreement))

    return make


Write, Options = Callable[..., Path], Callable[..., DemoOptions]


def test_genuine_files_need_no_options(write: Write, options: Options, env: RobosuiteEnv) -> None:
    for kwargs in ({}, {"controller_configs": env_args("lift")["env_kwargs"]["controller_configs"]}):
        demos = load_demos(write(**kwargs), options())
        assert [len(e) for e in demos.episodes] == [21, 21] and all(e.success for e in demos.episodes)
        assert demos.env_args is not None
        assert list(demos.losses.remarks) == [
            "the state after the last action is not in the file and repeats the one before it"
        ]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"control_freq": 10}, "says 10 Hz, the task expects 20 Hz .give --resample"),
        ({"control_freq": 40}, "says 40 Hz"),
        ({"robots": ["Sawyer"]}, "robot Sawyer, the task expects Panda .*--as-robot Panda"),
        ({"controller_configs": {**OSC, "control_delta": False}}, "OSC_POSE absolute.*--controller-map"),
        ({"controller_configs": {"type": "JOINT_VELOCITY"}}, "JOINT_VELOCITY cannot be converted"),
        ({"controller_configs": {**OSC, "output_max": [0.2] * 6, "output_min": [-0.2] * 6}}, "output_max"),
    ],
)
def test_what_env_args_say_is_compared(write: Write, options: Options, kwargs: Any, message: str) -> None:
    path = write(**kwargs)
    with pytest.raises(SpecMismatchError, match=message) as refusal:
        read_demos(path, options())
    assert "\n" not in str(refusal.value)


def test_env_args_of_another_form_are_refused(write: Write, options: Options) -> None:
    for kwargs in ({"controller_configs": 3}, {"control_freq": "fast"}):
        with pytest.raises(DataError, match="env_args does not describe a robosuite environment"):
            read_demos(write(**kwargs), options())


@pytest.mark.parametrize("kwargs", [{}, {"controller_configs": {**OSC, "control_delta": False}}])
def test_absolute_actions_are_seen_and_mapped(write: Write, options: Options, kwargs: Any) -> None:
    """As in diffusion_policy's ``*_abs`` files, which still say ``control_delta``."""

    def absolute(arrays: Arrays) -> None:
        quat = arrays["obs/robot0_eef_quat"] * np.where(arrays["obs/robot0_eef_quat"][:, 3:] < 0, -1, 1)
        sine = np.linalg.norm(quat[:, :3], axis=1, keepdims=True)
        rotation = quat[:, :3] / sine * 2 * np.arctan2(sine, quat[:, 3:])
        position = arrays["next_obs/robot0_eef_pos"]
        arrays["actions"] = np.concatenate([position, rotation, arrays["actions"][:, 6:]], axis=1)

    path = write(absolute, **kwargs)
    with pytest.raises(SpecMismatchError, match=r"absolute.*expects OSC_POSE delta \(give --controller-map"):
        read_demos(path, options())
    demos = read_demos(path, options(controller_map=True))
    episode = demos.episodes[0]
    moved = np.diff(episode.observations["robot0_eef_pos"], axis=0) / 0.05
    assert np.allclose(episode.action[:, :3], moved, atol=1e-3)
    assert np.allclose(episode.action[:, 3:6], 0, atol=1e-3), "the goal was to keep the orientation"
    assert demos.env_args is None, "what described the absolute controller does not go on"


def test_another_rate_is_resampled_throughout(write: Write, options: Options, tmp_path: Path) -> None:
    def slower(arrays: Arrays) -> None:
        arrays["states"][:, 0] *= 2

    demos = read_demos(write(slower, control_freq=10), options(resample=True))
    assert [len(e) for e in demos.episodes] == [48, 48]
    assert demos.episodes[0].info["first_success"] == 41 and "apart" not in str(demos.losses)
    written = write_demos(tmp_path / "b.hdf5", demos)
    assert len(read_demos(tmp_path / "b.hdf5", options()).episodes[0]) == 48 and written.env_args is None
    said = str(read_demos(write(control_freq=10), options(resample=True)).losses)
    assert "the file says 10 Hz, which is believed, though its states are 20 Hz apart" in said


def test_the_rate_of_a_file_that_does_not_say_is_that_of_its_states(write: Write, options: Options) -> None:
    def faster(arrays: Arrays) -> None:
        arrays["states"][:, 0] /= 2

    with pytest.raises(SpecMismatchError, match="says 40 Hz"):
        read_demos(write(faster, control_freq=None), options())
    with pytest.raises(DataError, match=r"demo_0, states: its timestamps are 40 Hz apart, and the file says 20 Hz"):
        read_demos(write(faster), options())

    def raw(arrays: Arrays) -> None:
        faster(arrays)
        for key in [key for key in arrays if key not in ("actions", "states")]:
            del arrays[key]

    with pytest.raises(SpecMismatchError, match="says 40 Hz"):
        read_demos(write(raw, control_freq=None), options())


def test_rewards_of_every_kind_end_an_episode_at_its_success(write: Write, options: Options) -> None:
    def dense(arrays: Arrays) -> None:
        arrays["rewards"] = np.linspace(0.1, 0.9, STEPS)

    def minus(arrays: Arrays) -> None:
        arrays["rewards"] -= 1

    def absent(arrays: Arrays) -> None:
        del arrays["rewards"]

    for edit, said in ((dense, "dense rewards"), (minus, "rewards of -1/0"), (absent, "no rewards")):
        demos = load_demos(write(edit), options())
        assert [len(e) for e in demos.episodes] == [21, 21] and all(e.success for e in demos.episodes), said
        assert said in str(demos.losses) and demos.episodes[0].rewards.sum() == 1
    with pytest.raises(DataError, match="--success-above"):
        read_demos(write(dense), DemoOptions(options().robot, "Lift"))
    stated = options(reward="dense", success_above=0.5)
    assert len(load_demos(write(dense), stated).episodes[0]) == int(np.argmax(np.linspace(0.1, 0.9, STEPS) > 0.5)) + 1


def _shuffled(arrays: Arrays) -> None:
    for key in [key for key in arrays if "obs/" in key or key == "states"]:
        arrays[key][5:9] = arrays[key][5:9][::-1]


def _frames_missing(arrays: Arrays) -> None:
    arrays["states"][:, 0] = np.arange(STEPS) / 20
    for key in [key for key in arrays if key.startswith("obs/")]:
        arrays[key] = np.roll(arrays[key], 6, axis=0)


def _w_first(arrays: Arrays) -> None:
    for group in ("obs", "next_obs"):
        arrays[f"{group}/robot0_eef_quat"] = np.roll(arrays[f"{group}/robot0_eef_quat"], 1, axis=1)


def _object_w_first(arrays: Arrays) -> None:
    for group in ("obs", "next_obs"):
        arrays[f"{group}/object"][:, 3:7] = np.roll(arrays[f"{group}/object"][:, 3:7], 1, axis=1)


def _scaled(factor: float) -> Callable[[Arrays], None]:
    def edit(arrays: Arrays) -> None:
        for group in ("obs", "next_obs"):
            arrays[f"{group}/robot0_eef_quat"] *= factor

    return edit


def _shorter(key: str) -> Callable[[Arrays], None]:
    def edit(arrays: Arrays) -> None:
        arrays[key] = arrays[key][:-3]

    return edit


def _not_a_number(key: str) -> Callable[[Arrays], None]:
    def edit(arrays: Arrays) -> None:
        arrays[key][7] = np.nan

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_w_first, "demo_0, step 0: the quaternion in robot0_eef_quat is w x y z by its states"),
        (_object_w_first, "demo_0, step 0: the quaternion in object is w x y z by its states"),
        (_scaled(3), "demo_0, step 0: the quaternion in robot0_eef_quat has norm 3"),
        (_scaled(0), "the quaternion in robot0_eef_quat has norm 0"),
        (_shuffled, r"demo_0, states, step 6: its timestamp runs backwards"),
        (_frames_missing, r"demo_0, step \d+: obs/robot0_eef_pos is .* m from next_obs of the step before"),
        (_shorter("next_obs/object"), "demo_0: next_obs/object has 21 rows for 24 actions"),
        (_shorter("obs/robot0_eef_pos"), "demo_0: obs/robot0_eef_pos has 21 rows for 24 actions"),
        (_shorter("dones"), "demo_0: dones has 21 rows for 24 actions"),
        (_not_a_number("actions"), "demo_0, step 7: NaN or infinity among its actions"),
        (_not_a_number("rewards"), "demo_0, step 7: its reward is nan"),
        (_not_a_number("states"), "demo_0, step 7: NaN or infinity among its states"),
        (_not_a_number("obs/object"), "demo_0, step 7: NaN or infinity among the observation 'object'"),
    ],
)
def test_what_contradicts_itself_is_refused_by_demonstration_and_step(
    write: Write, options: Options, edit: Callable[[Arrays], None], message: str
) -> None:
    with pytest.raises(DataError, match=message) as refusal:
        read_demos(write(edit), options())
    assert "a.hdf5" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_number_of_samples_that_is_not_that_of_the_actions_is_refused(write: Write, options: Options) -> None:
    path = write()
    with h5py.File(path, "r+") as file:
        file["data/demo_1"].attrs["num_samples"] = 5
    with pytest.raises(DataError, match="demo_1: its attribute num_samples is 5, and it has 24 actions"):
        read_demos(path, options())


def test_joint_actions_are_seen_whatever_the_file_says(write: Write, options: Options) -> None:
    def joints(arrays: Arrays) -> None:
        arrays["actions"] = arrays["states"][:, 1:8]

    with pytest.raises(SpecMismatchError, match="its actions are joint positions, the task expects OSC_POSE delta"):
        read_demos(write(joints), options())


def test_states_whose_times_stand_still_are_named(write: Write, options: Options) -> None:
    def still(arrays: Arrays) -> None:
        arrays["states"][:, 0] = 0

    assert "the times of its states stand still" in str(read_demos(write(still), options()).losses)


def test_a_reward_that_is_no_number_is_no_threshold(write: Write, options: Options) -> None:
    with pytest.raises(UsageError, match="--success-above nan; expected a reward"):
        read_demos(write(), options(reward="dense", success_above=float("nan")))


def test_one_subset_of_a_file(write: Write, options: Options) -> None:
    path = write()
    with h5py.File(path, "r+") as file:
        file["mask/train"] = np.array([b"demo_1"])
        file["mask/valid"] = np.array([b"demo_0", b"demo_9"])
        file.create_dataset("mask/both", data=["demo_0", "demo_1"], dtype=h5py.string_dtype())
    whole, train = read_demos(path, options()), read_demos(path, options(filter_key="train"))
    assert "mask 'valid' names demo_9, which the file does not hold" in str(whole.losses)
    assert len(train.episodes) == 1 and train.masks == {"both": [0], "train": [0], "valid": []}
    assert np.array_equal(train.episodes[0].action, whole.episodes[1].action)
    with pytest.raises(UnknownNameError, match="valid names: both, train, valid"):
        read_demos(path, options(filter_key="test"))
    with pytest.raises(DataError, match="names no subsets; leave out --filter-key train"):
        read_demos(write(), options(filter_key="train"))


def test_a_gripper_that_does_the_opposite_is_named(write: Write, options: Options) -> None:
    def turned(arrays: Arrays) -> None:
        arrays["actions"][:, 6] *= -1

    assert "gripper" not in str(read_demos(write(), options()).losses)
    assert "the gripper's command and fingers disagree" in str(read_demos(write(turned), options()).losses)
