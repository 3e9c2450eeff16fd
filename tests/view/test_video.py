from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError
from sacflow_robot.spec import RobotSpec
from sacflow_robot.view.video import CAPTION_HEIGHT, Caption, write_video


def test_a_video_is_what_browsers_play(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with write_video(path, 20.0, (64, 48)) as add:
        for level in range(0, 200, 10):
            add(np.full((48, 64, 3), level, np.uint8))
        assert not path.exists(), "it appears once it is whole"
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.width, stream.height) == (20, 64, 48)
        levels = [frame.to_ndarray(format="rgb24").mean() for frame in file.decode(stream)]
    assert levels == pytest.approx(list(range(0, 200, 10)), abs=3)
    content = path.read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat"), "the index comes first"
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_a_video_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), write_video(path, 20.0, (64, 48)) as add:
        add(np.zeros((48, 64, 3), np.uint8))
        raise KeyboardInterrupt
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(DataError, match="cannot write a video at"), write_video(path / "b.mp4", 20.0, (64, 48)):
        pass


def test_the_caption_says_where_it_is_and_leaves_the_picture_alone(
    make_episode: Callable[..., Episode], robot: RobotSpec
) -> None:
    episode = make_episode(3)
    caption = Caption(robot, episode, "lift, episode 0")
    image = np.full((480, 640, 3), 200, np.uint8)
    drawn = [caption.draw(image, step) for step in range(4)]
    for picture in drawn:
        assert picture.shape == (480 + CAPTION_HEIGHT, 640, 3) and picture.dtype == np.uint8
        assert np.array_equal(picture[:480], image) and 20 < picture[480:].mean() < 80
    assert not np.array_equal(drawn[0], drawn[1]), "the step counts"
    # The gripper's bar, the last one: above the middle line where it closes, below where it opens.
    column = slice(640 - 14 - 13 + 2, 640 - 14 - 13 + 7)
    blue = (drawn[0][:, column, 2].astype(int) - drawn[0][:, column, 0] > 100).all(axis=1)
    above, below = blue[485:499].sum(), blue[502:515].sum()
    value = episode.action[0, -1]
    assert (above > below) == (value > 0) and max(above, below) == pytest.approx(11 * abs(value), abs=2)
