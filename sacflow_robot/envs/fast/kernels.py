"""The control step in machine code: robosuite's controller around MuJoCo's own step functions.

Numba compiles it; it runs without the interpreter's lock and is cached on disk. ``model`` and ``data`` are addresses of an
``mjModel`` and its ``mjData``, ``views`` the arrays of the latter.
"""

from pathlib import Path

import llvmlite.binding
import mujoco
import numpy as np
import numpy.typing as npt
from numba import types

from sacflow_robot.envs.fast.controller import delay_torques, set_goal, torques, wanted_force
from sacflow_robot.envs.fast.jit import external, kernel
from sacflow_robot.envs.fast.linear_algebra import make_scratch
from sacflow_robot.envs.fast.observation import at_goal, note
from sacflow_robot.envs.fast.step_data import ACTION, ARM, Floats, Memory, Plan, Reals, Scratch, Views


def _load_mujoco() -> None:
    """Make MuJoCo's functions known by name to what Numba compiles, now and from its cache."""
    folder = Path(mujoco.__file__).parent
    libraries = [p for p in sorted(folder.glob("*mujoco*")) if ".so" in p.name or p.suffix in (".dylib", ".dll")]
    if not libraries:
        raise ImportError(f"no shared library of MuJoCo in {folder}")
    llvmlite.binding.load_library_permanently(str(libraries[0]))


_load_mujoco()

_mj_step1 = external("mj_step1", 2)
_mj_step2 = external("mj_step2", 2)
_mj_step = external("mj_step", 2)
_mj_kinematics = external("mj_kinematics", 2)
_mj_collision = external("mj_collision", 2)
_mj_jac_site = external("mj_jacSite", 4, types.int32)


@kernel
def _substep(model: int, data: int, views: Views, plan: Plan, memory: Memory, s: Scratch) -> None:
    """The second half of a substep, toward the goal in the scratch; ``mj_step1`` is the first."""
    rows = memory.jacobian.ctypes.data
    row_bytes = memory.jacobian.shape[1] * 8
    _mj_jac_site(model, data, rows, rows + 3 * row_bytes, plan.grip_site)
    for i in range(6):
        for k in range(ARM):
            s.jacobian[i, k] = memory.jacobian[i, plan.dofs[k]]
    wanted_force(views, plan, memory, s)
    torques(views, plan, memory.rest, s)
    if plan.torque_delay > 0.0:
        delay_torques(plan, memory, s)
    for k in range(ARM):
        motor = plan.motors[k]
        views.ctrl[motor] = min(max(s.torques[k], plan.ctrl_low[motor]), plan.ctrl_high[motor])
    for k in range(2):
        motor = plan.finger_motors[k]
        command = plan.finger_bias[k] + plan.finger_weight[k] * memory.fingers[k]
        views.ctrl[motor] = min(max(command, plan.ctrl_low[motor]), plan.ctrl_high[motor])
    _mj_step2(model, data)
    memory.time[0] += plan.timestep


@kernel
def _move_fingers(plan: Plan, memory: Memory, command: float) -> None:
    for i in range(2):
        toward = -1.0 if i == 0 else 1.0
        moved = memory.fingers[i] + toward * plan.finger_speed * np.sign(command)
        memory.fingers[i] = min(max(moved, -1.0), 1.0)


@kernel
def _control(model: int, data: int, views: Views, plan: Plan, memory: Memory, s: Scratch, action: Reals) -> None:
    """One control period."""
    _move_fingers(plan, memory, action[ACTION - 1])
    for substep in range(plan.substeps):
        _mj_step1(model, data)
        if substep == 0:
            set_goal(views, plan, action, s)
        _substep(model, data, views, plan, memory, s)
    _mj_kinematics(model, data)
    if plan.goal_contacts:
        _mj_collision(model, data)


@kernel
def execute(
    model: int, data: int, views: Views, plan: Plan, memory: Memory, actions: Reals, observations: Floats, states: Reals
) -> int:
    """Execute actions (H, 7) until the object is where the task wants it.

    Args:
        observations: (H, D), written.
        states: (H, S), written except for the poses of placed bodies at their end.

    Returns:
        Number of actions executed; the last one of them led to the goal if ``at_goal`` says so.
    """
    scratch = make_scratch()
    for t in range(len(actions)):
        _control(model, data, views, plan, memory, scratch, actions[t])
        note(views, plan, memory, observations[t], states[t])
        if at_goal(views, plan):
            return t + 1
    return len(actions)


@kernel
def follow(
    model: int,
    data: int,
    views: Views,
    plan: Plan,
    memory: Memory,
    commands: Reals,
    every: int,
    grip_every: int,
    observations: Floats,
    joints: Reals,
    states: Reals,
    solved: npt.NDArray[np.bool_],
) -> int:
    """Step a robot that takes up commands at their times, holds their goals while they are valid, and is observed at intervals.

    Args:
        commands: (N, 2 + 7) in order: substep at which it is taken up, substeps for which it is valid, action.
        every: Substeps between two observations.
        grip_every: Substeps between two movements of the fingers by one command.
        observations: (M, D), written; the robot moves for M of them.
        joints: (M, 7), written: positions.
        states: (M, S), written except for the poses of placed bodies at their end.
        solved: (M,), written: True where the object is at the task's goal.

    Returns:
        Observations made; fewer than M where the task was solved.
    """
    scratch, taken, still = make_scratch(), 0, np.zeros(ACTION)
    for step in range(every * len(observations)):
        _mj_step1(model, data)
        fresh = False
        while taken < len(commands) and commands[taken, 0] <= step:
            fresh, taken = True, taken + 1
        if fresh:
            set_goal(views, plan, commands[taken - 1, 2:], scratch)
            memory.valid[0] = commands[taken - 1, 1]
            memory.gripping[0] = commands[taken - 1, 2 + ACTION - 1]
        elif memory.valid[0] == 0.0:
            set_goal(views, plan, still, scratch)
        if fresh or memory.valid[0] == 0.0:
            for i in range(3):
                memory.goal[i] = scratch.goal_position[i]
                for j in range(3):
                    memory.goal[3 + 3 * i + j] = scratch.goal_matrix[i, j]
        memory.valid[0] -= 1.0
        if memory.gripping[0] != 0.0 and memory.gripping[1] <= 0.0:
            _move_fingers(plan, memory, memory.gripping[0])
            memory.gripping[1] = grip_every
        memory.gripping[1] -= 1.0
        for i in range(3):
            scratch.goal_position[i] = memory.goal[i]
            for j in range(3):
                scratch.goal_matrix[i, j] = memory.goal[3 + 3 * i + j]
        _substep(model, data, views, plan, memory, scratch)
        if (step + 1) % every:
            continue
        row = (step + 1) // every - 1
        _mj_kinematics(model, data)
        if plan.goal_contacts:
            _mj_collision(model, data)
        note(views, plan, memory, observations[row], states[row])
        for k in range(ARM):
            joints[row, k] = views.qpos[plan.joints[k]]
        solved[row] = at_goal(views, plan)
        if solved[row]:
            return row + 1
    return len(observations)


@kernel
def physics_only(model: int, data: int, views: Views, states: Reals, controls: Reals, substeps: int) -> None:
    """The physics alone, as the limit for benchmarks: a control step from each of the states (T, S), with motor controls (T, nu)."""
    nq = len(views.qpos)
    for t in range(len(states)):
        for i in range(nq):
            views.qpos[i] = states[t, 1 + i]
        for i in range(len(views.qvel)):
            views.qvel[i] = states[t, 1 + nq + i]
        for i in range(len(views.ctrl)):
            views.ctrl[i] = controls[t, i]
        for _ in range(substeps):
            _mj_step(model, data)
