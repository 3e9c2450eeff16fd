"""The command line: the one place that wires rooms together.

Each command is a frozen dataclass with a ``run`` method in a module of its own, imported only when it is called, so
that ``serve --help`` does not wait for torch.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Sequence

from sacflow_robot import __version__
from sacflow_robot.errors import SacflowError, UnknownNameError, UsageError, one_line

PROGRAM = "sacflow-robot"

# command: (module, class, what it does)
COMMANDS = {
    "train": ("train", "Train", "train a flow policy offline to online and export it"),
    "follow": ("follow", "Follow", "learn from what an arm logs while it runs, and replace the policy being served"),
    "export": ("export", "Export", "export the policy of a run folder to ONNX"),
    "eval": ("evaluate", "Eval", "success rate of a policy file on held-out seeds"),
    "serve": ("serve", "Serve", "serve a policy file over ZeroMQ"),
    "top": ("top", "Top", "watch a policy server"),
    "keys new": ("keys", "New", "make a pair of keys for a server or a client"),
    "run": ("run", "Run", "drive an arm with a served policy and log its episodes"),
    "estop": ("estop", "Estop", "stop a running arm over the network, or arm it again"),
    "replay": ("replay", "Replay", "run a logged episode again; as a video; into the Rerun viewer"),
    "calibrate latency": ("calibrate", "Latency", "measure how late observations and commands are"),
    "calibrate noise": ("calibrate", "NoiseOf", "measure the sensors' errors on an arm at rest"),
    "calibrate dynamics": ("calibrate", "Dynamics", "identify joints, gains, payload and delay from motion"),
    "calibrate handeye": ("calibrate", "Handeye", "measure where a camera is, from pictures of a board in the gripper"),
    "gap": ("gap", "GapReport", "why an arm does not do what the simulator says, ranked by cause"),
    "demos collect": ("demos", "Collect", "collect demonstrations from a scripted expert"),
    "demos convert": ("convert", "Convert", "convert demonstrations: episode log, robomimic HDF5, LeRobotDataset"),
    "demos info": ("demo_info", "Info", "what demonstrations hold, with a page of plots"),
    "log info": ("log", "Info", "what an episode log holds"),
    "log verify": ("log", "Verify", "check everything in an episode log"),
    "log repair": ("log", "Repair", "save what can be read of a damaged log to a new one"),
    "log copy": ("log", "Copy", "copy an episode log, also to and from an object store"),
    "bench log": ("bench", "BenchLog", "what logging a step costs the control loop"),
    "bench replay": ("bench", "BenchReplay", "how fast the replay buffer draws batches"),
    "bench loop": ("bench_loop", "BenchLoop", "how well the control loop keeps time, with everything running"),
    "bench sim": ("bench", "BenchSim", "control steps per second of the simulated tasks"),
    "bench train": ("bench", "BenchTrain", "updates per second of each algorithm and velocity"),
    "bench export": ("bench_export", "BenchExport", "size and microseconds of exported graphs, naive and folded"),
    "bench serve": ("bench", "BenchServe", "round trips of a served policy, many clients, long and hostile runs"),
    "study gradients": ("study", "Gradients", "gradient norm at each step of the rollout, by velocity network and K"),
    "study likelihood": ("study", "Likelihood", "path density, drift and exact density against closed forms"),
    "study architecture": ("study", "Architecture", "gate, heads, width and K: gradients, success, cost of an action"),
    "study regularisation": ("study", "Regularisation", "regularisers and schedules on data with two ways"),
    "twin franka": ("twin", "TwinFranka", "stand in for a Franka Panda behind deoxys, in simulation"),
    "launch": ("launch", "Launch", "start the processes of a launch file"),
    "doctor": ("doctor", "Doctor", "what works on this machine"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 called wrongly, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    try:
        name, rest = _split(arguments)
        return _parse(name, rest).run() or 0  # type: ignore[attr-defined]
    except BrokenPipeError:
        return 1
    except SacflowError as error:
        print(f"{PROGRAM}: error: {one_line(error, 1000)}", file=sys.stderr)
        return error.exit_status
    except ModuleNotFoundError as error:
        print(f"{PROGRAM}: error: {_missing(error)}", file=sys.stderr)
        return 2
    except OSError as error:  # what no room foresaw, e.g. a disk that filled up elsewhere
        print(f"{PROGRAM}: error: {one_line(error)}", file=sys.stderr)
        return 1
    except SystemError as error:  # compiled code turns a Ctrl-C that hits it into this
        if not isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
            raise
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    except MemoryError as error:
        print(f"{PROGRAM}: error: out of memory: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    """Command name, of one word or two, and what follows it."""
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name, arguments[words:]
    group = [name for name in COMMANDS if name.startswith(f"{arguments[0]} ")]
    if group:
        raise UnknownNameError("command", " ".join(arguments[:2]), group)
    raise UnknownNameError("command", arguments[0], COMMANDS)


def _parse(name: str, arguments: list[str]) -> object:
    import tyro

    _check_given_once(name, arguments)
    module, class_name, _ = COMMANDS[name]
    command = getattr(importlib.import_module(f"sacflow_robot.cli.{module}"), class_name)
    default = command.default(arguments) if hasattr(command, "default") else None
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            # AvoidSubcommands: an optional value is an option, never a subcommand.
            config = (tyro.conf.AvoidSubcommands,)
            return tyro.cli(command, prog=f"{PROGRAM} {name}", args=arguments, default=default, config=config)
    except SystemExit as stopped:
        if not stopped.code:
            raise
        raise UsageError(_first_complaint(complaint.getvalue(), name)) from None


def _check_given_once(name: str, arguments: Sequence[str]) -> None:
    """Refuse an option that is given twice, of which the parser would take the last without a word.

    Raises:
        UsageError: There is one.
    """
    given: set[str] = set()
    for argument in arguments:
        if not argument.startswith("--") or argument == "--":
            continue
        option = argument.partition("=")[0]
        words = option.removeprefix("--").replace("_", "-").replace(".no-", ".").removeprefix("no-")
        if words in given:
            raise UsageError(
                f"{option} is given twice to '{name}'; give it once, with all of its values where it takes several"
            )
        given.add(words)


def _first_complaint(box: str, name: str) -> str:
    """What tyro draws a box around, as one line."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰", "│ ─", "│ For full"))]
    text = " ".join(" ".join(lines).split()).partition(" Argument helptext:")[0]
    return f"{text.rstrip('.')}; see '{PROGRAM} {name} --help'"


def _missing(error: ModuleNotFoundError) -> str:
    sim, train = ("mujoco", "robosuite", "gymnasium", "h5py", "av", "PIL"), ("torch", "onnx", "onnxscript")
    viz = ("matplotlib", "tensorboard")
    others = {"rerun": "viz", "pyarrow": "lerobot"}
    extras = {**dict.fromkeys(sim, "sim"), **dict.fromkeys((*train, *viz), "train"), **others}
    extra = extras.get((error.name or "").partition(".")[0])
    if extra is None:
        raise error
    return f"this command needs {error.name}, which is not installed; pip install 'sacflow-robot[{extra}]'"


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, _, what) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [OPTION ...]",
            "",
            *lines,
            "",
            f"'{PROGRAM} COMMAND --help' lists a command's options.",
        ]
    )
