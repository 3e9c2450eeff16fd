"""Control steps per second of the simulated tasks: robosuite as it is, our engines, and what the physics alone would allow.

All engines take the same steps from the same states, in turns of a fraction of a second, so that whatever else the machine
does meets all of them; a rate is that of the median turn.
"""

import copy
import multiprocessing as mp
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from typing import Any, Literal, get_args

from sacflow_robot.envs import gl as gl  # before MuJoCo, which else loads OpenGL

# isort: split

import mujoco
import numpy as np

from sacflow_robot.envs.collector import evaluation_envs, rollout
from sacflow_robot.envs.fast.fast_robot import FastRobot
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.episode import Episode
from sacflow_robot.export.onnx_policy import OnnxPolicy
from sacflow_robot.spec import Engine

BenchEngine = Literal["stock", "stripped", "compiled", "physics"]
"""robosuite's own ``step``; the same without what nobody reads, as ``--env-engine stock`` has it; ``--env-engine compiled``;
and 25 times ``mj_step`` per control step."""

ENGINES: tuple[BenchEngine, ...] = ("stock", "stripped", "compiled", "physics")

_STEPS = 50  # per turn and worker, well within an episode
_EVAL_SEED = 10_000
_CHUNK = 5  # actions at once, as the shipped policies choose them


def measure(task: str, workers: Sequence[int], turns: int) -> list[dict[str, Any]]:
    """A row per engine and number of workers: control steps per second of all of them together, of the median turn.

    Workers are robots at once: processes, or threads for ``compiled`` and ``physics``.
    """
    times: dict[tuple[BenchEngine, int], list[float]] = {}
    most, context = max(workers), mp.get_context("spawn")
    barriers = [context.Barrier(count) for count in workers], [threading.Barrier(count) for count in workers]
    with (
        ProcessPoolExecutor(most, context, _take_barriers, (barriers[0],)) as processes,
        ThreadPoolExecutor(most, initializer=_take_barriers, initargs=(barriers[1],)) as threads,
    ):
        for turn in range(turns + 1):
            for i, count in enumerate(workers):
                for engine in ENGINES:
                    pool = threads if engine in ("compiled", "physics") else processes
                    jobs = [pool.submit(_turn, task, engine, worker, turn, i) for worker in range(count)]
                    spent = max(job.result() for job in jobs)
                    if turn > 0:  # the first one warms up
                        times.setdefault((engine, count), []).append(spent)
    return [
        {"task": task, "engine": engine, "workers": count, "steps_per_s": round(count * _STEPS / np.median(spent), 1)}
        for (engine, count), spent in times.items()
    ]


_here = threading.local()  # the barriers of this thread, or of a process's only one


def _take_barriers(barriers: list[Any]) -> None:
    _here.barriers = barriers


def _turn(task: str, engine: BenchEngine, worker: int, turn: int, barrier: int) -> float:
    """Seconds that ``_STEPS`` control steps take once all workers are ready."""
    rng = np.random.default_rng(turn)
    actions = rng.uniform(-1, 1, (_STEPS, 7))
    if engine in ("compiled", "physics"):
        work = _native(task).prepare(engine, worker, actions, turn)
    else:
        env = _interpreted(task)
        env.begin(turn)
        step = env._suite.step if engine == "stock" else env.command
        work = partial(list, map(step, actions))
    _here.barriers[barrier].wait(timeout=600)
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


_interpreted = cache(RobosuiteEnv)


def measure_evaluation(policy: OnnxPolicy, episodes: int, turns: int) -> tuple[list[dict[str, Any]], bool]:
    """Time the same episodes under either engine, in turns, as ``sacflow-robot eval`` runs them.

    Returns:
        A row per engine, its ``seconds`` the median over the turns; and whether all actions are equal to the last bit.
    """
    task = policy.spec.robot.task
    engines: tuple[Engine, ...] = get_args(Engine)
    times: dict[Engine, list[float]] = {engine: [] for engine in engines}
    ran: dict[Engine, dict[int, Episode]] = {}
    seeds = range(_EVAL_SEED, _EVAL_SEED + episodes)
    with ExitStack() as stack:
        envs = {e: stack.enter_context(evaluation_envs(task, episodes, e)) for e in engines}
        for turn in range(turns + 1):
            for engine in engines:
                began = time.perf_counter()
                run = list(rollout(envs[engine], policy.spec.noise_shape, policy.infer, seeds[: None if turn else 4]))
                if turn > 0:  # the first one warms up
                    times[engine].append(time.perf_counter() - began)
                    ran[engine] = {episode.info["seed"]: episode for episode in run}
    rows = []
    for engine, spent in times.items():
        solved = sum(episode.success for episode in ran[engine].values())
        seconds = round(float(np.median(spent)), 3)
        rows.append({"engine": engine, "episodes": episodes, "successes": solved, "seconds": seconds})
    first, second = (ran[engine] for engine in engines)
    same = all(np.array_equal(first[seed].action, second[seed].action) for seed in seeds)
    return rows, same


class _Native:
    """Robots of a task in threads."""

    def __init__(self, task: str) -> None:
        self._env = RobosuiteEnv(task)
        self._task = self._env.compile_task()
        self._envs: dict[tuple[BenchEngine, int], tuple[FastRobot, mujoco.MjModel, mujoco.MjData]] = {}
        self._lock = threading.Lock()

    def prepare(self, engine: BenchEngine, worker: int, actions: Any, turn: int) -> Callable[[], Any]:
        """Return the function to be timed."""
        with self._lock:
            start = self._env.draw_start(np.random.default_rng(turn))
            if (engine, worker) not in self._envs:
                # The limit is that of the model as robosuite has it; ours leaves out what is only there to be looked at.
                model = copy.copy(self._env.model if engine == "physics" else self._task.model)
                data = mujoco.MjData(model)
                self._envs[engine, worker] = FastRobot(self._task, model, data), model, data
            robot, model, data = self._envs[engine, worker]
            self._env.layout.write(start, model, data)
            robot.begin(start)
            if engine == "compiled":
                return lambda: [robot.execute(actions[t : t + _CHUNK]) for t in range(0, _STEPS, _CHUNK)]
            states, controls = [self._env.layout.read(model, data)], [data.ctrl.copy()]
            for action in actions[:-1]:
                states.append(robot.execute(action[None])[1][0])
                controls.append(data.ctrl.copy())
            self._env.layout.write(start, model, data)
            rows = np.array(states), np.array(controls)
            return lambda: robot.physics_only(*rows)


_native = cache(_Native)
