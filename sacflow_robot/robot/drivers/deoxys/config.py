"""deoxys's YAML file, and what this package reads of it besides."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sacflow_robot.errors import DataError, UsageError, one_line
from sacflow_robot.robot.drivers.options import Options, check_options
from sacflow_robot.spec import ArraySpec, RobotSpec
from sacflow_robot.utils.rotations import Array

_OURS = "SACFLOW"
_PART = re.compile(r"(?P<between>gripper_to_)?(?P<object>\w+?)_(?P<what>pos|quat)")


@dataclass(frozen=True)
class DeoxysConfig:
    """Sockets, rates of both sides, and the arm's place in the policy's world.

    The first group is deoxys's own (sections ``PC``, ``NUC``, ``CONTROL``, ``GRIPPER``). The second is the section
    ``SACFLOW``, which deoxys does not read; its keys are the names below in capitals.

    Attributes:
        pc_ip: The workstation, where commands are published.
        nuc_ip: The real-time computer, where states are published.
        command_port: ``NUC.SUB_PORT``: arm commands.
        state_port: ``NUC.PUB_PORT``: arm states.
        gripper_command_port: ``NUC.GRIPPER_SUB_PORT``.
        gripper_state_port: ``NUC.GRIPPER_PUB_PORT``.
        state_rate_hz: ``CONTROL.STATE_PUBLISHER_RATE``.
        policy_rate_hz: ``CONTROL.POLICY_RATE``: how often the real-time computer looks for a command.
        gripper_rate_hz: ``GRIPPER.PUB_RATE``.
        task: Task that the policy was trained for.
        horizon: Control periods after which an episode is cut.
        object: Parts of the observation ``object`` in its order: ``NAME_pos`` (3,) m and ``NAME_quat`` (4,) x y z w in
            world, and ``gripper_to_NAME_pos`` (3,) m, the object's position less the gripper's. Empty: no such key.
        objects: Where object poses come from: address of a socket that publishes them, or ``module:function``; see
            ``objects.py``.
        base_pos_in_world: Where the arm's base is in the frame that the policy calls world (m); their axes agree.
        eef_pos_in_ee: Where the point that the policy calls the gripper is in libfranka's end-effector frame (m). The
            default goes from the Franka Hand's (0.1034 m from the flange) to robosuite's (0.097 m).
        meters_per_action: What a translation of 1 commands per control period.
        radians_per_action: What a rotation of 1 commands per control period.
        translational_stiffness: Of OSC_POSE (1/s^2, the controller being decoupled by the mass).
        rotational_stiffness: Likewise.
        residual_mass_vec: deoxys's correction of the joints' mass (kg m^2), seven of them.
        time_fraction: Share of a control period within which LINEAR_POSE reaches the goal.
        absolute_hold: Whether an arm that stands still is held at an absolute goal, which keeps its place under a load. Only for
            deoxys from 14 August 2023 on: older ones take an absolute position for a delta, and the arm runs away.
        joints: Whether joint positions are observed as well, which calibration needs and no policy here was trained with.
        arm_stamps: Whether observations carry the arm's own times, whose offset a profile then has to say, in place of the
            times of their arrival.
        stale_s: Refuse an arm whose states are older than this.
        reset: The twin's side channel; no such thing on an arm.
    """

    pc_ip: str
    nuc_ip: str
    command_port: int
    state_port: int
    gripper_command_port: int
    gripper_state_port: int
    state_rate_hz: float = 100.0
    policy_rate_hz: float = 20.0
    gripper_rate_hz: float = 40.0
    task: str = "lift"
    horizon: int = 300
    object: tuple[str, ...] = ()
    objects: str = ""
    base_pos_in_world: tuple[float, ...] = (0.0, 0.0, 0.0)
    eef_pos_in_ee: tuple[float, ...] = (0.0, 0.0, -0.0064)
    meters_per_action: float = 0.05
    radians_per_action: float = 0.5
    translational_stiffness: float = 150.0
    rotational_stiffness: float = 250.0
    residual_mass_vec: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5)
    time_fraction: float = 0.3
    absolute_hold: bool = False
    joints: bool = False
    arm_stamps: bool = False
    stale_s: float = 0.5
    reset: str = ""

    @property
    def action_scale(self) -> Array:
        """Meters and radians that an action of 1 commands (6,)."""
        return np.repeat([self.meters_per_action, self.radians_per_action], 3)

    @property
    def arm(self) -> RobotSpec:
        """The arm as a robot: robosuite's Panda under OSC_POSE delta control, by robomimic's keys."""
        observations = [
            ArraySpec("robot0_eef_pos", (3,), "m", "world"),
            ArraySpec("robot0_eef_quat", (4,), "unit quaternion xyzw", "world", quaternions=(0,)),
            ArraySpec("robot0_gripper_qpos", (2,), "m"),
        ]
        if self.object:
            sizes = [4 if part.endswith("_quat") else 3 for part in self.object]
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            quaternions = tuple(s for s, size in zip(starts, sizes, strict=True) if size == 4)
            unit = "m, unit quaternion xyzw"
            observations.append(ArraySpec("object", (sum(sizes),), unit, "world", quaternions=quaternions))
        if self.joints:
            observations.append(ArraySpec("robot0_joint_pos", (7,), "rad"))
        meters, radians = f"{self.meters_per_action:g} m", f"{self.radians_per_action:g} rad"
        return RobotSpec(
            robot="Panda",
            task=self.task,
            controller="OSC_POSE delta",
            control_rate_hz=self.policy_rate_hz,
            observations=tuple(observations),
            action_names=("x", "y", "z", "rx", "ry", "rz", "gripper"),
            action_units=(meters,) * 3 + (radians,) * 3 + ("closing",),
            action_low=(-1.0,) * 7,
            action_high=(1.0,) * 7,
        )


def split_part(part: str) -> tuple[bool, str, str]:
    """A part of the observation ``object``: whether it is relative to the gripper, of which object, ``pos`` or
    ``quat``.

    Raises:
        ValueError: It has no known form.
    """
    found = _PART.fullmatch(part)
    if found is None or (found["between"] and found["what"] == "quat"):
        raise ValueError(f"{part!r} is not a part of 'object'; expected NAME_pos, NAME_quat or gripper_to_NAME_pos")
    return bool(found["between"]), found["object"], found["what"]


def load_config(path: Path | str) -> DeoxysConfig:
    """Read a deoxys YAML file.

    Raises:
        DataError: It cannot be read, lacks what deoxys itself needs, or has a value that makes no sense.
    """
    try:
        data = yaml.safe_load(Path(path).read_text())
        pc, nuc = data["PC"], data["NUC"]
        control, gripper = data.get("CONTROL") or {}, data.get("GRIPPER") or {}
        values: dict[str, Any] = {
            "pc_ip": str(pc["IP"]),
            "nuc_ip": str(nuc["IP"]),
            "command_port": nuc["SUB_PORT"],
            "state_port": nuc["PUB_PORT"],
            "gripper_command_port": nuc["GRIPPER_SUB_PORT"],
            "gripper_state_port": nuc["GRIPPER_PUB_PORT"],
            "state_rate_hz": control.get("STATE_PUBLISHER_RATE", 100),
            "policy_rate_hz": control.get("POLICY_RATE", 20),
            "gripper_rate_hz": gripper.get("PUB_RATE", 40),
        }
        known = {f.name.upper(): f.name for f in fields(DeoxysConfig) if f.name not in values}
        for key, value in (data.get(_OURS) or {}).items():
            if key not in known:
                raise ValueError(f"unknown key {_OURS}.{key}; valid keys: {', '.join(known)}")
            values[known[key]] = value
        return _checked(values)
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"deoxys file {path} cannot be read: {one_line(error)}") from None
    except KeyError as error:
        raise DataError(f"deoxys file {path} lacks {error}; it needs PC.IP, NUC.IP and NUC's four ports") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"deoxys file {path}: {one_line(error)}") from None


def with_options(config: DeoxysConfig, options: Options) -> DeoxysConfig:
    """The configuration with the options of a robot's name in place of the file's."""
    switches = "joints", "arm_stamps"
    check_options("deoxys", options, ["task", "nuc_ip", "pc_ip", *switches])
    for name in switches:
        if options.get(name, "0") not in ("0", "1"):
            raise UsageError(f"deoxys: {name} is {options[name]!r}, expected 0 or 1")
    values: dict[str, Any] = {name: text == "1" if name in switches else text for name, text in options.items()}
    return replace(config, **values)


def _checked(values: Mapping[str, Any]) -> DeoxysConfig:
    """Convert and check the values; raises TypeError or ValueError."""
    lengths = {"base_pos_in_world": 3, "eef_pos_in_ee": 3, "residual_mass_vec": 7}
    made: dict[str, Any] = {}
    for field in fields(DeoxysConfig):
        if field.name not in values:
            continue
        value = values[field.name]
        if field.name in lengths:
            value = tuple(float(v) for v in value)
            if len(value) != lengths[field.name]:
                raise ValueError(f"{field.name.upper()} has {len(value)} numbers, expected {lengths[field.name]}")
        elif field.name == "object":
            value = tuple(map(str, value))
            for part in value:
                split_part(part)
        elif field.type is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{field.name.upper()} is {value!r}; it must be true or false")
        elif field.type is float:
            value = float(value)
            if not 0 < value < 1e6:
                raise ValueError(f"{field.name.upper()} is {value:g}; it must be positive")
        elif field.type is int:
            if not isinstance(value, int) or not 0 < value < (65536 if field.name.endswith("port") else 10**9):
                raise ValueError(f"{field.name.upper()} is {value!r}; it must be a whole number, and one that can be")
        else:
            value = str(value)
        made[field.name] = value
    return DeoxysConfig(**made)
