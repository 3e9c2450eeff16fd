"""MP4 videos of replays, in H.264, which browsers and chat programs play."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
import numpy.typing as npt

from sacflow_robot.errors import DataError, one_line

# A constant quality at which a rendered scene shows no blocks; smaller is better.
_QUALITY = {"crf": "20", "preset": "medium"}
_FAILURES = OSError, av.error.FFmpegError


class VideoWriter:
    """A video that appears under its name once it is whole; use it as a context manager.

    Args:
        path: File that ends in ``.mp4``.
        rate_hz: Frames per second.
        size: Width and height in pixels, both even, as H.264 wants them.

    Raises:
        DataError: It cannot be written there.
    """

    def __init__(self, path: Path, rate_hz: float, size: tuple[int, int]) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.stem}.partial.mp4")
        with self._failures():
            self._partial.touch()  # a folder that takes no file is found out now, and not with the first frame
            # The index goes to the front, so that a browser plays before it has the whole file.
            self._file = av.open(str(self._partial), "w", format="mp4", options={"movflags": "+faststart"})
        self._stream = self._file.add_stream("libx264", Fraction(rate_hz).limit_denominator(1000), options=_QUALITY)
        self._stream.width, self._stream.height = size
        self._stream.pix_fmt = "yuv420p"

    def add(self, image: npt.NDArray[np.uint8]) -> None:
        """Add one frame, RGB (height, width, 3)."""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        with self._failures():
            self._file.mux(self._stream.encode(frame))

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                with self._failures():
                    self._file.mux(self._stream.encode(None))
                    self._file.close()
                    self._partial.replace(self._path)
        finally:
            with suppress(*_FAILURES):
                self._file.close()
            self._partial.unlink(missing_ok=True)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except _FAILURES as error:
            raise DataError(f"cannot write a video at {self._path}: {one_line(error)}") from None
