"""MP4 videos of replays, in H.264, which browsers and chat programs play, with a strip under each frame."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from sacflow_robot.episode import Episode, Source
from sacflow_robot.errors import DataError, one_line
from sacflow_robot.spec import RobotSpec
from sacflow_robot.utils.atomic_files import replacing

Picture = npt.NDArray[np.uint8]

# A constant quality at which a rendered scene shows no blocks; smaller is better.
_QUALITY = {"crf": "20", "preset": "medium"}

CAPTION_HEIGHT = 40  # height that it adds to a picture, in pixels

_MARGIN, _TEXT = 14, 15
_INK, _FAINT, _STRIP = (245, 245, 245), (150, 155, 162), (28, 31, 36)
_BAR, _PITCH, _HALF = 8, 13, 11  # width, distance and half the height of the action's bars, in pixels

SOURCE_COLORS = {
    Source.POLICY: (86, 156, 255),
    Source.HUMAN: (255, 176, 46),
    Source.EXPERT: (80, 200, 120),
    Source.HOLD: (170, 170, 170),
}


class Caption:
    """Draws the strip of one episode: its title, where in it a frame is, who chose the action, and the action itself."""

    def __init__(self, robot: RobotSpec, episode: Episode, title: str) -> None:
        self._robot = robot
        self._episode = episode
        self._title = title
        self._font = ImageFont.load_default(_TEXT)

    def draw(self, image: Picture, step: int) -> Picture:
        """The image (height, width, 3) of observation ``step`` (0 to T), with the strip added under it."""
        height, width = image.shape[:2]
        picture = Image.new("RGB", (width, height + CAPTION_HEIGHT), _STRIP)
        picture.paste(Image.fromarray(image))
        draw = ImageDraw.Draw(picture, "RGBA")
        middle = height + CAPTION_HEIGHT // 2
        seconds = step / self._robot.control_rate_hz  # as the video runs, also where a robot in lockstep ran faster
        draw.text((_MARGIN, middle), self._title, _INK, self._font, "lm")
        # Right-aligned numbers stand still while they count.
        draw.text((width * 0.42, middle), f"step {step} of {len(self._episode)}", _INK, self._font, "rm")
        draw.text((width * 0.53, middle), f"{seconds:.2f} s", _FAINT, self._font, "rm")
        if step < len(self._episode):
            self._draw_action(draw, step, width, middle)
        elif self._episode.success:
            draw.text((width - _MARGIN, middle), "solved", SOURCE_COLORS[Source.EXPERT], self._font, "rm")
        else:
            draw.text((width - _MARGIN, middle), "not solved", SOURCE_COLORS[Source.HUMAN], self._font, "rm")
        return np.asarray(picture)

    def _draw_action(self, draw: ImageDraw.ImageDraw, step: int, width: int, middle: int) -> None:
        """One bar per action dimension, up or down from the middle line within its bounds; a dot says who chose it."""
        source = Source(int(self._episode.source[step]))
        color = SOURCE_COLORS[source]
        left = width - _MARGIN - _PITCH * self._robot.action_dim
        draw.line((left - 2, middle, width - _MARGIN, middle), (*_FAINT, 120))
        for i, value in enumerate(self._episode.action[step]):
            bound = self._robot.action_high[i] if value > 0 else -self._robot.action_low[i]
            length = round(_HALF * float(np.clip(abs(value) / bound, 0, 1))) if bound > 0 else 0
            top, foot = (middle - length, middle) if value > 0 else (middle, middle + length)
            draw.rectangle((left + i * _PITCH, top, left + i * _PITCH + _BAR, foot), fill=color)
        label = source.name.lower()
        edge = left - 14
        draw.text((edge, middle), label, _INK, self._font, "rm")
        dot = edge - draw.textlength(label, self._font) - 14
        draw.ellipse((dot, middle - 4, dot + 8, middle + 4), fill=color)


@contextmanager
def write_video(path: Path, rate_hz: float, size: tuple[int, int]) -> Iterator[Callable[[Picture], None]]:
    """Write a video that appears under its name once it is whole; yields what adds a frame, RGB (height, width, 3).

    Args:
        path: File that ends in ``.mp4``.
        rate_hz: Frames per second.
        size: Width and height in pixels, both even, as H.264 wants them.

    Raises:
        DataError: It cannot be written there.
    """
    try:
        with replacing(path) as partial:
            partial.touch()  # a folder that takes no file is found out now, and not with the first frame
            # The index goes to the front, so that a browser plays before it has the whole file.
            with av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as file:
                stream = file.add_stream("libx264", Fraction(rate_hz).limit_denominator(1000), options=_QUALITY)
                stream.width, stream.height = size
                stream.pix_fmt = "yuv420p"

                def add(image: Picture) -> None:
                    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                    file.mux(stream.encode(frame))

                yield add
                file.mux(stream.encode(None))
    except (OSError, av.error.FFmpegError) as error:
        raise DataError(f"cannot write a video at {path}: {one_line(error)}") from None
