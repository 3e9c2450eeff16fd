"""``sacflow-robot eval`` and ``export``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from sacflow_robot.cli import common
from sacflow_robot.errors import UsageError
from sacflow_robot.export.metadata import WeightsKind
from sacflow_robot.spec import NO_ENVIRONMENT, Engine
from sacflow_robot.utils.atomic_files import check_output

if TYPE_CHECKING:
    from sacflow_robot.envs.robot_parameters import RobotParameters
    from sacflow_robot.episode import Episode
    from sacflow_robot.export.onnx_policy import OnnxPolicy
    from sacflow_robot.interfaces import Policy


@dataclass(frozen=True)
class Eval(common.JsonOptions):
    """Success rate of a policy file on held-out seeds, on all cores.

    Attributes:
        policy: Policy file.
        env: Task, any Gymnasium id, or an environment of one's own as MODULE:CLASS or FILE.py:CLASS; by default the policy's own
            task.
        episodes: Episodes to run.
        env_engine: What steps the robots: compiled, or robosuite's own (stock).
        seed: First environment seed; training never uses seeds below 1 000 000.
        robustness: Measure success against delay, noise, mass, friction, gain and lost messages instead: a table and a figure.
        plot: That figure.
    """

    policy: Path
    env: str | None = None
    episodes: int = 100
    env_engine: Engine = "compiled"
    seed: int = common.EVAL_SEED
    robustness: bool = False
    plot: Path = Path("robustness.png")

    def run(self) -> int:
        import time

        import numpy as np

        from sacflow_robot.envs.collector import evaluation_envs
        from sacflow_robot.export.onnx_policy import OnnxPolicy

        if self.episodes < 1 or self.seed < 0:
            raise UsageError("--episodes must be at least 1 and --seed not negative")
        if self.robustness:
            check_output(self.plot, "--plot", parents=False)
        policy = OnnxPolicy(self.policy)
        env, history = self._environment(policy), common.history_of(policy.spec.robot)
        seeds = range(self.seed, self.seed + self.episodes)
        if self.robustness:
            return self._perturb(policy, env, history, seeds)
        with evaluation_envs(env, self.episodes, self.env_engine, history) as envs:
            for each in envs:
                each.begin({0: self.seed})  # returns when it has been built
            start = time.perf_counter()
            episodes = common.evaluate(policy, envs, seeds)
            wall_s = time.perf_counter() - start
        found = success_of(episodes)
        mean_return = float(np.mean([e.rewards.sum() for e in episodes]))
        self.say(
            f"{self.policy} on {env}: success {common.describe_success(found)}, "
            f"{found['mean_steps']:.0f} steps and a return of {mean_return:.4g} on average, in {wall_s:.1f} s"
        )
        engine = episodes[0].info["env_engine"]
        return self.finish({**found, "mean_return": mean_return, "wall_s": wall_s, "env_engine": engine})

    def _environment(self, policy: OnnxPolicy) -> str:
        """Environment to evaluate in: the one given, or the one that the policy was made for."""
        from sacflow_robot.envs.registry import check_environment, environment_of, why_no_environment

        robot = policy.spec.robot
        if self.env is not None:
            check_environment(self.env, robot, str(self.policy))
            return self.env
        env = environment_of(robot)
        if env == NO_ENVIRONMENT:
            raise UsageError(
                f"{self.policy} is for {robot.robot}, {robot.task}, and no environment of it is known here "
                f"({why_no_environment(robot)}); on the robot, 'run' measures it"
            )
        return env

    def _perturb(self, policy: OnnxPolicy, env: str, history: int, seeds: range) -> int:
        from sacflow_robot.envs.tasks import TASKS

        if env not in TASKS:
            raise UsageError(
                f"--robustness changes the simulated robot of a robosuite task, and {env} is not one; leave it out"
            )
        rows = robustness(policy, env, history, seeds, self.plot)
        lines = [("perturbation", "value", "success", "95 % interval", "")]
        for r in rows:
            success, interval = f"{r['successes']}/{r['episodes']}", f"{r['ci_low']:.0%} to {r['ci_high']:.0%}"
            lines.append((r["perturbation"], f"{r['value']:g}", success, interval, r["unit"]))
        self.say(*common.aligned(lines), f"figure: {self.plot}")
        return self.finish({"rows": rows})


@dataclass(frozen=True)
class Export(common.JsonOptions):
    """Export the policy of a run folder, as of its last checkpoint.

    Attributes:
        run_dir: Run folder.
        out: ONNX file to write; by default <env>.onnx in the run folder.
        weights: How to keep weights: float32; float16 or bf16, half the size and computed in float32; or int8, also computed
            in int8. How far actions differ by it is measured, reported and noted in the file.
        euler_steps: Euler steps K, e.g. 1, 2, 4 or 8; by default as trained.
        best_of: Chunks among which the critic, which goes into the file, picks one; by default as trained.
        prefix: Whether a flow takes what is committed already and completes it (inputs prefix and prefix_mask).
        eval_episodes: Episodes to evaluate the file on, and beside it what would be exported without these options.
    """

    run_dir: Annotated[Path, tyro.conf.Positional]
    out: Path | None = None
    weights: WeightsKind = "float32"
    euler_steps: int | None = None
    best_of: int | None = None
    prefix: bool = True
    eval_episodes: int = 0

    def run(self) -> int:
        from sacflow_robot.learn.trained_run import ExportOptions, TrainedRun

        if self.eval_episodes < 0:
            raise UsageError(f"--eval-episodes is {self.eval_episodes}; it must be at least 0")
        options = ExportOptions(self.weights, self.euler_steps, self.best_of, self.prefix)
        check_output(self.out)
        trained = TrainedRun(self.run_dir)
        if self.eval_episodes and trained.config.env == NO_ENVIRONMENT:
            raise UsageError(
                f"--eval-episodes is {self.eval_episodes}, but {self.run_dir} is a run without an environment; leave it out"
            )
        result = trained.export(options, self.out or trained.folder.policy)
        what = "differs from torch" if self.weights == "float32" else f"weights in {self.weights}: actions differ"
        self.say(f"wrote {result['policy']} ({what} by {result['max_action_error']:.1e} at most)")
        if self.eval_episodes:
            result |= success_of(common.evaluate_run(trained.config, Path(result["policy"]), self.eval_episodes))
            self.say(f"success {common.describe_success(result)}")
            if options != ExportOptions(prefix=self.prefix):
                with tempfile.TemporaryDirectory() as folder:
                    plain = trained.export(ExportOptions(prefix=self.prefix), Path(folder) / "plain.onnx")
                    episodes = common.evaluate_run(trained.config, Path(plain.pop("policy")), self.eval_episodes)
                result["plain"] = {**plain, **success_of(episodes)}
                self.say(f"without these options {common.describe_success(result['plain'])}")
        return self.finish(result)


def success_of(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Success and the mean number of steps."""
    return {**common.success_json(episodes), "mean_steps": sum(map(len, episodes)) / len(episodes)}


# Perturbation: unit, values; each value is what is set on the nominal robot.
LEVELS: dict[str, tuple[str, tuple[float, ...]]] = {
    "delay": ("ms, of observations and of commands", (0, 25, 50, 100, 150)),
    "noise": ("mm on all positions", (0, 2, 5, 10, 20)),
    "mass": ("kg in the hand, not compensated", (0, 0.25, 0.5, 1.0)),
    "friction": ("times a Franka's damping and dry friction", (0, 1, 2, 3)),
    "gain": ("times the nominal stiffness", (0.4, 0.6, 1.0, 1.4, 2.0)),
    "drop": ("share of messages lost, each way", (0, 0.1, 0.3, 0.5)),
}


def perturbed(name: str, value: float) -> RobotParameters:
    """The robot of one level."""
    from sacflow_robot.envs.randomization import FRANKA_DAMPING_NM_S_PER_RAD, FRANKA_FRICTION_NM, STIFFNESS_PER_S2
    from sacflow_robot.envs.robot_parameters import RobotParameters

    if name == "delay":
        return RobotParameters({f"transport.{way}_delay_ms": (value,) for way in ("observation", "command")})
    if name == "noise":
        return RobotParameters({f"sensors.{key}.noise_m": (value / 1e3,) for key in ("robot0_eef_pos", "object")})
    if name == "mass":
        return RobotParameters({"payload.mass_kg": (value,)})
    if name == "friction":
        nominal = {"damping_nm_s_per_rad": FRANKA_DAMPING_NM_S_PER_RAD, "friction_loss_nm": FRANKA_FRICTION_NM}
        return RobotParameters({f"joints.{k}": tuple(value * v for v in all_) for k, all_ in nominal.items() if value})
    if name == "gain":
        return RobotParameters(
            {f"controller.{k}_stiffness_per_s2": (value * STIFFNESS_PER_S2,) for k in ("translation", "rotation")}
        )
    return RobotParameters({f"transport.{way}_drop_ratio": (value,) for way in ("observation", "command")})


def robustness(policy: Policy, task: str, history: int, seeds: Sequence[int], figure: Path) -> list[dict[str, Any]]:
    """A row per perturbation and level, and the figure."""
    from sacflow_robot.calibrate.figures import draw_perturbations
    from sacflow_robot.envs.collector import rollout
    from sacflow_robot.envs.randomization import Draws
    from sacflow_robot.envs.vector import make_vector_env

    rows: list[dict[str, Any]] = []
    with common.progress_bar("levels") as bar:
        row = bar.add_task("perturbing", total=sum(len(v) for _, v in LEVELS.values()), success="")
        for name, (unit, values) in LEVELS.items():
            for value in values:
                draws = Draws(model=perturbed(name, value))
                with make_vector_env(task, 2, history=history, draws=draws) as envs:
                    episodes = list(rollout(envs, policy.spec.noise_shape, policy.infer, seeds))
                found = common.success_json(episodes)
                low, high = found.pop("ci95")
                rows.append(
                    {"perturbation": name, "value": value, "unit": unit, **found, "ci_low": low, "ci_high": high}
                )
                bar.update(row, advance=1, success=f"{name} {value:g}: {found['successes']}/{found['episodes']}")
    draw_perturbations(rows, figure)
    return rows
