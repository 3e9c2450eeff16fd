"""One demonstration of an HDF5 file as an episode: of a raw robosuite file, of robomimic's, or of one written here.

What does not fit raises DataError, which names the demonstration, the array and the step.
"""

import json
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from sacflow_robot.data.formats.adapt import EEF_POS
from sacflow_robot.data.formats.checks import check_finite, check_unit, check_w_last
from sacflow_robot.data.formats.demonstrations import DemoOptions, Losses, human_episode
from sacflow_robot.data.formats.foreign_episodes import Outcome, Recorded
from sacflow_robot.data.log.columns import OBSERVATION_COLUMNS, STEP_COLUMNS, stored_name
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError
from sacflow_robot.spec import ArraySpec, FloatArray, RobotSpec

# An idle step commands no motion, leaves the gripper's command alone, and no finger moves by more than this (m). The robot
# may coast: under delta control that is the tail of an earlier command, and says nothing about what to do next.
_STILL = 1e-3
_FINGERS = slice(8, 10)  # in a state: time, 7 robot joints, 2 fingers, ...
_ARM_DIMS = 6
_SAME_PLACE = 0.03  # m; observations may lag behind each other by a physics step
_SAME_FRAME = 0.005  # m; likewise

Flags = npt.NDArray[np.bool_]


def check_rows(demo: h5py.Group, origin: str) -> int:
    """Number of actions of a demonstration, checked against the rows of its other arrays."""
    steps = len(demo["actions"])
    said = demo.attrs.get("num_samples", steps)
    if said != steps:
        raise DataError(f"{origin}: its attribute num_samples is {said}, and it has {steps} actions; correct the file")
    observed = (f"{group}/{key}" for group in ("obs", "next_obs") for key in demo.get(group, ()))
    for name in ("states", "rewards", "dones", *observed):
        if name in demo and (not demo[name].shape or len(demo[name]) != steps):
            rows = len(demo[name]) if demo[name].shape else "no"
            raise DataError(f"{origin}: {name} has {rows} rows for {steps} actions; expected as many")
    return steps


def read_rows(demo: h5py.Group, origin: str) -> npt.NDArray[np.float64]:
    """The simulator states (T, S) before each action."""
    states = np.asarray(demo["states"], np.float64)
    if states.ndim != 2 or states.shape[1] < 10:
        raise DataError(f"{origin} has states of shape {states.shape}; expected (T, S)")
    check_finite(states, origin, "its states")
    return states


def observe_states(rows: npt.NDArray[np.float64], options: DemoOptions) -> tuple[dict[str, FloatArray], Flags]:
    """Observations of states (T, S) per key (T, ...), and whether the task is solved in them (T,).

    This takes the simulator; :attr:`DemoOptions.observe_state` is there.
    """
    assert options.observe_state is not None
    observed = [options.observe_state(state) for state in rows]
    observations = {a.key: np.stack([each[0][a.key] for each in observed]) for a in options.robot.observations}
    return observations, np.array([solved for _, solved in observed])


def recorded_outcome(demo: h5py.Group, options: DemoOptions, origin: str) -> Recorded:
    """Outcome of a robomimic or raw demonstration, as recorded."""

    def solved_states() -> Flags | None:
        try:
            return observe_states(read_rows(demo, origin), options)[1]
        except DataError:  # states of another version's model, which the simulator here does not take
            return None

    rewards = demo["rewards"][()].astype(np.float64).ravel() if "rewards" in demo else None
    if rewards is not None and (wrong := np.flatnonzero(~np.isfinite(rewards)).tolist()):
        raise DataError(f"{origin}, step {wrong[0]}: its reward is {rewards[wrong[0]]}; expected a number")
    dones = demo["dones"][()].astype(bool).ravel() if "dones" in demo else None
    can_tell = "states" in demo and options.observe_state is not None
    return Recorded(rewards, None, dones, solved_states if can_tell else None)


def raw_episode(demo: h5py.Group, robot: RobotSpec, options: DemoOptions, origin: str, losses: Losses) -> Episode:
    """An episode of a raw robosuite file, its observations regenerated from the states.

    States are those *before* each action, and the one after the last action is not in the file, so the last action is
    left out.
    """
    if options.observe_state is None:
        raise DataError(
            f"{origin} has no observations; they can be regenerated where the simulator is installed ('sim')"
        )
    if "states" not in demo:
        raise DataError(f"{origin} has neither observations nor states; expected a robosuite or robomimic file")
    rows, actions = read_rows(demo, origin), _actions(demo, robot, origin, losses)
    if len(rows) < 2:
        raise DataError(f"{origin} has {len(rows)} states; expected at least 2")
    losses.remark("each episode's last action is left out, for the state after it is not in the file")
    if "rewards" in demo:
        losses.remark("success is told from the simulator's states, not from the file's rewards")
    observations, solved = observe_states(rows, options)
    kept = np.arange(len(rows))
    if options.trim_idle:
        idle = np.append(_idle(actions[:-1], rows[:, _FINGERS]), False)  # the last state is kept
        if first := np.flatnonzero(solved[1:])[:1].tolist():
            idle[first[0] : first[0] + 2] = False  # nor does the first success, or the step to it, get lost
        if idle[:-1].all():
            raise DataError(f"{origin} is idle throughout; leave it out")
        kept = kept[~idle]
    episode = human_episode(
        {key: values[kept] for key, values in observations.items()},
        actions[kept[:-1]],
        robot,
        rewards=solved[kept[1:]].astype(np.float32),
        states=rows[kept],
    )
    if solved[0] and not episode.success:
        losses.remark("an episode begins solved")
    return episode


def _idle(actions: FloatArray, fingers: npt.NDArray[np.float64]) -> Flags:
    """Mask (T,) of the steps that command nothing and move no finger; finger positions are (T + 1, 2)."""
    commands_motion = np.abs(actions[:, :_ARM_DIMS]).max(1) > 0
    gripper_changes = np.diff(actions[:, -1], prepend=actions[:1, -1]) != 0
    moves = np.abs(np.diff(fingers, axis=0)).max(1) > _STILL
    idle: Flags = ~(commands_motion | gripper_changes | moves)
    return idle


def robomimic_episode(
    demo: h5py.Group, robot: RobotSpec, options: DemoOptions, outcome: Outcome, origin: str, losses: Losses
) -> Episode:
    """An episode of a low-dim file of robomimic's."""
    actions = _actions(demo, robot, origin, losses)
    observations = _observations(demo, robot, origin, losses)
    states = None
    if "states" in demo:
        before = read_rows(demo, origin)
        states = np.concatenate([before, before[-1:]])
        losses.remark("the state after the last action is not in the file and repeats the one before it")
    check_unit(observations, options.robot, origin)
    if states is not None:
        check_w_last(observations, states, options, origin)
    if "dones" in demo and np.asarray(demo["dones"])[:-1].any():
        losses.leave_out("dones before the last step")
    known = {"actions", "states", "rewards", "dones", "obs", "next_obs"}
    losses.leave_out(*sorted(set(demo) - known))
    _turn_around(observations, losses)
    rewards = losses.to_float32(outcome.rewards, "rewards")
    return human_episode(observations, actions, robot, rewards=rewards, solved=outcome.solved, states=states)


def _turn_around(observations: dict[str, FloatArray], losses: Losses) -> None:
    """The cube's position relative to the gripper, where the file has the gripper's relative to the cube.

    robosuite turned it around with version 1.5 (Lift's gripper_to_cube_pos); a policy that learned from the one is blind
    with the other, and no shape tells. So the numbers themselves are asked.
    """
    cube, eef = observations.get("object"), observations.get(EEF_POS)
    if cube is None or eef is None or cube.shape[1:] != (10,) or eef.shape[1:] != (3,):
        return
    offset, recorded = cube[:, :3] - eef, cube[:, 7:]
    if np.abs(recorded + offset).max() < _SAME_PLACE < np.abs(recorded - offset).max():
        cube[:, 7:] *= -1
        losses.remark("the gripper's position relative to the cube is turned around, as robosuite 1.5 has it")


def own_episode(demo: h5py.Group, robot: RobotSpec, origin: str, losses: Losses) -> Episode:
    """A whole episode of a file written here, every column of it."""
    actions = _actions(demo, robot, origin, losses)
    columns: dict[str, Any] = {}
    for column in STEP_COLUMNS[1:]:
        name = stored_name(column.hdf5, demo)
        if name in demo or column.fill is None:
            columns[column.attribute] = column.typed(demo[name][()])
    for column in OBSERVATION_COLUMNS:
        if column.hdf5 in demo or column.attribute == "time_ns":
            whole = np.concatenate([demo[column.hdf5][()], demo[f"last/{column.hdf5}"][()]])
            columns[column.attribute] = column.typed(whole)
    info = json.loads(demo.attrs["info"])
    observations = _observations(demo, robot, origin, losses)
    return human_episode(observations, actions, robot, **columns, action=actions, info=info)


def _observations(demo: h5py.Group, robot: RobotSpec, origin: str, losses: Losses) -> dict[str, FloatArray]:
    """The robot's observations (T + 1, ...) of a demonstration with groups ``obs`` and ``next_obs``."""
    observations = {}
    for spec in robot.observations:
        if spec.key not in demo["obs"]:
            keys = ", ".join(demo["obs"])
            raise DataError(f"{origin}: no observation {spec.key!r}, which task {robot.task!r} needs; it has {keys}")
        before = _rows(demo["obs"][spec.key], spec, losses)
        if before.shape[1:] != spec.shape:
            raise DataError(f"{origin}: observation {spec.key!r} has shape {before.shape[1:]}, expected {spec.shape}")
        after = before
        if "next_obs" in demo:
            if spec.key not in demo["next_obs"]:
                raise DataError(f"{origin}: next_obs has no {spec.key!r}, and obs has; expected the same keys")
            after = _rows(demo["next_obs"][spec.key], spec, losses)
            if spec.key == EEF_POS:
                _check_order(before, after, origin)
        else:
            losses.remark("the observation after the last action is not in the file and repeats the one before it")
        observations[spec.key] = np.concatenate([before, after[-1:]])
        check_finite(observations[spec.key], origin, f"the observation {spec.key!r}")
    losses.leave_out(*(f"obs/{key}" for key in demo["obs"] if key not in observations))
    return observations


def _rows(array: h5py.Dataset, spec: ArraySpec, losses: Losses) -> FloatArray:
    """An observation (T, ...); one number a step may stand without an axis of its own."""
    rows = losses.to_float32(array, f"obs/{spec.key}")
    return rows[:, None] if rows.ndim == 1 and spec.shape == (1,) else rows


def _check_order(before: FloatArray, after: FloatArray, origin: str) -> None:
    """Refuse positions (T, 3) each of which is not where the step before it ended (T, 3)."""
    apart = np.linalg.norm(after[:-1] - before[1:], axis=1)
    if wrong := np.flatnonzero(apart > _SAME_FRAME).tolist():
        step = wrong[0]
        raise DataError(
            f"{origin}, step {step + 1}: obs/{EEF_POS} is {apart[step]:.2g} m from next_obs of the step before; frames are "
            f"missing or out of order, put them in order or leave the demonstration out"
        )


def _actions(demo: h5py.Group, robot: RobotSpec, origin: str, losses: Losses) -> FloatArray:
    """Actions (T, A) as recorded, beyond the controller's range if they were."""
    actions = losses.to_float32(demo["actions"], "actions")
    if actions.ndim != 2 or actions.shape[1] != robot.action_dim or not len(actions):
        raise DataError(
            f"{origin} has actions of shape {actions.shape}; task {robot.task!r} takes (T, {robot.action_dim})"
        )
    check_finite(actions, origin, "its actions")
    return actions
