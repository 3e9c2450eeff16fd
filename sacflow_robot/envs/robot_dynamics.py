"""Measured dynamics of a robot in the simulator: joints and payload in MuJoCo's model, gains in the controller.

The controller keeps the nominal model, as a robot's own controller does: it compensates gravity and inertia of the robot as
built, without payload and with nominal motors.
"""

import mujoco
import numpy as np

from sacflow_robot.envs.fast.step_data import Plan
from sacflow_robot.envs.robot_parameters import RobotParameters
from sacflow_robot.spec import Array

_MOST_INERTIA_KG_M2 = 1e-6  # of the payload about its own center: a point


class RobotDynamics:
    """Joints, payload and gains of one ``mjModel`` and of the plan that steps it.

    Args:
        model: Changed in place; no other robot may share it.
        plan: The nominal plan of the compiled step.
    """

    def __init__(self, model: mujoco.MjModel, plan: Plan) -> None:
        self._model = model
        self._nominal = plan
        self._own = {name: getattr(model, name)[plan.dofs].copy() for name in _JOINTS.values()}
        self._hand = int(model.site_bodyid[plan.grip_site])
        fields = "body_mass", "body_ipos", "body_inertia", "body_sameframe"
        self._hand_as_built = {name: np.copy(getattr(model, name)[self._hand]) for name in fields}
        self._scratch = mujoco.MjData(model)

    def nominal(self) -> RobotParameters:
        """The parameters of the simulator's own robot."""
        plan = self._nominal
        moving, turning = float(plan.kp[0]), float(plan.kp[3])
        return RobotParameters(
            {
                "controller.translation_stiffness_per_s2": (moving,),
                "controller.rotation_stiffness_per_s2": (turning,),
                "controller.damping_ratio": (float(plan.kd[0]) / (2 * moving**0.5),),
                "controller.actuator_delay_ms": (0.0,),
                **{name: tuple(map(float, self._own[field])) for name, field in _JOINTS.items()},
                "payload.mass_kg": (0.0,),
                "payload.center_m": (0.0, 0.0, 0.0),
            }
        )

    def apply(self, robot: RobotParameters) -> Plan:
        """Give the robot those dynamics, nominal where they name nothing; returns the plan to step it by."""
        nominal, full = self._nominal, self.nominal().having(robot.values)
        for name, field in _JOINTS.items():
            getattr(self._model, field)[nominal.dofs] = full.values[name]
        mass, center = full.number("payload.mass_kg"), np.array(full.values["payload.center_m"])
        self._load(mass, center)
        mujoco.mj_setConst(self._model, self._scratch)
        gains = nominal.kp, nominal.kd
        if any(name in robot for name in (*_STIFFNESS, "controller.damping_ratio")):
            stiffness = np.repeat([full.number(n) for n in _STIFFNESS], 3)
            gains = stiffness, 2 * full.number("controller.damping_ratio") * np.sqrt(stiffness)
        return nominal._replace(
            kp=gains[0],
            kd=gains[1],
            armature_error=np.array(full.values["joints.armature_kg_m2"]) - self._own["dof_armature"],
            payload_mass=mass,
            payload_center=center,
            torque_delay=full.number("controller.actuator_delay_ms") / (1e3 * nominal.timestep),
        )

    def _load(self, mass: float, center: Array) -> None:
        """Make the body of the grip site, which has no mass of its own, the payload."""
        model, hand, site = self._model, self._hand, self._nominal.grip_site
        for name, value in self._hand_as_built.items():
            getattr(model, name)[hand] = value
        if mass <= 0:
            return
        matrix = np.zeros(9)
        mujoco.mju_quat2Mat(matrix, model.site_quat[site])
        model.body_mass[hand] = mass
        model.body_ipos[hand] = model.site_pos[site] + matrix.reshape(3, 3) @ center
        model.body_inertia[hand] = _MOST_INERTIA_KG_M2
        model.body_sameframe[hand] = 0  # its center of mass is not at its origin any more


_JOINTS = {
    "joints.damping_nm_s_per_rad": "dof_damping",
    "joints.friction_loss_nm": "dof_frictionloss",
    "joints.armature_kg_m2": "dof_armature",
}
_STIFFNESS = "controller.translation_stiffness_per_s2", "controller.rotation_stiffness_per_s2"
