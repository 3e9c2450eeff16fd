"""A model without what is only there to be looked at."""

from __future__ import annotations

import copy
from typing import Any

import mujoco
import numpy as np

_MOVES = ("body_", "jnt_", "dof_", "actuator_", "eq_", "tendon_", "qpos", "site_pos", "site_quat", "site_bodyid")
_OF_GEOMS = (
    "body_geom",
    "body_bvh",
    "body_rbound",
    "body_plugin",
    "dof_length",
)  # where geoms are listed, not how bodies move
_GEOM = ("type", "contype", "conaffinity", "condim", "priority", "size", "pos", "quat", "friction", "solref", "solimp",
         "solmix", "margin", "gap", "rbound", "aabb", "bodyid")  # fmt: skip


def lean_model(suite: Any) -> mujoco.MjModel:
    """The model of a robosuite environment without visual geoms and their meshes, which moves the same to the last bit.

    MuJoCo clears a flag for every node of every mesh's bounding volumes in each step, 364 kB in the Panda's scene; without
    the visual meshes it is 29 kB, and the whole model is 3 MB instead of 64. Bodies, joints, motors and sites keep their
    ids, geoms do not.

    Returns:
        The lean model; a copy of the whole one if anything that moves differs between the two.
    """
    whole = suite.sim.model._model
    spec = mujoco.MjSpec.from_string(suite.model.get_xml())
    spec.compiler.discardvisual = True
    lean = spec.compile()
    lean.body_pos[:], lean.body_quat[:] = whole.body_pos, whole.body_quat  # resets place bodies in the model itself
    return lean if _moves_the_same(lean, whole) else copy.copy(whole)


def _moves_the_same(lean: mujoco.MjModel, whole: mujoco.MjModel) -> bool:
    arrays = [
        (getattr(lean, name), getattr(whole, name))
        for name in dir(whole)
        if name.startswith(_MOVES) and not name.startswith(_OF_GEOMS)
    ]
    colliding = np.flatnonzero(whole.geom_contype | whole.geom_conaffinity)
    kept = np.flatnonzero(lean.geom_contype | lean.geom_conaffinity)
    if len(kept) != len(colliding):
        return False
    arrays += [(getattr(lean, f"geom_{name}")[kept], getattr(whole, f"geom_{name}")[colliding]) for name in _GEOM]
    arrays += [(getattr(lean.opt, n), getattr(whole.opt, n)) for n in dir(whole.opt) if not n.startswith("_")]
    return all(callable(a) or np.array_equal(a, b) for a, b in arrays)
