"""Finished episode logs on object stores, through fsspec: ``s3://bucket/episodes.zarr`` and its like.

A store that refuses or does not answer raises DataError where it is read, LogWriteError where it is written; one that
nothing here can reach raises UsageError. Credentials and endpoint come from where the store's own library looks for them, e.g. ``AWS_ENDPOINT_URL``.
"""

from pathlib import Path
from typing import Any

import zarr

from sacflow_robot.errors import DataError, LogWriteError, UsageError, one_line


def is_url(path: Path | str) -> bool:
    """Return True for an address of an object store, False for a path."""
    return "://" in str(path)


def open_group(url: str) -> zarr.Group:
    """The Zarr group at an address, read-only."""
    _file_system(url)
    try:
        return zarr.open_group(url, mode="r", zarr_format=2)
    except (FileNotFoundError, zarr.errors.GroupNotFoundError):
        raise DataError(f"no episode log at {url}; check the address") from None
    except Exception as error:  # every store's library has a tree of its own
        raise DataError(f"cannot read {url}: {one_line(error)}") from None


def names(log: Path | str, array: str) -> set[str]:
    """Names of the files of one array, wherever the log is."""
    if not is_url(log):
        return {file.name for file in (Path(log) / array).iterdir()}
    system, root = _file_system(str(log))
    return {entry.rpartition("/")[2] for entry in system.ls(f"{root}/{array}", detail=False)}


def check_absent(url: str) -> None:
    """Raise UsageError when something is there already."""
    system, root = _file_system(url)
    try:
        taken = system.exists(root)
    except Exception as error:
        raise LogWriteError(f"cannot write {url}: {one_line(error)}") from None
    if taken:
        raise UsageError(f"{url} exists already; give another address or remove it")


def upload(log: Path, url: str) -> None:
    """Copy a finished log there; what makes it a log goes last, so that nobody reads half of one."""
    system, root = _file_system(url)
    files = [f for f in sorted(log.rglob("*")) if f.is_file() and f != log / ".zattrs"]
    try:
        for part in (files, [log / ".zattrs"]):
            system.put([str(f) for f in part], [f"{root}/{f.relative_to(log).as_posix()}" for f in part])
    except Exception as error:
        raise LogWriteError(f"cannot write {url}: {one_line(error)}") from None


def _file_system(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs

        system, root = url_to_fs(url)
    except ImportError as error:
        raise UsageError(f"{url}: {one_line(error)}; for s3:// that is pip install 'sacflow-robot[s3]'") from None
    except ValueError as error:
        raise UsageError(f"{url}: {one_line(error)}; expected e.g. s3://bucket/episodes.zarr") from None
    return system, root.rstrip("/")
