"""The files of a diffusion_policy store, a folder or a zip file: its arrays, whose lengths and episodes agree."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from sacflow_robot.errors import DataError, one_line

ENDS = "meta/episode_ends"
_METADATA = (".zarray", "zarr.json")
_NO_OBSERVATIONS = {"action", "timestamp", "stage", "reward", "rewards", "done", "dones", "terminated", "truncated"}
_UMI_GOALS = ("_demo_start_pose", "_demo_end_pose")  # where an episode begins and ends, of use to UMI's training only
UMI_ACTION = {"eef_pos": "m", "eef_rot_axis_angle": "rad", "gripper_width": "m"}

# What zarr, numcodecs and zipfile raise on a store that is damaged.
_UNREADABLE = (
    *(OSError, KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError, EOFError),
    *(zipfile.BadZipFile, NotImplementedError, AssertionError, OverflowError, MemoryError, SystemError),
)


@dataclass(frozen=True)
class Array:
    """Metadata of one array under ``data/``."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None
    codec: str

    @property
    def is_image(self) -> bool:
        return len(self.shape) > 3 or (len(self.shape) == 3 and self.dtype == np.uint8)

    @property
    def is_low_dim(self) -> bool:
        return self.dtype is not None and not self.is_image and len(self.shape) > 0


@dataclass(frozen=True)
class Store:
    """An open store.

    Attributes:
        path: Where it is.
        root: Its group.
        arrays: What is under ``data/``, by key.
        ends: Exclusive end of each episode.
    """

    path: Path
    root: zarr.Group
    arrays: Mapping[str, Array]
    ends: list[int]

    def read(self, key: str) -> npt.NDArray[Any]:
        try:
            return np.asarray(self.root[f"data/{key}"][:])  # type: ignore[index]
        except _UNREADABLE as error:
            raise DataError(f"{self.path}: data/{key} cannot be read ({one_line(error)}); is it complete?") from None

    def absent_chunks(self, key: str) -> int:
        """Number of an array's chunks that are missing; 0 where all are."""
        array = self.root[f"data/{key}"]
        assert isinstance(array, zarr.Array)
        present = array.nchunks_initialized
        return array.nchunks - present if present else 0

    @property
    def low_dim(self) -> dict[str, Array]:
        return {key: array for key, array in self.arrays.items() if array.is_low_dim}

    @property
    def observation_keys(self) -> list[str]:
        return [
            key
            for key in self.low_dim
            if key not in _NO_OBSERVATIONS and not key.endswith(_UMI_GOALS) and "/" not in key
        ]

    @property
    def umi_keys(self) -> list[str]:
        """Arrays that make up UMI's actions, robot by robot; empty if the store is not UMI's."""
        keys: list[str] = []
        for robot in count():
            parts = [f"robot{robot}_{part}" for part in UMI_ACTION]
            if not all(key in self.low_dim for key in parts):
                return keys
            keys += parts
        raise AssertionError

    def episodes(self) -> Iterator[tuple[int, slice]]:
        """Number and rows of each episode."""
        return enumerate(slice(start, end) for start, end in pairwise([0, *self.ends]))


@contextmanager
def open_store(path: Path) -> Iterator[Store]:
    """Open a folder or zip file for reading; its arrays' lengths were found to agree.

    Raises:
        DataError: It is no such store, or is damaged.
    """
    with ExitStack() as stack:
        try:
            documents = dict(_metadata(path) if path.is_dir() else _zipped_metadata(path))
            prefix = next((name.removesuffix(ENDS) for name in documents if name.endswith(ENDS)), None)
            if prefix is None:
                raise DataError(f"{path} is no diffusion_policy store: it has no {ENDS}")
            arrays = {
                name.removeprefix(f"{prefix}data/"): json.loads(text)
                for name, text in documents.items()
                if name.startswith(f"{prefix}data/")
            }
            described = {key: _describe(key, metadata) for key, metadata in arrays.items()}
            storage: Any = path
            if not path.is_dir():
                storage = zarr.storage.ZipStore(path, mode="r")
                stack.callback(storage.close)
            root = zarr.open_group(storage, mode="r", path=prefix.rstrip("/"))
            ends = _ends(path, np.asarray(root[ENDS][:]), described)  # type: ignore[index]
        except _UNREADABLE as error:
            raise DataError(
                f"{path} cannot be read as a diffusion_policy store ({one_line(error)}); is it complete?"
            ) from None
        yield Store(path, root, described, ends)


def _metadata(path: Path) -> Iterator[tuple[str, str]]:
    """Name and metadata (JSON) of each array of a folder."""
    for group in ("data", "meta"):
        for folder in sorted((path / group).iterdir()):
            for name in _METADATA:
                if (folder / name).is_file():
                    yield f"{group}/{folder.name}", (folder / name).read_text()


def _zipped_metadata(path: Path) -> Iterator[tuple[str, str]]:
    """Name and metadata (JSON) of each array of a zip file."""
    with zipfile.ZipFile(path) as file:
        for name in file.namelist():
            array, _, document = name.rpartition("/")
            if document in _METADATA and array.rpartition("/")[0].rpartition("/")[2] in ("data", "meta"):
                yield array, file.read(name).decode()


def _describe(key: str, metadata: Mapping[str, Any]) -> Array:
    """One array, from metadata of Zarr format 2 or 3."""
    try:
        dtype: np.dtype[Any] | None = np.dtype(metadata.get("dtype", metadata.get("data_type")))
    except TypeError:  # strings and the like
        dtype = None
    if dtype is not None and dtype.kind not in "biuf":
        dtype = None
    codec = (metadata.get("compressor") or {}).get("id", "uncompressed")
    return Array(key, tuple(int(n) for n in metadata["shape"]), dtype, str(codec))


def _ends(path: Path, ends: npt.NDArray[Any], arrays: Mapping[str, Array]) -> list[int]:
    """The ends of the episodes, which increase and agree with every array's length.

    Raises:
        DataError: They do not.
    """
    if ends.ndim != 1 or ends.dtype.kind not in "iu":
        raise DataError(f"{path}: {ENDS} is {ends.dtype} of shape {ends.shape}, expected integers (episodes,)")
    found = [int(end) for end in ends]
    for number, (before, end) in enumerate(pairwise([0, *found])):
        if end <= before:
            how = "holds no frames" if end == before else f"runs backwards, to {end} after {before}"
            raise DataError(f"{path}: episode {number} {how} by {ENDS}; correct it, or leave the episode out")
    if not found:
        raise DataError(f"{path} holds no episodes: {ENDS} is empty")
    for array in arrays.values():
        if array.shape[:1] != (found[-1],):
            rows = array.shape[0] if array.shape else "no"
            raise DataError(f"{path}: data/{array.key} has {rows} rows, {ENDS} ends at {found[-1]}; is it complete?")
    return found
