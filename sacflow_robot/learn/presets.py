"""Default configurations by task, velocity and algorithm. Imports no torch, so that --help stays quick."""

import re
from dataclasses import replace
from typing import cast, get_args

from sacflow_robot.errors import UnknownNameError
from sacflow_robot.learn.config import AlgorithmName, FlowConfig, LearnerConfig, TrainConfig, VelocityName
from sacflow_robot.spec import NO_ENVIRONMENT

# Longer tasks than Lift: demonstrations that hardly ever fail, less noise to explore with, and a policy held near what
# cloning makes of the same noise, which keeps different ways of doing the task apart.
_LONGER = TrainConfig(
    demo_quality="proficient",
    offline_steps=8000,
    online_steps=50_000,
    eval_every=10_000,
    flow=FlowConfig(noise_scale=0.04),
    learner=LearnerConfig(bc_loss="same-noise", reference="cloning", bc_coef=0.5),
)
# Tasks of millimeters: more cloning, and a critic that has seen more failures before the policy follows it. Stack needs
# demonstrations of its rare starts, with the cubes side by side; square has the policy held closer to the clone.
_FINER = replace(_LONGER, offline_steps=20_000, learner=replace(_LONGER.learner, warmup_steps=8000))
# Learning is from what was recorded alone: nothing moves.
_RECORDED = TrainConfig(env=NO_ENVIRONMENT, demos="none", online_steps=0, eval_episodes=0, final_eval_episodes=0)
PRESETS = {
    "lift": TrainConfig(),
    "stack": replace(_FINER, env="stack", demo_episodes=400),
    "can": replace(_LONGER, env="can"),
    "square": replace(_FINER, env="square", learner=replace(_FINER.learner, bc_coef=5.0)),
    "door": replace(_LONGER, env="door"),
}

# Published sizes differ between velocities (arXiv 2509.25756, offline to online); these fit two CPU cores.
_FLOWS: dict[str, FlowConfig] = {
    "flow-t": FlowConfig(width=128, depth=2),
    "flow-l": FlowConfig(width=256, depth=2, gate_width=128),
}

# From scratch, scaled to two CPU cores: 50 000 steps in minutes. As published except for the sizes, one action at a time, sigma
# learned, Adam's beta_1 of 0.5, and except for the entropy: of the last step alone, with SAC's target of -1 nat per action
# dimension, which at K = 4 is a sigma of 0.178. With the published one, 0 of the path, the first steps' noise grew to several
# units, the action's fell to 0.02 where SAC's was 0.1, and runs ended early in a gait that they did not leave again. And but for
# the drift: its correction presumes a velocity of flow matching, which nothing makes one here, and what was exported, without
# noise and so without correction, was another policy than the trained one (docs/learning.md).
_SCRATCH = TrainConfig(
    from_scratch=True,
    demos="none",
    offline_steps=0,
    online_steps=50_000,
    chunk_length=1,
    replay_capacity=100_000,
    num_envs=1,
    eval_episodes=5,
    eval_every=5_000,
    final_eval_episodes=10,
    flow=FlowConfig(
        width=128, depth=2, gate_width=64, noise="learned", noise_scale=0.178, entropy="last-step", drift=False
    ),
    learner=LearnerConfig(
        batch_size=128,
        critic_lr=1e-3,
        critic_depth=2,
        utd_ratio=1.0,
        warmup_steps=2_500,
        bc_coef=0.0,
        initial_temperature=0.05,
        alpha_lr=1e-3,
        temperature_bounds=(1e-4, 2.0),
        target_entropy_per_dim=0.0,
        adam_beta1=0.5,
    ),
)
_SCRATCH_FLOWS = {
    "flow-t": replace(_SCRATCH.flow, width=64),
}


def preset(
    env: str, velocity: str = "flow-g", algo: str = "sac-flow", *, from_scratch: bool | None = None, full: bool = False
) -> TrainConfig:
    """Default configuration.

    Args:
        env: Task, Gymnasium id, environment of one's own, or ``"none"``.
        velocity: Velocity network of a flow.
        algo: Algorithm.
        from_scratch: Without demonstrations; None: as the algorithm is meant, which sac alone is.
        full: The published sizes and budgets, for a GPU.

    Raises:
        UnknownNameError: No preset of that name.
    """
    if env not in PRESETS and env != NO_ENVIRONMENT and ":" not in env and not re.search(r"-v\d+$", env):
        others = "any Gymnasium id (e.g. HalfCheetah-v5), or an environment of your own as MODULE:CLASS"
        raise UnknownNameError("task", env, [*PRESETS, NO_ENVIRONMENT], others)
    for kind, name, names in (("velocity", velocity, VelocityName), ("algorithm", algo, AlgorithmName)):
        if name not in get_args(names):
            raise UnknownNameError(kind, name, get_args(names))
    if algo == "sac" if from_scratch is None else from_scratch:
        chosen = replace(_SCRATCH, env=env)
        flow = _SCRATCH_FLOWS.get(velocity, chosen.flow)
    else:
        chosen = _RECORDED if env == NO_ENVIRONMENT else PRESETS.get(env, TrainConfig(env=env, demos="none"))
        flow = replace(_FLOWS.get(velocity, chosen.flow), noise_scale=chosen.flow.noise_scale)
    chosen = replace(chosen, velocity=cast(VelocityName, velocity), flow=flow)
    chosen = _for_algorithm(chosen, cast(AlgorithmName, algo))
    return _published(chosen) if full else chosen


def _for_algorithm(config: TrainConfig, algo: AlgorithmName) -> TrainConfig:
    """The configuration of sac-flow, with what an algorithm needs otherwise."""
    learner, flow = config.learner, config.flow
    if algo == "bc":
        return replace(config, algo=algo, online_steps=0)
    if algo == "qc":
        return replace(config, algo=algo, learner=replace(learner, best_of=16, policy_delay=1))
    if algo == "qc-fql":
        learner = replace(learner, bc_loss="action", bc_coef=0.5, policy_delay=1)
        return replace(config, algo=algo, flow=replace(flow, euler_steps=10), learner=learner)
    if algo in ("rlpd", "sac"):
        # SAC's target entropy is -dim, and the entropy is a Gaussian's own.
        learner = replace(learner, bc_loss="action", bc_coef=0.0, target_entropy_per_dim=1.0)
        flow = FlowConfig(width=learner.critic_width, depth=2)
        if config.from_scratch:
            return replace(config, algo=algo, flow=flow, learner=learner)
        learner = replace(learner, num_critics=10, critic_aggregate="mean", utd_ratio=1.0)
        # RLPD's target entropy is half of SAC's. It starts at a temperature of 1 and has 20 updates a step to lower it; here the
        # temperature starts where the flows' does, so that 24 nats of a uniform chunk do not outweigh a value of at most 1.
        learner = replace(
            learner, temperature_bounds=(1e-5, 1.0), target_entropy_per_dim=0.5 if algo == "rlpd" else 1.0
        )
        share = 0.5 if algo == "rlpd" else None
        return replace(config, algo=algo, offline_steps=0, demo_ratio=share, flow=flow, learner=learner)
    return replace(config, algo=algo)


def _published(config: TrainConfig) -> TrainConfig:
    """The published sizes (arXiv 2509.25756): of training from scratch, or offline to online.

    From scratch its critics have batch renormalization and no target network (CrossQ), flow-g's candidate is bounded by 50 tanh,
    and flow-t's state encoder is 32 and 64 wide; ours keep layer norm and the target, no bound, and the token's width. The drift is
    not corrected for the noise (see above).
    """
    flow, learner = config.flow, config.learner
    token = config.velocity == "flow-t" and config.algo in ("sac-flow", "bc", "qc", "qc-fql")
    gaussian = config.algo in ("rlpd", "sac")  # as wide and deep as its critic
    if config.from_scratch:
        width = 1024 if gaussian else 64 if token else 128
        flow = replace(flow, width=width, depth=2, gate_width=128, entropy="path", noise_scale=0.34)
        learner = replace(
            learner,
            batch_size=512,
            critic_width=1024,
            critic_depth=2,
            policy_delay=3,
            warmup_steps=50_000,
            initial_temperature=0.2,
        )
        config = replace(config, online_steps=1_000_000, replay_capacity=1_000_000, eval_every=50_000)
        return replace(config, flow=flow, learner=learner)
    flow = replace(flow, width=128 if token else 512, depth=2 if token else 4, gate_width=256)
    learner = replace(learner, batch_size=256, critic_width=512, critic_depth=4, policy_delay=1, utd_ratio=1.0)
    learner = replace(learner, warmup_steps=5_000)
    return replace(
        config,
        offline_steps=1_000_000 if config.offline_steps else 0,
        online_steps=1_000_000 if config.online_steps else 0,
        replay_capacity=2_000_000,
        eval_every=50_000,
        flow=flow,
        learner=learner,
    )
