"""Training configuration: typed and frozen. Imports no torch, so that --help stays quick."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal

from sacflow_robot.data.formats.agreement import AgreementOptions
from sacflow_robot.errors import UsageError
from sacflow_robot.spec import NO_ENVIRONMENT, Engine

VelocityName = Literal["flow-g", "flow-t", "flow-l", "mlp"]

AlgorithmName = Literal["sac-flow", "bc", "qc", "qc-fql", "rlpd", "sac"]

LOG_NOISE_BOUNDS = (-5.0, 2.0)
"""Range of a learned log sigma, as published."""


@dataclass(frozen=True)
class FlowConfig:
    """The flow policy; docs/learning.md says how its options were chosen.

    Attributes:
        width: Hidden width of the velocity, or of a Gaussian.
        depth: Hidden layers of the velocity (flow-t: decoder layers), or of a Gaussian.
        gate_width: Hidden width of flow-g's gate, of flow-l's action path, and of a learned sigma's head.
        euler_steps: K.
        noise: Noise of the rollout in training: one fixed sigma, or a learned sigma(t, A, s).
        noise_scale: sigma of the training rollout, sigma * sqrt(1 / K) a step; start of a learned one.
        entropy: Entropy that counts: of the noise path, as published, or of its last step, a lower bound.
        drift: Correct the drift for the noise, so that marginals stay those of a fitted flow; off from scratch.
        weight_norm: Normalize the weights of the velocity's linear layers, for comparison.
    """

    width: int = 256
    depth: int = 3
    gate_width: int = 256
    euler_steps: int = 4
    noise: Literal["fixed", "learned"] = "fixed"
    noise_scale: float = 0.10
    entropy: Literal["path", "last-step"] = "path"
    drift: bool = True
    weight_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "depth", "gate_width", "euler_steps"):
            _check(getattr(self, name) >= 1, f"flow.{name}", getattr(self, name), "at least 1")
        _check(0 < self.noise_scale < math.inf, "flow.noise_scale", self.noise_scale, "positive")
        if self.noise == "learned":
            low, high = (math.exp(bound) for bound in LOG_NOISE_BOUNDS)
            expected = f"between {low:.2g} and {high:.2g} where sigma is learned"
            _check(low < self.noise_scale < high, "flow.noise_scale", self.noise_scale, expected)


@dataclass(frozen=True)
class LearnerConfig:
    """Losses and optimization; docs/learning.md says how its options were chosen.

    Attributes:
        batch_size: Chunks per update.
        discount: gamma per environment step.
        tau: Share of the critic that enters its target at each critic update.
        policy_lr: Adam step size of the policy.
        critic_lr: Adam step size of the critic.
        critic_width: Hidden width of each critic.
        critic_depth: Hidden layers of each critic.
        num_critics: Number of critics.
        critic_aggregate: Combination of the critics in targets and in the actor loss.
        utd_ratio: Critic updates per environment step online (UTD).
        policy_delay: Critic updates per policy update online.
        warmup_steps: Environment steps online during which only the critic learns.
        clone: Episodes that the policy is fitted to: all, or solved ones (all while there are none).
        bc_loss: Regularizer: squared distance to the data (action), the cloning loss, or distance to a second flow.
        reference: That second flow: the policy as cloning left it (frozen), or one that goes on cloning.
        bc_coef: beta, weight of the regularizer in the actor loss.
        bc_schedule: constant; linear to ``bc_coef_final``; or adaptive, lower while episodes beat those of cloning.
        bc_coef_final: End of a linear weight, and lower limit of an adaptive one (a thousandth of beta at least).
        normalize_q: Divide the critic's value in the actor loss by its mean size over the batch (TD3+BC, FQL).
        temperature: learned within the bounds, fixed where it starts, or zero.
        initial_temperature: Start of the temperature.
        alpha_lr: Adam step size of the temperature.
        temperature_bounds: Range of a learned temperature.
        target_entropy_per_dim: Nats per action dimension below the reference at which a learned temperature rises.
        best_of: Chunks among which the critic picks one when acting and in the exported policy; 1 leaves it out.
        adam_beta1: Adam's first beta; 0.5 is published for training from scratch.
        max_grad_norm: Largest norm of the policy's gradient; none does not limit it.
        ema_rate: Share of the policy that enters its average, which acts and is exported; 1 turns averaging off.
    """

    batch_size: int = 256
    discount: float = 0.99
    tau: float = 0.005
    policy_lr: float = 3e-4
    critic_lr: float = 3e-4
    critic_width: int = 256
    critic_depth: int = 3
    num_critics: int = 2
    critic_aggregate: Literal["min", "mean"] = "min"
    utd_ratio: float = 0.3
    policy_delay: int = 2
    warmup_steps: int = 3000
    clone: Literal["all", "solved"] = "solved"
    bc_loss: Literal["action", "flow-matching", "same-noise"] = "action"
    reference: Literal["frozen", "cloning"] = "frozen"
    bc_coef: float = 0.15
    bc_schedule: Literal["constant", "linear", "adaptive"] = "constant"
    bc_coef_final: float = 0.0
    normalize_q: bool = False
    temperature: Literal["learned", "fixed", "zero"] = "learned"
    initial_temperature: float = 1e-3
    alpha_lr: float = 3e-4
    temperature_bounds: tuple[float, float] = (1e-5, 1e-2)
    target_entropy_per_dim: float = 1.0
    ema_rate: float = 0.005
    best_of: int = 1
    adam_beta1: float = 0.9
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "critic_width", "critic_depth", "num_critics", "policy_delay", "best_of"):
            _check(getattr(self, name) >= 1, f"learner.{name}", getattr(self, name), "at least 1")
        for name in ("discount", "tau", "ema_rate"):
            _check(0 < getattr(self, name) <= 1, f"learner.{name}", getattr(self, name), "above 0 and at most 1")
        for name in ("policy_lr", "critic_lr", "alpha_lr", "utd_ratio"):
            _check(0 <= getattr(self, name) < math.inf, f"learner.{name}", getattr(self, name), "finite, not negative")
        for name in ("bc_coef", "warmup_steps"):
            _check(0 <= getattr(self, name) < math.inf, f"learner.{name}", getattr(self, name), "finite, not negative")
        _check(
            math.isfinite(self.target_entropy_per_dim),
            "learner.target_entropy_per_dim",
            self.target_entropy_per_dim,
            "finite",
        )
        _check(0 <= self.adam_beta1 < 1, "learner.adam_beta1", self.adam_beta1, "at least 0 and below 1")
        final = self.bc_coef_final
        expected = "from 0 to learner.bc_coef"
        _check(0 <= final <= max(self.bc_coef, 0), "learner.bc_coef_final", final, expected)
        clip = self.max_grad_norm
        _check(clip is None or 0 < clip < math.inf, "learner.max_grad_norm", clip, "positive, or none")
        low, high = self.temperature_bounds
        _check(0 < low <= high < math.inf, "learner.temperature_bounds", (low, high), "positive, the lower one first")
        inside = low <= self.initial_temperature <= high
        _check(inside, "learner.initial_temperature", self.initial_temperature, "within learner.temperature-bounds")


@dataclass(frozen=True)
class TrainConfig(AgreementOptions):
    """Train a flow policy offline to online, and export it.

    Attributes:
        env: Task, Gymnasium id, MODULE:CLASS or FILE.py:CLASS; none: logs alone; by default that of the data, or lift.
        algo: sac-flow; bc; qc, the best of several chunks; qc-fql, a one-step policy; rlpd and sac, a Gaussian.
        velocity: Velocity network of a flow.
        from_scratch: Learn without demonstrations: random actions during the warm-up, then SAC.
        demos: auto (collected once), none, an episode log, LeRobotDataset or HDF5 file, or robomimic:<task>/<ph|mh>.
        demo_quality: Quality of the expert that auto collects from.
        demo_episodes: Episodes that auto collects.
        trim_idle: Drop the steps of raw robosuite demonstrations that command nothing and move no finger.
        replay: Episode logs to learn from besides: folders, or addresses such as s3://bucket/episodes.zarr.
        offline_steps: Updates on the demonstrations before going online.
        online_steps: Environment steps to learn from online, in total; with --resume a larger number extends the run.
        seed: Seed of everything random in the run.
        device: auto, cpu, cuda or cuda:N.
        compile: Compile the update: on, off, or auto: on a GPU, and on a CPU for runs of 10,000 updates and more.
        precision: float32; bfloat16 products on float32 weights; or auto: bfloat16 where the hardware gains by it.
        chunk_length: H, actions per chunk, executed open loop.
        replay_capacity: Environment steps in the replay buffer; the oldest collected go first, data given stays.
        replay_memory_gb: Memory that the replay buffer may take; a larger one is kept in files in the run folder.
        demo_ratio: Share of each batch from the demonstrations (RLPD: 0.5); none: in proportion to their steps.
        replay_ratio: The same for the logs given with --replay.
        threads: Cores that the learner computes on; more than one pays for wide networks on an idle machine.
        num_envs: Simulated robots stepped at once.
        env_engine: What steps them: compiled, or robosuite's own (stock).
        safety: Calibration profile whose safety limits hold in training and evaluation.
        randomize: Robot of each training episode: drawn around ``profile``, from wide ranges, or nominal (none).
        profile: Calibration profile of ``randomize``.
        action_history: Last actions that the policy sees with each observation, which helps where delays are long.
        eval_episodes: Episodes per evaluation during the run.
        eval_every: Environment steps between evaluations online.
        final_eval_episodes: Episodes of the final evaluation, on seeds that were used for nothing else.
        flow: The flow policy.
        learner: Losses and optimization.
    """

    env: str = "lift"
    algo: AlgorithmName = "sac-flow"
    velocity: VelocityName = "flow-g"
    from_scratch: bool = False
    demos: str = "auto"
    demo_quality: Literal["proficient", "mixed", "poor"] = "mixed"
    demo_episodes: int = 200
    trim_idle: bool = True
    replay: tuple[str, ...] = ()
    offline_steps: int = 2500
    online_steps: int = 30_000
    seed: int = 0
    device: str = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    chunk_length: int = 5
    replay_capacity: int = 300_000
    replay_memory_gb: float = 4.0
    demo_ratio: float | None = None
    replay_ratio: float | None = None
    threads: int = 1
    num_envs: int = 2
    env_engine: Engine = "compiled"
    safety: str | None = None
    randomize: Literal["none", "wide", "profile"] = "none"
    profile: str = ""
    action_history: int = 0
    eval_episodes: int = 50
    eval_every: int = 5_000
    final_eval_episodes: int = 100
    flow: FlowConfig = field(default_factory=FlowConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)

    def __post_init__(self) -> None:
        for name in ("chunk_length", "threads", "num_envs", "eval_every", "replay_capacity"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("demo_episodes", "offline_steps", "online_steps", "seed", "eval_episodes", "final_eval_episodes"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        _check(self.replay_memory_gb >= 0, "replay_memory_gb", self.replay_memory_gb, "at least 0")
        for name in ("demo_ratio", "replay_ratio"):
            share = getattr(self, name)
            _check(share is None or 0 <= share <= 1, name, share, "from 0 to 1")
        _check(0 <= self.action_history <= 100, "action_history", self.action_history, "from 0 to 100")
        _check(
            (self.randomize == "profile") <= bool(self.profile), "profile", "empty", "a file, with --randomize profile"
        )
        together = (self.demo_ratio or 0) + (self.replay_ratio or 0)
        _check(together <= 1, "replay_ratio", self.replay_ratio, "at most what --demo-ratio leaves of 1")
        if self.from_scratch:
            expected = "sac-flow or sac from scratch; the others need demonstrations"
            _check(self.algo in ("sac-flow", "sac"), "algo", self.algo, expected)
            _check(
                self.demos == "none" and not self.replay, "demos", self.demos, "none, without --replay, from scratch"
            )
            _check(self.offline_steps == 0, "offline_steps", self.offline_steps, "0 from scratch")
        if self.env == NO_ENVIRONMENT:
            self._check_without_environment()
        if self.learner.best_of > 1:
            why = "1 with " + (
                "bc, which learns no critic" if self.algo == "bc" else f"{self.algo}, which plays its mean"
            )
            _check(self.algo not in ("bc", "rlpd", "sac"), "learner.best_of", self.learner.best_of, why)
        if self.algo in ("rlpd", "sac"):
            expected = f"action with {self.algo}, which has no flow"
            _check(self.learner.bc_loss == "action", "learner.bc_loss", self.learner.bc_loss, expected)

    def _check_without_environment(self) -> None:
        """Refuse what takes an environment where there is none."""
        here = "without an environment, which --env would name"
        _check(not self.from_scratch, "from_scratch", True, f"left out {here}")
        _check(self.algo not in ("rlpd", "sac"), "algo", self.algo, f"one that learns offline {here}")
        for name in ("online_steps", "eval_episodes", "final_eval_episodes"):
            _check(getattr(self, name) == 0, name, getattr(self, name), f"0 {here}")
        _check(self.randomize == "none", "randomize", self.randomize, f"none {here}")
        _check(self.safety is None, "safety", self.safety, f"left out {here}")
        _check(self.demos != "auto", "demos", self.demos, f"a file, or none with --replay LOG, {here}")
        _check(self.offline_steps > 0, "offline_steps", self.offline_steps, f"at least 1 {here}")

    @property
    def updates(self) -> float:
        """Updates of the critic that the whole run is to make, about."""
        return self.offline_steps + self.online_steps * self.learner.utd_ratio


def without_effect(algo: AlgorithmName) -> frozenset[str]:
    """Options of the policy and the learner that an algorithm has no use for, as on the command line."""
    noise = {"flow.noise", "flow.noise-scale", "flow.entropy", "flow.drift"}
    held = {"learner.bc-loss", "learner.reference"}
    weight = {"learner.bc-coef", "learner.bc-schedule", "learner.bc-coef-final"}
    entropy = {"learner.temperature", "learner.initial-temperature", "learner.alpha-lr"}
    entropy |= {"learner.temperature-bounds", "learner.target-entropy-per-dim"}
    critic = {
        "learner.discount",
        "learner.tau",
        "learner.critic-lr",
        "learner.num-critics",
        "learner.normalize-q",
    }
    critic |= {"learner.critic-aggregate", "learner.policy-delay"}
    gaussian = {"velocity", "learner.clone", "flow.gate-width", "flow.euler-steps", "flow.weight-norm", *noise, *held}
    unused: dict[AlgorithmName, set[str]] = {
        "sac-flow": set(),
        "bc": {*noise, *held, *weight, *entropy, *critic},
        "qc": {*noise, *held, *weight, *entropy, "learner.normalize-q"},
        "qc-fql": {*noise, *held, *entropy},
        "rlpd": gaussian,
        "sac": gaussian,
    }
    return frozenset(unused[algo])


ENVIRONMENT_OPTIONS = frozenset(
    {"num-envs", "env-engine", "eval-every", "demo-quality", "demo-episodes", "profile", "safety", "randomize"}
)
"""Options that mean nothing without an environment, whatever their value, as on the command line."""


CHANGEABLE = (
    "device", "threads", "compile", "precision", "replay-memory-gb", "learner.batch-size", "learner.best-of",
    "learner.policy-lr", "learner.critic-lr", "learner.max-grad-norm",
)  # fmt: skip
"""Options that a resumed run takes other values of: what is saved has none of them in its shape."""


def check_given(config: TrainConfig, given: Collection[str]) -> None:
    """Refuse options given on the command line that do nothing in this run.

    Args:
        config: The run's configuration.
        given: Names of the options given, as on the command line, e.g. ``"learner.num-critics"``.

    Raises:
        UsageError: There is one.
    """
    for option in sorted(without_effect(config.algo).intersection(given)):
        raise UsageError(f"--{option} does nothing with --algo {config.algo}; leave it out")
    if config.env == NO_ENVIRONMENT:
        for option in sorted(ENVIRONMENT_OPTIONS.intersection(given)):
            raise UsageError(f"--{option} does nothing without an environment; leave it out, or name one with --env")


def extended(config: TrainConfig, online_steps: int, run: object) -> TrainConfig:
    """The configuration of a run that is to go on to that many environment steps in total.

    Raises:
        UsageError: It is to have fewer than it has, or has no environment to take them in.
    """
    if online_steps < config.online_steps:
        raise UsageError(
            f"--online-steps {online_steps} with --resume {run}, a run of {config.online_steps}: it is the new total, and "
            f"cannot be less; give a larger one, or leave it out"
        )
    return replace(config, online_steps=online_steps)


def _check(fine: bool, name: str, value: object, expected: str) -> None:
    if not fine:
        raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be {expected}")
