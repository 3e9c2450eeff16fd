"""The command line: parse, call, print.

Each command is a frozen dataclass with a ``run`` method, in a module that is imported only when it is called, so that
``serve --help`` does not wait for torch.
"""

import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence

from sacflow_robot import __version__
from sacflow_robot.cli.renamed import with_new_names
from sacflow_robot.errors import SacflowError, UnknownNameError, UsageError, one_line
from sacflow_robot.utils import caches

PROGRAM, PACKAGE = "sacflow-robot", "sacflow_robot"

EXTRAS = {
    "sim": ("PIL", "av", "cv2", "gymnasium", "h5py", "llvmlite", "mujoco", "numba", "robosuite", "scipy"),
    "viz": ("matplotlib", "rerun", "tensorboard"),
    "lerobot": ("pyarrow",),
    "train": ("onnx", "onnxscript", "torch"),
    "s3": ("fsspec", "s3fs"),
    "robomimic": ("robomimic",),
    "dev": ("openpi_client",),
}
"""Modules that the base package does without, by the extra of this package that installs them."""

# Commands, or groups of them, whose process a terminal must neither block nor suspend, for it moves a robot.
MOVING = ("run", "replay", "calibrate", "twin", "launch")

# command: (module, class, what it does)
COMMANDS = {
    "train": ("train", "Train", "train a flow policy offline to online and export it"),
    "follow": ("train", "Follow", "learn from what a robot logs while it runs, and replace the policy being served"),
    "export": ("evaluate", "Export", "export the policy of a run folder to ONNX"),
    "eval": ("evaluate", "Eval", "success rate of a policy file on held-out seeds"),
    "serve": ("serve", "Serve", "serve a policy file over ZeroMQ"),
    "top": ("serve", "Top", "watch a policy server"),
    "keys new": ("serve", "New", "make a pair of keys for a server or a client"),
    "run": ("run", "Run", "drive a robot with a served policy and log its episodes"),
    "estop": ("run", "Estop", "stop a running robot over the network, or enable it again"),
    "replay": ("replay", "Replay", "run a logged episode again; as a video; into the Rerun viewer"),
    "calibrate latency": ("calibrate", "Latency", "measure how late observations and commands are"),
    "calibrate noise": ("calibrate", "NoiseOf", "measure the sensors' errors on a robot at rest"),
    "calibrate dynamics": ("calibrate", "Dynamics", "identify joints, gains, payload and delay from motion"),
    "calibrate handeye": ("calibrate", "Handeye", "measure where a camera is, from pictures of a board in the gripper"),
    "gap": ("calibrate", "GapReport", "why a robot does not do what the simulator says, ranked by cause"),
    "demos collect": ("demos", "Collect", "collect demonstrations from a scripted expert"),
    "demos convert": ("demos", "Convert", "convert demonstrations: episode log, robomimic HDF5, LeRobotDataset"),
    "demos info": ("demos", "Info", "what demonstrations hold, with a page of plots"),
    "log info": ("log", "Info", "what an episode log holds"),
    "log verify": ("log", "Verify", "check everything in an episode log"),
    "log repair": ("log", "Repair", "save what can be read of a damaged log to a new one"),
    "log copy": ("log", "Copy", "copy an episode log, also to and from an object store"),
    "bench log": ("bench", "BenchLog", "what logging a step costs the control loop"),
    "bench replay": ("bench", "BenchReplay", "how fast the replay buffer draws batches"),
    "bench loop": ("bench", "BenchLoop", "how well the control loop keeps time, with everything running"),
    "bench sim": ("bench", "BenchSim", "control steps per second of the simulated tasks"),
    "bench train": ("bench", "BenchTrain", "updates per second of each algorithm and velocity"),
    "bench export": ("bench_policy", "BenchExport", "size and microseconds of exported graphs, naive and folded"),
    "bench serve": (
        "bench_policy",
        "BenchServe",
        "round trips of a served policy, many clients, long and hostile runs",
    ),
    "study gradients": ("study", "Gradients", "gradient norm at each step of the rollout, by velocity network and K"),
    "study likelihood": ("study", "Likelihood", "path density, drift and exact density against closed forms"),
    "study architecture": ("study", "Architecture", "gate, heads, width and K: gradients, success, cost of an action"),
    "study regularization": ("study", "Regularization", "regularizers and schedules on data with two ways"),
    "twin franka": ("run", "TwinFranka", "stand in for a Franka Panda behind deoxys, in simulation"),
    "launch": ("launch", "Launch", "start the processes of a launch file"),
    "doctor": ("doctor", "Doctor", "what works on this machine"),
}

GROUPS = tuple(dict.fromkeys(name.partition(" ")[0] for name in COMMANDS if " " in name))
"""First words of the commands of two words."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 called wrongly, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # no name of a file and no unit is worth a failure
        sys.stdout.reconfigure(errors="backslashreplace")
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    group = arguments[0] if arguments and arguments[0] in GROUPS else ""
    if all(word in ("-h", "--help") for word in arguments[bool(group) :]):
        print(_overview(group))
        return 0
    if arguments[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    if arguments[0] not in MOVING:
        return _run(arguments)
    from sacflow_robot.robot.control.announcer import TerminalGuard

    guard = TerminalGuard()
    try:
        status = _run(arguments)
    finally:
        taken = guard.end()
    return status or int(not taken)


def _run(arguments: list[str]) -> int:
    """Run one command and say what went wrong; returns the exit status."""
    try:
        name, rest = _split(with_new_names(arguments))
        caches.lend_folders()
        return _parse(name, rest).run() or 0  # type: ignore[attr-defined]
    except BrokenPipeError:
        return 1
    except SacflowError as error:
        status, said = error.exit_status, f"error: {one_line(error, 1000)}"
    except ImportError as error:
        if (error.name or PACKAGE).partition(".")[0] == PACKAGE:  # our own mistake
            raise
        status, said = 2, f"error: {missing(error)}"
    except OSError as error:  # unforeseen, e.g. a disk that filled up elsewhere
        status, said = 1, f"error: {one_line(error)}"
    except MemoryError as error:
        status, said = 1, f"error: out of memory: {one_line(error)}"
    except (KeyboardInterrupt, SystemError) as error:  # compiled code turns a Ctrl-C that hits it into a SystemError
        if isinstance(error, SystemError) and not isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
            raise
        status, said = 130, "interrupted"
    print(f"{PROGRAM}: {said}", file=sys.stderr)
    return status


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    """Command name, of one word or two, and what follows it."""
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name, arguments[words:]
    if arguments[0] in GROUPS:
        raise UnknownNameError("command", " ".join(arguments[:2]), _members(arguments[0]))
    raise UnknownNameError("command", arguments[0], [*COMMANDS, *GROUPS])


def _parse(name: str, arguments: list[str]) -> object:
    import tyro

    _check_given_once(name, arguments)
    module, class_name, _ = COMMANDS[name]
    command = getattr(importlib.import_module(f"sacflow_robot.cli.{module}"), class_name)
    default = command.default(arguments) if hasattr(command, "default") else None
    complaint, help_text = io.StringIO(), io.StringIO()
    # tyro knows nothing of NO_COLOR; what is not a terminal gets no colors.
    plain = contextlib.redirect_stdout(help_text) if os.environ.get("NO_COLOR") else contextlib.nullcontext()
    try:
        with contextlib.redirect_stderr(complaint), plain:
            # AvoidSubcommands: an optional value is an option, never a subcommand.
            config = (tyro.conf.AvoidSubcommands,)
            return tyro.cli(command, prog=f"{PROGRAM} {name}", args=arguments, default=default, config=config)
    except SystemExit as stopped:
        if not stopped.code:
            print(help_text.getvalue(), end="")
            raise
        raise UsageError(_first_complaint(complaint.getvalue(), name)) from None


_NAMES_DATA = {"demos", "replay", "log", "filter-key", "recording", "policy"}


def _check_given_once(name: str, arguments: Sequence[str]) -> None:
    """Refuse an option that names data and is given twice: the parser takes the last, and the first would be lost unseen.

    Of any other option the last counts, as in other command lines: a script may append to a command that it was given.
    """
    given: set[str] = set()
    for argument in arguments:
        if not argument.startswith("--") or argument == "--":
            continue
        option = argument.partition("=")[0]
        words = option.removeprefix("--").replace("_", "-")
        if words in given:
            raise UsageError(
                f"{option} is given twice to '{name}'; give it once, with all of its values where it takes several"
            )
        if words in _NAMES_DATA:
            given.add(words)


def _first_complaint(box: str, name: str) -> str:
    """Extract tyro's first complaint from its box, as one line."""
    box = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    # Where stdout takes ASCII only, there is no frame: the title and a line of dashes stand above.
    if len(lines) > 1 and "╭" not in box and set(lines[1]) == {"-"}:
        del lines[:2]
    text = " ".join(" ".join(line for line in lines if not set(line) <= {"─", "-"}).split())
    text = re.split(" (?:Argument|For full) helptext", text)[0]
    text = text.replace(f"Missing from {PROGRAM} {name}:", "missing:")  # the command is named below
    return f"{text.rstrip('.')}; see '{PROGRAM} {name} --help'"


def missing(error: ImportError) -> str:
    """Name the extra that installs a missing package, or why an installed one cannot be imported."""
    module = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError):
        return f"{module} is installed but cannot be imported: {one_line(error)}"
    needed = f"this command needs {module}, which is not installed"
    extra = next((extra for extra, modules in EXTRAS.items() if module in modules), None)
    return needed if extra is None else f"{needed}; pip install 'sacflow-robot[{extra}]'"


def _members(group: str) -> list[str]:
    return [name for name in COMMANDS if not group or name.startswith(f"{group} ")]


def _overview(group: str = "") -> str:
    """All commands, or those of a group."""
    names = _members(group)
    width = max(map(len, names))
    lines = [f"  {name:<{width}}  {COMMANDS[name][2]}" for name in names]
    return "\n".join(
        [
            f"usage: {PROGRAM} {f'{group} ' if group else ''}COMMAND [OPTION ...]",
            "",
            *lines,
            "",
            f"'{PROGRAM} {f'{group} ' if group else ''}COMMAND --help' lists a command's options.",
        ]
    )
