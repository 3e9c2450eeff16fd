"""Measure jumps of the action where chunks meet: simulated Lift in lockstep, chunks on a made-up network with a known delay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.export.onnx_policy import Engine, OnnxPolicy
from sacflow_robot.robot.control.action_queue import ActionQueue
from sacflow_robot.spec import FloatArray, Observation, PolicySpec
from sacflow_robot.utils.seeding import chunk_noise

_FIRST_SEED = 10_000
_EEF = "robot0_eef_pos"


class DelayedPolicy:
    """A local policy whose answers take ``delay_ns`` on a clock of its own, as a client that ActionQueue asks."""

    def __init__(self, policy: OnnxPolicy, delay_ns: int) -> None:
        self._policy, self._delay_ns = policy, delay_ns
        self.now_ns, self._count = 0, 0
        self._answer: tuple[int, int, FloatArray] | None = None

    @property
    def spec(self) -> PolicySpec:
        return self._policy.spec

    def clock_ns(self) -> int:
        return self.now_ns

    @property
    def takes_prefix(self) -> bool:
        return self._policy.takes_prefix

    def ask(
        self,
        observation: Observation,
        noise: FloatArray | None = None,
        deadline_s: float | None = None,
        *,
        prefix: FloatArray | None = None,
        prefix_mask: FloatArray | None = None,
    ) -> int:
        infer: Any = self._policy.infer
        decided = {} if prefix is None else {"prefix": prefix, "prefix_mask": prefix_mask}
        self._count += 1
        self._answer = self._count, self.now_ns + self._delay_ns, infer(observation, noise, **decided)
        return self._count

    def collect(self, number: int, wait_s: float | None = None) -> FloatArray:
        assert self._answer is not None and self._answer[0] == number
        if wait_s is None:  # the robot stands still meanwhile
            return self._answer[2]
        if self.now_ns < self._answer[1]:
            raise TimeoutError
        return self._answer[2]

    def keep_alive(self) -> None:
        """It is always there."""


def seams(
    path: Path, engine: Engine, episodes: int = 10, delays_ms: tuple[int, ...] = (10, 90)
) -> list[dict[str, Any]]:
    """Two rows per way of joining chunks and delay of the answers.

    Accelerations in m/s^2: ``commanded`` is what consecutive translation commands ask for, ``measured`` that of the gripper,
    from its positions; each where a new chunk begins to be played (``seam``) and elsewhere (``within``). Needs robosuite.
    """
    from sacflow_robot.envs.robosuite_env import RobosuiteEnv

    policy = OnnxPolicy(path, engine)
    ways = [("switch", 0, False), ("blend", 2, False)]
    if policy.takes_prefix:
        ways += [("prefix", 0, True), ("prefix, blend", 2, True)]
    env, rows = RobosuiteEnv(policy.spec.robot.task), []
    for delay_ms in delays_ms:
        for way, blend, prefix in ways:
            parts, solved = [], 0
            for seed in range(_FIRST_SEED, _FIRST_SEED + episodes):
                network = DelayedPolicy(policy, delay_ms * 1_000_000)
                stream = ActionQueue(network, blend=blend, prefix=prefix, clock_ns=network.clock_ns)
                part, success = _play(env, network, stream, seed)
                parts.append(part)
                solved += success
            commanded, measured, joined = (np.concatenate(column) for column in zip(*parts, strict=True))
            row = {"velocity": policy.spec.velocity, "mode": way, "delay_ms": delay_ms, "episodes": episodes}
            row |= {"solved": solved, "success_rate": round(solved / episodes, 3), "seams": int(joined.sum())}
            for what, values in (("commanded", commanded), ("measured", measured)):
                figures: dict[str, Any] = {"acceleration": what}
                for where, chosen in (("seam", values[joined]), ("within", values[~joined])):
                    percentiles = np.percentile(chosen, [50, 99, 100]) if len(chosen) else np.full(3, np.nan)
                    for name, value in zip(("p50", "p99", "max"), percentiles, strict=True):
                        figures[f"{where}_{name}"] = round(float(value), 2)
                rows.append({**row, **figures})
    return rows


def _play(
    env: Any, network: DelayedPolicy, stream: ActionQueue, seed: int
) -> tuple[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]], bool]:
    """One episode: accelerations commanded and measured, and whether a chunk began there, from the second step on."""
    from sacflow_robot.envs.tasks import METERS_PER_ACTION

    rate = network.spec.robot.control_rate_hz
    result = env.begin(seed)
    places, joined = [result.observation[_EEF]], []
    actions: list[FloatArray] = []
    while not result.ended:
        noise = chunk_noise(network.spec.noise_shape, seed, len(actions))
        step = stream.step(result.observation, noise)
        action = np.zeros(network.spec.robot.action_dim, np.float32) if step.action is None else step.action
        actions.append(network.spec.robot.check_action(action))
        joined.append(step.joined)
        result = env.command(actions[-1])
        places.append(result.observation[_EEF])
        network.now_ns += network.spec.robot.period_ns
    commanded = np.linalg.norm(np.diff(np.array(actions)[:, :3], axis=0), axis=1) * METERS_PER_ACTION * rate**2
    measured = np.linalg.norm(np.diff(np.array(places, np.float64), 2, axis=0), axis=1) * rate**2
    return (commanded, measured, np.array(joined[1:])), result.terminated


def has_gripper_position(path: Path) -> bool:
    """True if seams can be measured with this policy."""
    return any(array.key == _EEF for array in OnnxPolicy(path).spec.robot.observations)
