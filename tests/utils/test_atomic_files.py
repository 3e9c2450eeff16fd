"""Outputs are looked at before the work, and are under their name whole or not at all."""

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from sacflow_robot.cli import main
from sacflow_robot.data.formats.demonstrations import DemoSet
from sacflow_robot.data.formats.sources import write_demos
from sacflow_robot.data.log.episode_writer import EpisodeWriter, write_log
from sacflow_robot.episode import Episode
from sacflow_robot.errors import LogWriteError, UsageError
from sacflow_robot.spec import RobotSpec
from sacflow_robot.utils.atomic_files import check_output, replacing, write_text


@pytest.fixture
def no_files() -> Path:
    """A folder that takes no file, of nobody: a file system of the kernel's."""
    if not Path("/proc/sys").is_dir():
        pytest.skip("there is no /proc here")
    return Path("/proc/sys")


def test_an_output_that_could_not_be_written_is_refused_and_nothing_is_left(tmp_path: Path, no_files: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    check_output(None)
    for path in (tmp_path / "a.json", tmp_path / "file", tmp_path / "new" / "deep" / "a.json"):
        check_output(path)
    for path in (tmp_path / "folder", tmp_path / "new"):
        check_output(path, folder=True)
    check_output(tmp_path / "a.MP4", suffix=".mp4")
    with pytest.raises(UsageError, match=r"^--out .*folder is a folder; give the name of a file$"):
        check_output(tmp_path / "folder")
    with pytest.raises(UsageError, match=r"^--video .*a.avi: give a file that ends in .mp4$"):
        check_output(tmp_path / "a.avi", "--video", suffix=".mp4")
    with pytest.raises(UsageError, match=r"there is no folder .*new; give a file in a folder that exists$"):
        check_output(tmp_path / "new" / "a.png", "--plot", parents=False)
    for path in (tmp_path / "file" / "a.json", tmp_path / "file" / "deep" / "a.json"):
        with pytest.raises(UsageError, match=r"file is not a folder$"):
            check_output(path)
    for path in (no_files / "a.zarr", no_files / "new" / "a.zarr", tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(UsageError, match=r"cannot be written: .*; give another path$"):
            check_output(path)
        with pytest.raises(UsageError, match=r"cannot be written|not a folder"):
            check_output(path, folder=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "command",
    [
        "train --env lift --out {}/run",
        "demos collect --env lift --out {}/a.zarr",
        "demos convert missing.zarr {}/a.hdf5",
        "export missing --out {}/a.onnx",
        "log repair missing.zarr --out {}/a.zarr",
        "log copy missing.zarr {}/a.zarr",
        "log info missing.zarr --plot {}/a.png",
        "demos info missing.zarr --plots {}/a.png",
        "replay missing.zarr --video {}/a.mp4",
        "replay missing.zarr --rerun {}/a.rrd",
        "run --robot sim:lift --log {}/a.zarr",
        "bench log --out {}/a.json",
        "bench loop --out {}/a.json",
        "bench export --out {}/a.json",
        "study likelihood --out {}/study",
        "calibrate latency --out {}/a.yaml",
        "calibrate noise --save {}/a.npz",
        "calibrate dynamics --plot {}/a.png",
        "calibrate handeye --images missing --out {}/a.yaml",
        "gap --log missing.zarr --plot {}/a.png",
        "eval --policy missing.onnx --robustness --plot {}/a.png",
        "follow missing --log missing.zarr --publish {}/a.onnx",
    ],
)
def test_commands_look_at_their_outputs_first(no_files: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main(command.format(no_files).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "/proc/sys" in line and ("cannot be written" in line or "cannot make the folder" in line)


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_text(path, "one")
    with pytest.raises(OSError, match="full"), replacing(path) as partial:
        partial.write_text("tw")
        assert partial.suffix == ".json"
        raise OSError(errno.ENOSPC, "full")
    assert path.read_text() == "one" and list(path.parent.iterdir()) == [path]
    pid = os.fork()
    if pid == 0:
        with replacing(path) as partial:
            partial.write_text("tw")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert path.read_text() == "one"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk]).returncode:
        pytest.skip("a small disk can be mounted by root alone")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.fixture
def demos(robot: RobotSpec, make_episode: Callable[..., Episode]) -> DemoSet:
    return DemoSet(robot, [make_episode(200, seed=i) for i in range(3)])


@pytest.mark.parametrize("kind", ["zarr", "hdf5", "lerobot"])
def test_demonstrations_on_a_full_disk_leave_nothing(tiny_disk: Path, demos: DemoSet, kind: str) -> None:
    with pytest.raises(LogWriteError, match=r"cannot write .*No space left on device|No space left on device"):
        write_demos(tiny_disk / f"a.{kind}", demos, kind)
    assert list(tiny_disk.iterdir()) == []


def test_hdf5_is_flushed_by_nobody_but_us(tmp_path: Path, demos: DemoSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """libhdf5 ends the process when it cannot flush, so that it must not be the one that writes to the disk."""

    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(LogWriteError, match="No space left on device"):
            write_demos(tmp_path / "a.hdf5", demos)
    assert list(tmp_path.iterdir()) == []
    write_demos(tmp_path / "a.hdf5", demos)
    with h5py.File(tmp_path / "a.hdf5") as file:
        assert np.array_equal(file["data/demo_1/actions"], demos.episodes[1].action)


def test_a_repair_that_fails_leaves_nothing(
    tmp_path: Path, demos: DemoSet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path / "a.zarr", demos.robot, demos.episodes)
    real, count = EpisodeWriter.append, iter(range(10))

    def append(log: EpisodeWriter, episode: Episode) -> None:
        if next(count) == 2:
            raise LogWriteError("No space left on device")
        real(log, episode)

    monkeypatch.setattr(EpisodeWriter, "append", append)
    assert main(["log", "repair", str(tmp_path / "a.zarr"), "--out", str(tmp_path / "b.zarr")]) == 1
    assert "No space left" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir() if f.suffix != ".lock"] == ["a.zarr"]
