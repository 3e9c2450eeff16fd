"""A run folder: everything that made a policy, written so that a crash leaves nothing half-written."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sacflow_robot import __version__
from sacflow_robot.errors import DataError, UsageError, one_line
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.config_file import from_yaml, to_yaml
from sacflow_robot.spec import NO_ENVIRONMENT, RobotSpec
from sacflow_robot.utils.atomic_files import check_output, write_text

CHECKPOINT_LAYOUT = 4
"""Counts up when the content of a checkpoint or its meaning changes, so that another version's is refused by name."""


_PROFILES = "profile", "safety"
"""Settings that name a calibration profile; a run keeps its own copy, so that it can go on wherever it lies."""


_ROBOT = "robot.json"
_LOCK = ".lock"
_claimed: dict[tuple[int, int], int] = {}  # descriptors that this process holds locked, by device and inode


class RunFolder:
    """Paths and writers of one run.

    Args:
        path: The folder.
        env: Environment of the run, after which its policy file is named.
        robot: The robot of a run without an environment, whose task names the policy file; kept as ``robot.json``.
    """

    def __init__(self, path: Path, env: str, robot: RobotSpec | None = None) -> None:
        self.path = path
        self.robot = robot
        self.config = path / "config.yaml"
        self.checkpoint = path / "checkpoint.pt"
        self.metrics = path / "metrics.csv"
        self.curve = path / "curve.png"
        self.episodes = path / "episodes.zarr"
        self.policy = path / f"{_name_of(env, robot)}.onnx"
        self._env = env

    @staticmethod
    def check_free(path: Path | None) -> None:
        """Raise UsageError unless a run can be made there; None stands for one yet to be chosen."""
        if (
            path is not None
            and (path.is_symlink() or path.exists())
            and not (path.is_dir() and all(file.name == _LOCK for file in path.iterdir()))
        ):
            raise UsageError(f"{path} exists already; give another --out, or go on with it by --resume {path}")
        check_output(path or Path("runs"), folder=True)

    @staticmethod
    def create(path: Path | None, config: TrainConfig, robot: RobotSpec | None = None) -> RunFolder:
        """Make a new run folder.

        Args:
            path: Where; None takes the first free ``runs/<env>-<velocity>-s<seed>[-N]``, with another algorithm
                than sac-flow named instead of the velocity, and with the robot's task where there is no environment.
            config: Written into it.
            robot: The robot of a run without an environment; written into it too.

        Raises:
            UsageError: The path is taken, or cannot be made.
        """
        RunFolder.check_free(path)
        try:
            if path is None:
                kind = config.velocity if config.algo == "sac-flow" else config.algo
                path = _make_numbered(Path("runs") / f"{_name_of(config.env, robot)}-{kind}-s{config.seed}")
            path.mkdir(parents=True, exist_ok=True)
            folder = RunFolder(path, config.env, robot)
            folder.claim()
            RunFolder.check_free(path)  # another process may have made it meanwhile
            if robot is not None:
                write_text(path / _ROBOT, robot.to_json())
            folder.write_config(config)
        except OSError as error:
            raise UsageError(f"cannot make the run folder {path or 'runs'}: {one_line(error)}") from None
        return folder

    @staticmethod
    def open(path: Path) -> tuple[RunFolder, TrainConfig]:
        """Open a run folder to go on with.

        Raises:
            DataError: It is not a run folder.
        """
        try:
            config = from_yaml((path / "config.yaml").read_text())
        except (OSError, UnicodeDecodeError):
            raise DataError(f"{path} is not a run folder: it has no readable config.yaml") from None
        inside: dict[str, Any] = {
            name: str(path / f"{name}.yaml") for name in _PROFILES if getattr(config, name) == f"{name}.yaml"
        }
        robot = _read_robot(path / _ROBOT) if config.env == NO_ENVIRONMENT else None
        return RunFolder(path, config.env, robot), replace(config, **inside)

    def claim(self) -> None:
        """Keep other processes from writing to the run until this one ends, however it ends.

        Raises:
            DataError: Another process has claimed it, or it cannot be written to.
        """
        try:
            descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise DataError(f"cannot write to {self.path}: {one_line(error)}") from None
        for key, held in list(_claimed.items()):
            if os.fstat(held).st_nlink == 0:  # of a run that has been removed
                os.close(_claimed.pop(key))
        status = os.fstat(descriptor)
        key = status.st_dev, status.st_ino
        try:
            if key not in _claimed:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _claimed[key] = descriptor
        except BlockingIOError:
            raise DataError(f"another process is training in {self.path}; wait for it to end, or stop it") from None
        except OSError as error:
            raise DataError(f"cannot lock {self.path}: {one_line(error)}") from None
        finally:
            if _claimed.get(key) != descriptor:
                os.close(descriptor)

    @contextmanager
    def copied(self, path: Path) -> Iterator[RunFolder]:
        """A copy of the run, without its policy file, to be changed: it stands at ``path`` once all has gone well, or not at all.

        Raises:
            UsageError: The path is taken, or cannot be written.
            DataError: Another process is making it.
        """
        RunFolder.check_free(path)
        partial = path.with_name(f".{path.name}.partial")
        others = shutil.ignore_patterns("followed.json", self.policy.name, _LOCK)
        try:
            partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot copy {self.path} to {path}: {one_line(error)}") from None
        RunFolder(partial, self._env).claim()
        try:
            try:
                for left in [file for file in partial.iterdir() if file.name != _LOCK]:  # by a process that was killed
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                shutil.copytree(self.path, partial, ignore=others, dirs_exist_ok=True)
            except (OSError, shutil.Error) as error:
                raise UsageError(f"cannot copy {self.path} to {path}: {one_line(error)}") from None
            yield RunFolder(partial, self._env, self.robot)
            try:
                partial.replace(path)
            except OSError as error:
                raise UsageError(f"cannot make {path}: {one_line(error)}") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def write_config(self, config: TrainConfig) -> None:
        """Replace the configuration that the folder goes on with; profiles that it names are kept beside it."""
        kept: dict[str, Any] = {}
        for name in _PROFILES:
            given = getattr(config, name)
            if given and (name != "profile" or config.randomize == "profile"):
                own = self.path / f"{name}.yaml"
                if Path(given).resolve() != own.resolve():
                    try:
                        text = Path(given).read_text()
                    except (OSError, UnicodeDecodeError) as error:
                        raise DataError(f"--{name} {given} cannot be read: {one_line(error)}") from None
                    write_text(own, text)
                kept[name] = own.name
        write_text(self.config, to_yaml(replace(config, **kept)))

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint in one step.

        Raises:
            DataError: The disk is full; the previous checkpoint is intact.
        """
        partial = self.checkpoint.with_suffix(".partial")
        try:
            torch.save(state, partial)
            partial.replace(self.checkpoint)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            raise DataError(f"cannot write {self.checkpoint}: {one_line(error)}; is the disk full?") from None

    def load_checkpoint(self, config: TrainConfig, *, mapped: bool = False) -> dict[str, Any]:
        """Read the checkpoint.

        Args:
            config: What it has to be of.
            mapped: Leave it on disk and read what is used of it, for one with a replay buffer larger than memory.

        Raises:
            DataError: There is none, it is damaged, or it is of another task, algorithm or version.
        """
        if not self.checkpoint.exists():
            raise DataError(f"{self.path} has no checkpoint.pt to go on from; start the run again")
        try:
            state: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # torch raises pickle's, zip's and its own
            text = one_line(error)
            raise DataError(f"{self.checkpoint} cannot be read ({text}); is it complete?") from None
        if not isinstance(state, dict):
            raise DataError(f"{self.checkpoint} is not a checkpoint of a run; put back the file that belongs there")
        self._check_made_by(state.get("made_by", {}), made_by(config))
        return {name: _with_new_names(part) for name, part in state.items()}

    def _check_made_by(self, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        if theirs.get("layout") != ours["layout"]:
            version = theirs.get("version", "an earlier version")
            raise DataError(
                f"{self.checkpoint} was written by sacflow-robot {version} in layout {theirs.get('layout', 1)}; this is "
                f"{ours['version']}, which reads layout {ours['layout']}; go on with the version that wrote it"
            )
        for name in ("task", "algorithm", "policy"):
            if theirs.get(name) != ours[name]:
                raise DataError(
                    f"{self.checkpoint} is of {name} {theirs.get(name)!r}, its config.yaml says {ours[name]!r}; put back "
                    f"the file that belongs there"
                )


def _name_of(env: str, robot: RobotSpec | None) -> str:
    """Part of a file's name that says what a run is of."""
    name = env if robot is None else robot.task
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "policy"


def _read_robot(path: Path) -> RobotSpec:
    """The robot of a run without an environment.

    Raises:
        DataError: The file is missing or damaged.
    """
    try:
        return RobotSpec.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({one_line(error)}); it says which robot the run is of") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def made_by(config: TrainConfig) -> dict[str, Any]:
    """Origin of a checkpoint."""
    return {
        "layout": CHECKPOINT_LAYOUT,
        "version": __version__,
        "task": config.env,
        "algorithm": config.algo,
        "policy": config.velocity,
    }


def _make_numbered(base: Path) -> Path:
    """Make and return the first of base, base-2, base-3 ... that nobody else has made."""
    base.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            continue
    raise AssertionError("unreachable")


def _with_new_names(part: Any) -> Any:
    """Spell a checkpoint's names as today: version 0.1 wrote ``optimiser`` and ``normalised``."""
    if isinstance(part, str):
        return part.replace('"normalised"', '"normalized"')
    if not isinstance(part, dict):
        return part
    return {
        name.replace("optimiser", "optimizer") if isinstance(name, str) else name: _with_new_names(value)
        for name, value in part.items()
    }
