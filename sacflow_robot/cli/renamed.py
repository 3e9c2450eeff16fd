"""Names of version 0.1 that the command line still takes, each with one line that says the new name."""

import sys
from collections.abc import Sequence

_COMMANDS = {"study regularisation": "study regularization"}

_OPTIONS = {
    "arm": "enable",
    "arm-wait": "enable-wait",
    "handheld": "teleop",
    "perturb": "robustness",
    "randomise": "randomize",
    "reload-limit": "max-action-change",
    "spoil": "inject-bad-candidate",
    "updates-per-step": "utd-ratio",
}


def with_new_names(arguments: Sequence[str]) -> list[str]:
    """Replace old names of commands and options, with a line on stderr for each."""
    command = " ".join(arguments[:2])
    if command in _COMMANDS:
        _say(command, _COMMANDS[command])
        arguments = [*_COMMANDS[command].split(), *arguments[2:]]
    options = _OPTIONS
    if arguments[0] in ("train", "study"):
        from sacflow_robot.learn.config_file import RENAMED

        options = {**_OPTIONS, **{old.replace("_", "-"): new.replace("_", "-") for old, new in RENAMED.items()}}
    renamed = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        words = option.removeprefix("--").replace("_", "-")
        no = next((part for part in ("learner.no-", "no-") if words.startswith(part)), "")
        plain = words.replace("no-", "", 1) if no else words
        if option.startswith("--") and plain in options:
            new = options[plain]
            new = f"--{no}{new.removeprefix(no.removesuffix('no-'))}"
            _say(option, new)
            argument = f"{new}{equals}{value}"
        renamed.append(argument)
    return renamed


def _say(old: str, new: str) -> None:
    print(f"sacflow-robot: {old} is now {new}; the old name still works in this release", file=sys.stderr)
