"""Measure jumps of the action where chunks meet: simulated Lift in lockstep, chunks on a made-up network with a known delay."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sacflow_robot.export.onnx_policy import Engine, OnnxPolicy
from sacflow_robot.robot.control.action_queue import ActionQueue
from sacflow_robot.spec import FloatArray, Observation
from sacflow_robot.utils.seeding import chunk_noise

_FIRST_SEED = 10_000
_DELAYS_MS = 10, 90
_EEF = "robot0_eef_pos"


class DelayedPolicy:
    """A local policy whose answers take ``delay_ns`` on a clock of its own, as a client that ActionQueue asks."""

    def __init__(self, policy: OnnxPolicy, delay_ns: int) -> None:
        self.spec, self.takes_prefix = policy.spec, policy.takes_prefix
        self._policy, self._delay_ns = policy, delay_ns
        self.now_ns = self._number = self._ready_ns = 0

    def ask(self, observation: Observation, noise: Any = None, deadline_s: float | None = None, **decided: Any) -> int:
        self._answer = self._policy.infer(observation, noise, **decided)
        self._number, self._ready_ns = self._number + 1, self.now_ns + self._delay_ns
        return self._number

    def clock_ns(self) -> int:
        return self.now_ns

    def collect(self, number: int, wait_s: float | None = None) -> FloatArray:
        assert self._number == number
        if wait_s is not None and self.now_ns < self._ready_ns:  # else the robot stands still meanwhile
            raise TimeoutError
        return self._answer

    def keep_alive(self) -> None:
        """It is always there."""


def seams(path: Path, engine: Engine, episodes: int) -> list[dict[str, Any]]:
    """Two rows per way of joining chunks and delay of the answers; none for a policy without the gripper's position.

    Accelerations in m/s^2: ``commanded`` is what consecutive translation commands ask for, ``measured`` that of the gripper,
    from its positions; each where a new chunk begins to be played (``seam``) and elsewhere (``within``). Needs robosuite.
    """
    from sacflow_robot.envs.robosuite_env import RobosuiteEnv

    policy = OnnxPolicy(path, engine)
    if all(array.key != _EEF for array in policy.spec.robot.observations):
        return []
    ways = [("switch", 0, False), ("blend", 2, False)]
    if policy.takes_prefix:
        ways += [("prefix", 0, True), ("prefix, blend", 2, True)]
    env, rows = RobosuiteEnv(policy.spec.robot.task), []
    for delay_ms in _DELAYS_MS:
        for way, blend, prefix in ways:
            parts, solved = [], 0
            for seed in range(_FIRST_SEED, _FIRST_SEED + episodes):
                network = DelayedPolicy(policy, delay_ms * 1_000_000)
                stream = ActionQueue(network, blend=blend, prefix=prefix, clock_ns=network.clock_ns)
                *part, success = _play(env, network, stream, seed)
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
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], bool]:
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
    return commanded, measured, np.array(joined[1:]), result.terminated
