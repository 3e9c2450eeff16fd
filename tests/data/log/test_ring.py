"""Where the ring of a log is made when shared memory cannot be used."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sacflow_robot.data.log import ring, store
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.data.log.recorder import StepRecorder
from sacflow_robot.envs import demonstrations
from sacflow_robot.envs.demonstrations import collect
from sacflow_robot.study import runs
from tests.data.log.forked_writer import ROBOT, Forked, write_episodes

MOUNTS = {"read-only": "ro,size=1m", "64 KiB": "size=64k", "no inodes": "nr_inodes=1"}


def written_in_the_folder(path: Path) -> None:
    with StepRecorder(path, ROBOT, Forked) as log:
        write_episodes(log, lambda: None)
        assert log._ring is not None and log._ring.path.parent == path / store.WRITING
    assert len(EpisodeLog.open(path)) == 3


@pytest.fixture(params=MOUNTS)
def poor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A place for shared memory that has none to give."""
    place = tmp_path / "shm"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", MOUNTS[request.param], "tmpfs", place]
    if os.geteuid() != 0 or subprocess.run(command).returncode:
        pytest.skip("root alone can mount")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_ring_that_shared_memory_cannot_hold_is_in_the_folder(
    tmp_path: Path, poor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "_TMPFS", poor)
    written_in_the_folder(tmp_path / "a.zarr")
    assert not list(poor.iterdir())


@pytest.mark.parametrize("kind", ["missing", "a file", "taken"])
def test_a_ring_where_there_is_no_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    place, log = tmp_path / "shm", tmp_path / "a.zarr"
    monkeypatch.setattr(ring, "_TMPFS", place)
    if kind == "a file":
        place.write_text("")
    elif kind == "taken":  # the name is a folder of somebody else's
        ring._places(log)[0].mkdir(parents=True)
    written_in_the_folder(log)


def test_work_for_several_processes_is_done_where_they_cannot_lock(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*arguments: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    seen: list[object] = []
    monkeypatch.setattr(demonstrations, "ProcessPoolExecutor", none)
    monkeypatch.setattr(demonstrations, "_prepared", lambda task, engine: engine)
    monkeypatch.setattr(demonstrations, "demonstrate", lambda task, quality, seed, engine: seed)
    assert collect("lift", "proficient", [1, 2], 2, seen.append) == [1, 2] == seen
    assert "Read-only file system" in caplog.text
    monkeypatch.setattr(runs, "ProcessPoolExecutor", none)
    assert runs.in_parallel(str, [1, 2, 3], 2, lambda: seen.append("done")) == ["1", "2", "3"]


LOCKS = """
import sys
from pathlib import Path
from sacflow_robot.study.runs import in_parallel
from tests.data.log.test_ring import written_in_the_folder
print(in_parallel(str, [1, 2], 2, lambda: None))
written_in_the_folder(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("options", ["remount,ro,bind"])
def test_a_machine_whose_shared_memory_is_read_only(options: str) -> None:
    run = f'mount --bind /dev/shm /dev/shm && mount -o {options} /dev/shm && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", run, "sh", sys.executable, "-c", LOCKS]
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("root alone can mount")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as disk:  # the log itself can be written
        command.append(f"{disk}/a.zarr")
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['1', '2']\n"
