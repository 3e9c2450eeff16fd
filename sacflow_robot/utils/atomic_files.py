"""Output files: looked at before the work, and under their final name only once they are whole."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sacflow_robot.errors import UsageError, one_line


def check_output(
    path: Path | None, option: str = "--out", *, suffix: str = "", folder: bool = False, parents: bool = True
) -> None:
    """Refuse an output that could not be written in the end; leaves nothing behind.

    Args:
        path: What will be written; None for nothing.
        option: What gave it, for the message.
        suffix: How its name has to end.
        folder: Whether it is a folder, perhaps there already, and not a file.
        parents: Whether missing folders above it will be made.

    Raises:
        UsageError: It is of the wrong kind or name, or nothing can be written there.
    """
    if path is None:
        return
    try:
        if not folder and path.is_dir():
            raise UsageError(f"{option} {path} is a folder; give the name of a file")
        if suffix and path.suffix.lower() != suffix:
            raise UsageError(f"{option} {path}: give a file that ends in {suffix}")
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path)  # a name that is too long, for one
        where = path if folder else path.absolute().parent
        if not parents and not where.exists():
            raise UsageError(f"{option} {path}: there is no folder {where}; give a file in a folder that exists")
        while not os.path.lexists(where):
            where = where.absolute().parent
        if not where.is_dir():
            raise UsageError(f"{option} {path}: {where} is not a folder")
        with tempfile.TemporaryFile(dir=where):
            pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise UsageError(f"{option} {path} cannot be written: {reason}; give another path") from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside the file or folder, of the same suffix, to write to.

    What is there takes the final name if all goes well, and is removed if not.

    Raises:
        OSError: The folder takes no file.
    """
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; folders above it are made.

    Raises:
        OSError: The disk is full, or the folder takes no file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(text, newline="")


def put(file: Path, content: bytes, scratch: Path) -> None:
    """Replace a file at once, its content on the disk first, by way of a folder of the same file system.

    Raises:
        OSError: The disk is full or failing.
    """
    partial = scratch / "partial"
    write_through(partial, content)
    partial.replace(file)


def write_through(file: Path, content: bytes) -> None:
    """Write a file and wait until the disk holds it.

    Raises:
        OSError: The disk is full or failing.
    """
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fdatasync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk holds the names in a folder.

    Raises:
        OSError: The disk is failing.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
