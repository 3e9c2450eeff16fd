"""A task's model without its visual geoms."""

from __future__ import annotations

import copy
from typing import Any

import mujoco
import numpy as np

_MOVES = ("body_", "jnt_", "dof_", "actuator_", "eq_", "tendon_", "qpos", "site_pos", "site_quat", "site_bodyid")
_OF_GEOMS = ("body_geom", "body_bvh", "body_rbound", "body_plugin", "dof_length")  # lists of geoms, not motion
_GEOM = ("type", "contype", "conaffinity", "condim", "priority", "size", "pos", "quat", "friction", "solref", "solimp",
         "solmix", "margin", "gap", "rbound", "aabb", "bodyid")  # fmt: skip


def strip_visuals(suite: Any) -> mujoco.MjModel:
    """The model of a robosuite environment without visual geoms and their meshes; it moves the same to the last bit.

    MuJoCo clears a flag for every node of every mesh's bounding volumes in each step, 364 kB in the Panda's scene; without
    the visual meshes it is 29 kB, and the whole model is 3 MB instead of 64. Bodies, joints, motors and sites keep their
    ids, geoms do not.

    Returns:
        The stripped model; a copy of the whole one if anything that moves differs between the two.
    """
    whole = suite.sim.model._model
    spec = mujoco.MjSpec.from_string(suite.model.get_xml())
    spec.compiler.discardvisual = True
    stripped = spec.compile()
    stripped.body_pos[:] = whole.body_pos  # resets place bodies in the model itself
    stripped.body_quat[:] = whole.body_quat
    return stripped if _moves_the_same(stripped, whole) else copy.copy(whole)


def _moves_the_same(stripped: mujoco.MjModel, whole: mujoco.MjModel) -> bool:
    arrays = [
        (getattr(stripped, name), getattr(whole, name))
        for name in dir(whole)
        if name.startswith(_MOVES) and not name.startswith(_OF_GEOMS)
    ]
    colliding = np.flatnonzero(whole.geom_contype | whole.geom_conaffinity)
    kept = np.flatnonzero(stripped.geom_contype | stripped.geom_conaffinity)
    if len(kept) != len(colliding):
        return False
    arrays += [(getattr(stripped, f"geom_{name}")[kept], getattr(whole, f"geom_{name}")[colliding]) for name in _GEOM]
    arrays += [(getattr(stripped.opt, n), getattr(whole.opt, n)) for n in dir(whole.opt) if not n.startswith("_")]
    return all(callable(a) or np.array_equal(a, b) for a, b in arrays)
