"""robosuite tasks as Gymnasium environments whose observation is a function of the simulator state alone."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gymnasium
import mujoco
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from sacflow_robot.envs import gl
from sacflow_robot.envs.environment import SimulatedEnv
from sacflow_robot.envs.robosuite_import import robosuite
from sacflow_robot.envs.robot_dynamics import RobotDynamics
from sacflow_robot.envs.robot_parameters import RobotParameters
from sacflow_robot.envs.state import State, StateLayout
from sacflow_robot.envs.tasks import CONTROL_RATE_HZ, Task, fall_back, get_task, usable_engine
from sacflow_robot.episode import StepResult
from sacflow_robot.errors import InvalidValueError, UsageError, one_line
from sacflow_robot.spec import Array, Engine, FloatArray, RobotSpec

if TYPE_CHECKING:
    from sacflow_robot.envs.fast.fast_robot import CompiledTask, FastRobot

# robosuite draws the cube's size when it builds the model. One seed for the model gives every process the same cube,
# without which a logged state would not replay.
_MODEL_SEED = 0

_WIDTH, _HEIGHT = 640, 480
_HELP = "install OSMesa (Debian: libosmesa6) or give the machine a GPU with EGL"


class SceneRenderer:
    """Renderer of a simulated scene.

    Raises:
        InvalidValueError: Off-screen rendering does not work on this machine.
    """

    def __init__(self, model: mujoco.MjModel) -> None:
        if sys.platform == "linux" and gl.BACKEND in ("", "glfw") and not gl.has_display():
            raise InvalidValueError(f"no off-screen rendering on a machine without display; {_HELP}")
        try:
            self._renderer: Any = mujoco.Renderer(model, _HEIGHT, _WIDTH)
        except Exception as error:  # each OpenGL back end raises errors of its own
            raise InvalidValueError(
                f"off-screen rendering with MUJOCO_GL={gl.BACKEND or 'glfw'} does not work: {one_line(error)}; {_HELP}"
            ) from None
        self._options = mujoco.MjvOption()
        self._options.geomgroup[0] = 0  # collision shapes
        self._options.sitegroup[:] = 0  # markers, such as the line through the gripper

    def render(self, data: mujoco.MjData) -> npt.NDArray[np.uint8]:
        """The scene as robosuite's camera agentview sees it, RGB (480, 640, 3)."""
        self._renderer.update_scene(data, camera="agentview", scene_option=self._options)
        image: npt.NDArray[np.uint8] = self._renderer.render()
        return image

    def close(self) -> None:
        self._renderer.close()


class RobosuiteEnv(SimulatedEnv, gymnasium.Env[dict[str, FloatArray], FloatArray]):
    """A robosuite task with a Panda under OSC_POSE delta control at 20 Hz.

    Observation: dict of float32 arrays with robomimic's keys; ``Task.robot`` has shapes, units and frames. It is computed
    from the state after the step, so that a logged state gives it again; robosuite's own observables lag by one physics
    substep (2 ms).
    Action: Box[-1, 1]^7. Reward: 1 at success, else 0. ``terminated`` on success, ``truncated`` at the horizon.

    Args:
        task: Name of the task, e.g. ``"lift"``.
        render_mode: None or ``"rgb_array"`` (needs off-screen rendering, see ``render``).
        engine: Code that should step it; ``stock`` does, with a line in the log, where ``compiled`` does not cover a task.
        step_rate_hz: Steps per second of simulated time, if they should be shorter than the robot's control periods.

    Attributes:
        engine: Code that steps it.
        model: MuJoCo's model.
        data: MuJoCo's data of the present state.

    Raises:
        UnknownNameError: No such task.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": int(CONTROL_RATE_HZ)}  # noqa: RUF012 (Gymnasium's name)

    def __init__(
        self,
        task: str = "lift",
        render_mode: str | None = None,
        engine: Engine = "stock",
        step_rate_hz: float = CONTROL_RATE_HZ,
    ) -> None:
        self.task: Task = get_task(task)
        self.robot = self.task.robot
        self.render_mode = render_mode
        self.observation_space: spaces.Dict  # type: ignore[assignment]
        self.observation_space, self.action_space = make_spaces(self.robot)  # type: ignore[assignment]
        self._suite = robosuite.make(
            self.task.robosuite_name,
            robots="Panda",
            has_renderer=False,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            hard_reset=False,
            control_freq=step_rate_hz,
            ignore_done=True,
            seed=_MODEL_SEED,
        )
        # robosuite looks references up by name at every reset, half of its time, though the model stays the same.
        self._suite._setup_references = lambda: None
        self._robot = self._suite.robots[0]
        self._substeps = round(self._suite.control_timestep / self._suite.model_timestep)
        self.model: mujoco.MjModel = self._suite.sim.model._model
        self.data: mujoco.MjData = self._suite.sim.data._data
        placed = [self._suite.sim.model.body_name2id(name) for name in self.task.placed_bodies]
        self.layout = StateLayout(task, self.model.nq, self.model.nv, placed)
        self._object_sensors, self._object_parts = _object_sensors(self._suite)
        self._steps = 0
        self._renderer: SceneRenderer | None = None
        self._compiled: FastRobot | None = None
        self._physics: RobotDynamics | None = None
        self.engine: Engine = usable_engine(task, engine)
        if self.engine == "compiled":
            self._compile()

    def set_robot_model(self, robot: RobotParameters) -> None:
        """Give the robot other joints, payload and gains than robosuite's; the next episode begins with them.

        Raises:
            UsageError: The stock engine steps it, whose controller cannot be told apart from the robot.
        """
        if self._physics is None:
            if not robot.part("controller", "joints", "payload"):
                return
            if self._compiled is None:
                raise UsageError("a robot model's dynamics need the compiled engine; leave out the stock engine")
            self._physics = RobotDynamics(self.model, self._compiled.plan)
        assert self._compiled is not None
        self._compiled.plan = self._physics.apply(robot)

    @property
    def compiled(self) -> "FastRobot":
        """The compiled step.

        Raises:
            UsageError: The stock engine steps it.
        """
        if self._compiled is None:
            raise UsageError(f"{self.task.name} is stepped by the stock engine; this needs the compiled one")
        return self._compiled

    @property
    def joint_positions(self) -> Array:
        """Joint positions (7,), rad."""
        return np.array(self.data.qpos[self._robot._ref_joint_pos_indexes])

    def compile_task(self) -> "CompiledTask":
        """The compiled step of the task, checked against one control step of the stock engine; the episode in progress is lost.

        Raises:
            NotCoveredError: The task is not covered, or the two differ.
        """
        from sacflow_robot.envs.fast import kernels
        from sacflow_robot.envs.fast.compilation import compiling
        from sacflow_robot.envs.fast.fast_robot import CHECK_ACTION, CompiledTask, check_step

        start = self.begin(0)
        task = CompiledTask(self._suite, self.task.name, self.layout.size)
        with compiling(kernels.execute):
            check_step(task, self.layout, self.robot, start, self.command(CHECK_ACTION))
        return task

    def _compile(self) -> None:
        from sacflow_robot.envs.fast.fast_robot import FastRobot
        from sacflow_robot.envs.fast.plan import NotCoveredError

        try:
            self._compiled = FastRobot(self.compile_task(), self.model, self.data)
        except NotCoveredError as error:
            self.engine = fall_back(self.task.name, str(error))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, FloatArray], dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Decides the start completely; nothing is drawn from global random state.
            options: ``{"state": array (S,)}`` starts from a logged state instead.

        Returns:
            Observation and ``{"state": (S,) float64}``.
        """
        super().reset(seed=seed)
        state = (options or {}).get("state")
        self._restore(self.draw_start(self.np_random) if state is None else np.asarray(state, np.float64))
        return self.observe()[0], {"state": self.state()}

    def draw_start(self, rng: np.random.Generator) -> State:
        """A state (S,) in which robosuite starts an episode; the episode in progress is lost."""
        self._suite.rng = rng
        placement = self._suite.placement_initializer
        for sampler in (placement, *getattr(placement, "samplers", {}).values()):
            sampler.rng = rng
        self._suite.reset()
        return self.state()

    def step(self, action: FloatArray) -> tuple[dict[str, FloatArray], float, bool, bool, dict[str, Any]]:
        """Execute one action (7,) for one control period (50 ms).

        Raises:
            InvalidValueError: The action has the wrong shape or contains NaN or infinity.
        """
        given = self.robot.check_action(action).astype(np.float64)
        self._steps += 1
        if self._compiled is not None:
            flat, states, success = self._compiled.execute(given[None])
            observation, state = self.robot.unflatten(flat[0]), states[0]
        else:
            self._control(given)
            (observation, success), state = self.observe(), self.state()
        truncated = not success and self._steps >= self.task.horizon
        return observation, float(success), success, truncated, {"success": success, "state": state}

    def begin(self, seed: int) -> StepResult:
        observation, info = self.reset(seed=seed)
        return StepResult(observation, state=info["state"])

    def begin_at(self, state: State) -> StepResult:
        observation, info = self.reset(options={"state": state})
        return StepResult(observation, state=info["state"])

    def command(self, action: FloatArray) -> StepResult:
        observation, reward, terminated, truncated, info = self.step(action)
        return StepResult(observation, reward, terminated, truncated, info["state"])

    def state(self) -> State:
        """The simulator's state (S,), see ``StateLayout``; S = 32 for lift."""
        return self.layout.read(self.model, self.data)

    def observe_state(self, state: State) -> tuple[dict[str, FloatArray], bool]:
        """Observation and success flag of a logged state (S,); the episode in progress is lost."""
        self.layout.write(state, self.model, self.data)
        return self.observe()

    def observe(self) -> tuple[dict[str, FloatArray], bool]:
        """Observation and success flag of the present state."""
        if self._compiled is not None:
            return self.robot.unflatten(self._compiled.observe()), self._compiled.solved()
        return self._observe(), bool(self._suite._check_success())

    def render(self) -> npt.NDArray[np.uint8]:
        """The scene as an RGB image (480, 640, 3).

        Raises:
            InvalidValueError: Off-screen rendering does not work on this machine.
        """
        if self._renderer is None:
            self._renderer = SceneRenderer(self.model)
        return self._renderer.render(self.data)

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _restore(self, state: State) -> None:
        """Start from a state with fresh controllers, so that state and actions alone decide what follows."""
        self._steps = 0
        self.layout.write(state, self.model, self.data)
        if self._compiled is not None:
            self._compiled.begin(state)
            return
        self._robot._load_controller()
        self._robot.composite_controller.update_state()
        self._robot.composite_controller.reset()
        for gripper in self._robot.gripper.values():
            gripper.current_action = np.zeros(gripper.dof)
        # Loading the controllers left traces in the solver's warm start.
        self.layout.write(state, self.model, self.data)

    def _control(self, action: Array) -> None:
        """robosuite's own control step without its observables and proprioception buffers, which nothing here reads."""
        sim, controller = self._suite.sim, self._robot.composite_controller
        low, high = self.model.actuator_ctrlrange.T
        for substep in range(self._substeps):
            sim.step1()
            controller.update_state()
            if substep == 0:
                controller.set_goal(action)
            for part, command in controller.run_controller(self._robot._enabled_parts).items():
                index = self._robot._ref_actuators_indexes_dict[part]
                self.data.ctrl[index] = np.clip(command, low[index], high[index])
            sim.step2()
        # Positions and contacts as of the state just reached; touches nothing that the next step reads.
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_collision(self.model, self.data)

    def _observe(self) -> dict[str, FloatArray]:
        data = self.data
        side = self._robot.arms[0]
        eef_body = self._suite.sim.model.body_name2id(self._robot.robot_model.eef_name[side])
        arrays = {
            "robot0_eef_pos": data.site_xpos[self._robot.eef_site_id[side]].copy(),
            "robot0_eef_quat": data.xquat[eef_body][[1, 2, 3, 0]],
            "robot0_gripper_qpos": data.qpos[self._robot._ref_gripper_joint_pos_indexes[side]],
        }
        seen = dict(arrays)
        for name, sense in self._object_sensors.items():
            seen[name] = sense(seen)
        arrays["object"] = np.concatenate([np.atleast_1d(seen[name]) for name in self._object_parts])
        return {key: array.astype(np.float32) for key, array in arrays.items()}


def make_spaces(robot: RobotSpec) -> tuple[spaces.Dict, spaces.Box]:
    """Observation and action space of a robot."""
    seen: dict[str, spaces.Space[Any]] = {
        a.key: spaces.Box(-np.inf, np.inf, a.shape, np.float32) for a in robot.observations
    }
    return spaces.Dict(seen), spaces.Box(-1.0, 1.0, (robot.action_dim,), np.float32)


def _object_sensors(suite: Any) -> tuple[dict[str, Callable[[dict[str, Any]], Any]], list[str]]:
    """robosuite's sensors of objects by name, and the names of those that make up its ``object-state``, in its order.

    Sensors of one thing relative to another (``..._to_...``) come last: they read the others' values.
    """
    observables = {n: o for n, o in suite._observables.items() if o.modality == "object" and o.is_enabled()}
    ordered = sorted(observables, key=lambda name: "_to_" in name)
    return {n: observables[n]._sensor for n in ordered}, [n for n, o in observables.items() if o.is_active()]
