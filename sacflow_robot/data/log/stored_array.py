"""One Zarr array of an episode log as its one writer changes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import numpy.typing as npt

from sacflow_robot.utils.atomic_files import put

_CHUNK_BYTES = 2_000_000
_CHUNK_ROWS = 4096
_COMPRESSOR = {"id": "zstd", "level": 1}


class StoredArray:
    """One array: what is on disk, and rows on their way there."""

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self.folder = folder
        self.stored_name = f"{folder.parent.name}.{folder.name}"
        self._description = description
        self.rows: int = description["shape"][0]
        self._shape = tuple(description["chunks"])
        self._dtype = np.dtype(description["dtype"])
        codec = description["compressor"]
        self._codec = None if codec is None else numcodecs.get_codec(codec)
        if description["filters"] or description["order"] != "C" or self._shape[1:] != tuple(description["shape"][1:]):
            raise ValueError(f"{folder.name} is not laid out as this program lays arrays out")
        self._tail: npt.NDArray[Any] | None = None  # the chunk that the next row goes into
        self._dirty = False
        self._surplus = True

    def describe(self) -> dict[str, Any]:
        return {**self._description, "shape": [self.rows, *self._shape[1:]]}

    def fits(self, values: npt.NDArray[Any]) -> bool:
        return values.shape[1:] == self._shape[1:] and values.dtype == self._dtype

    def cut(self, rows: int) -> None:
        self._surplus = True
        self.rows = rows
        self._tail = None
        self._dirty = False

    def read(self) -> npt.NDArray[Any]:
        chunks = [self._read_chunk(i) for i in range(-(-self.rows // self._shape[0]))]
        rows: npt.NDArray[Any] = np.concatenate([*chunks, np.empty((0, *self._shape[1:]), self._dtype)])[: self.rows]
        return rows

    def read_staged(self) -> npt.NDArray[Any]:
        """All rows, those on their way included."""
        whole = self.rows // self._shape[0]
        chunks = [self._read_chunk(i) for i in range(whole)]
        rows: npt.NDArray[Any] = np.concatenate([*chunks, self._load_tail()[: self.rows % self._shape[0]]])
        return rows

    def append(self, values: npt.NDArray[Any], scratch: Path) -> None:
        while len(values):
            tail, at = self._load_tail(), self.rows % self._shape[0]
            count = min(len(values), self._shape[0] - at)
            tail[at : at + count] = values[:count]
            self._dirty, values = True, values[count:]
            if at + count == self._shape[0]:
                self._write_tail(self.rows // self._shape[0], scratch)
                self._tail = None
            self.rows += count

    def flush(self, scratch: Path) -> None:
        if self._dirty and self._tail is not None:
            self._write_tail(self.rows // self._shape[0], scratch)

    def remove_surplus(self) -> None:
        if self._surplus:
            for file in self.folder.iterdir():
                head = file.name.partition(".")[0]
                if head.isdigit() and int(head) * self._shape[0] >= self.rows:
                    file.unlink()
            self._surplus = False

    def _load_tail(self) -> npt.NDArray[Any]:
        if self._tail is None:
            at = self.rows % self._shape[0]
            self._tail = np.zeros(self._shape, self._dtype)
            if at:
                self._tail[:at] = self._read_chunk(self.rows // self._shape[0])[:at]
        return self._tail

    def _read_chunk(self, number: int) -> npt.NDArray[Any]:
        data = self._file(number).read_bytes()
        raw = data if self._codec is None else self._codec.decode(data)
        chunk: npt.NDArray[Any] = np.frombuffer(raw, self._dtype).reshape(self._shape)
        return chunk

    def _write_tail(self, number: int, scratch: Path) -> None:
        assert self._tail is not None
        data = self._tail.tobytes() if self._codec is None else self._codec.encode(self._tail)
        put(self._file(number), bytes(data), scratch)
        self._dirty = False

    def _file(self, number: int) -> Path:
        return self.folder / ".".join([str(number), *["0"] * (len(self._shape) - 1)])


def describe_array(like: npt.NDArray[Any]) -> dict[str, Any]:
    """The ``.zarray`` of an empty array for rows like these (N, ...)."""
    row_bytes = max(1, like.dtype.itemsize * int(np.prod(like.shape[1:])))
    rows = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // row_bytes))
    return {
        "shape": [0, *like.shape[1:]],
        "chunks": [rows, *like.shape[1:]],
        "dtype": like.dtype.str,
        "fill_value": False if like.dtype == bool else 0,
        "order": "C",
        "filters": None,
        "dimension_separator": ".",
        "compressor": _COMPRESSOR,
        "zarr_format": 2,
    }
