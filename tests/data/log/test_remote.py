"""Finished logs on an object store: a real S3 server on this machine."""

from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import fsspec.asyn
import pytest
from zarr.core.sync import sync

from sacflow_robot.cli import main
from sacflow_robot.data.log.episode_writer import EpisodeWriter, write_log
from sacflow_robot.data.log.reader import EpisodeLog
from sacflow_robot.data.log.repair import verify
from sacflow_robot.episode import Episode
from sacflow_robot.errors import DataError, UsageError
from sacflow_robot.learn.config import TrainConfig
from sacflow_robot.learn.training_data import load_training_episodes
from sacflow_robot.spec import RobotSpec

moto_server = pytest.importorskip("moto.server", reason="needs moto with its server")
s3fs = pytest.importorskip("s3fs", reason="needs s3fs")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("s3://robots")
    yield "s3://robots"
    for system in list(
        s3fs.S3FileSystem._cache.values()
    ):  # their sessions end with the process otherwise, with a warning
        client = system._s3
        if client is not None:
            sync(client.close()) if system.asynchronous else fsspec.asyn.sync(system.loop, client.close)
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_logs_go_to_an_object_store_and_back(
    bucket: str,
    make_episode: Callable[..., Episode],
    robot: RobotSpec,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    episodes = [make_episode(n, seed=n) for n in (4, 7)]
    url = f"{bucket}/logs/episodes.zarr"
    with pytest.raises(DataError, match="no episode log at s3://"):
        EpisodeLog.open(url)
    write_log(url, robot, episodes)
    log = EpisodeLog.open(url)
    assert log.robot == robot and [len(e) for e in log.episodes()] == [4, 7]
    assert (log.read(1).action == episodes[1].action).all() and dict(log.read(0).info) == dict(episodes[0].info)
    assert verify(url) == []
    with pytest.raises(UsageError, match="exists already"):
        write_log(url, robot, episodes)
    with pytest.raises(UsageError, match="finished logs only"):
        EpisodeWriter(url, robot)
    assert main(["log", "info", url, "--json"]) == 0
    assert '"episodes": 2' in capsys.readouterr().out
    demos, logged = load_training_episodes(TrainConfig(demos="none", replay=(url,)))
    assert demos == [] and [len(e) for e in logged] == [4, 7], "a run learns from logs where they are"
    assert main(["demos", "info", url, "--plots", "none", "--json"]) == 0
    assert '"steps": 11' in capsys.readouterr().out
    assert main(["log", "copy", url, str(tmp_path / "back.zarr")]) == 0
    assert verify(tmp_path / "back.zarr") == []
    assert [e.info["seed"] for e in EpisodeLog.open(tmp_path / "back.zarr").episodes()] == [4, 7]


def test_addresses_that_lead_nowhere_are_one_clear_line() -> None:
    with pytest.raises(UsageError, match="nosuch"):
        EpisodeLog.open("nosuch://a/b")
