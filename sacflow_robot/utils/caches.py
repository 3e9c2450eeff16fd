"""Folders for what is kept to be quicker the next time, on machines without a home, or with one that can't be written."""

import os
import shutil
import stat
import tempfile
from pathlib import Path

from sacflow_robot.errors import UsageError

_ROOM = 64 << 20  # bytes that a disk must have left for a cache; what the compilers keep takes some 10 MB


def cache_root() -> Path:
    """Folder for what is collected or downloaded once: SACFLOW_ROBOT_CACHE, else where this system keeps caches.

    Raises:
        UsageError: This user has no home.
    """
    own = os.environ.get("SACFLOW_ROBOT_CACHE")
    if own:
        return Path(own)
    try:
        return _user_folder("XDG_CACHE_HOME", ".cache") / "sacflow-robot"
    except RuntimeError:
        raise UsageError("this user has no home folder; set SACFLOW_ROBOT_CACHE to a folder for caches") from None


def compiler_cache(name: str) -> Path | None:
    """A folder that can be written, for what can be made again at any time, e.g. compiled code.

    Returns:
        The folder of that name under :func:`cache_root`, else under one among the system's temporary files that only this
        user can write; None where neither can be written.
    """
    try:
        folder = cache_root() / name
    except UsageError:
        folder = None
    if folder is not None and can_write(folder):
        return folder
    private = _private_folder()
    return private / name if private is not None and can_write(private / name) else None


def can_write(folder: Path) -> bool:
    """True if a folder exists or can be made, takes files, and has room on its disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return shutil.disk_usage(folder).free >= _ROOM
    except OSError:
        return False


def lend_folders() -> None:
    """Give matplotlib and Mesa a folder where theirs can't be written; without one they say so at every start.

    Sets MPLCONFIGDIR and MESA_SHADER_CACHE_DIR for this process and those that it starts.
    """
    cached = _may_write("XDG_CACHE_HOME", ".cache")
    for variable, name, usable in (
        ("MPLCONFIGDIR", "matplotlib", cached and _may_write("XDG_CONFIG_HOME", ".config")),
        ("MESA_SHADER_CACHE_DIR", "mesa", cached),
    ):
        if not usable and variable not in os.environ:
            folder = compiler_cache(name)
            if folder is not None:
                os.environ[variable] = str(folder)


def _may_write(variable: str, name: str) -> bool:
    """True if one of the user's folders can be written or made; it is not made."""
    try:
        folder = _user_folder(variable, name)
    except RuntimeError:
        return False
    existing = next((p for p in (folder, *folder.parents) if p.exists()), Path("/"))
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _user_folder(variable: str, name: str) -> Path:
    """Raises RuntimeError where there is no home."""
    return Path(os.environ.get(variable) or Path.home() / name)


def _private_folder() -> Path | None:
    """This user's folder among the temporary files. What is compiled is run, so nobody else may be able to put it there."""
    try:
        folder = Path(tempfile.gettempdir()) / f"sacflow-robot-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if ours else None
