"""robomimic's data sets, downloaded from a hub on this machine."""

import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sacflow_robot.data import robomimic_download as hub
from sacflow_robot.errors import DataError, UnknownNameError

CONTENT = np.random.default_rng(0).bytes(3_000_000)
NAME = "v1.5/lift/mh/low_dim_v15.hdf5"


class Hub(ThreadingHTTPServer):
    """Answers as the hub does: HEAD and GET on a name redirect to the content, with its size and SHA-256 in headers.

    The content refuses HEAD, as addresses signed for GET do.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.content = CONTENT
        self.sha256: str | None = hashlib.sha256(CONTENT).hexdigest()
        self.breaks_after: list[int] = []  # bytes after which each next transfer breaks off
        self.ranges = True
        self.requests: list[tuple[str, str | None]] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        self.server.requests.append((self.command, self.headers.get("Range")))
        if self.path.endswith(NAME):
            self.send_response(302)
            self.send_header("Location", "/content")
            if self.server.sha256 is not None:
                self.send_header("X-Linked-Etag", f'"{self.server.sha256}"')
                self.send_header("X-Linked-Size", str(len(self.server.content)))
            self.end_headers()
        elif self.path == "/content" and with_body:
            self._content()
        else:
            self.send_error(403 if self.path == "/content" else 404)

    def _content(self) -> None:
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if self.server.ranges else None
        first = int(found.group(1)) if found else 0
        body = self.server.content[first:]
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        breaks = self.server.breaks_after.pop(0) if self.server.breaks_after else len(body)
        self.wfile.write(body[:breaks])
        if breaks < len(body):
            self.wfile.flush()
            self.connection.shutdown(2)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{made.server_port}")
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def fetch(cache: Path) -> tuple[Path, list[tuple[int, int]]]:
    told: list[tuple[int, int]] = []
    return hub.fetch("lift", "mh", cache, lambda present, total: told.append((present, total))), told


def leftovers(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_names() -> None:
    assert hub.parse_name("robomimic:lift/mh") == ("lift", "mh")
    assert hub.parse_name("demos.zarr") is None
    for wrong in ("robomimic:lift", "robomimic:lift/xh", "robomimic:lfit/mh", "robomimic:"):
        with pytest.raises(UnknownNameError, match="robomimic:can/mh, robomimic:can/ph, robomimic:lift/mh"):
            hub.parse_name(wrong)


def test_download_once_with_progress(server: Hub, tmp_path: Path) -> None:
    path, told = fetch(tmp_path)
    assert path == tmp_path / NAME and path.read_bytes() == CONTENT and leftovers(tmp_path) == [path]
    assert told[0] == (0, len(CONTENT)) and told[-1] == (len(CONTENT), len(CONTENT)) and len(told) > 5
    assert [present for present, _ in told] == sorted(present for present, _ in told)
    before = len(server.requests)
    assert fetch(tmp_path) == (path, []) and len(server.requests) == before, "the second time nothing is asked for"


def test_a_transfer_that_breaks_off_is_resumed_at_once(server: Hub, tmp_path: Path) -> None:
    server.breaks_after = [1_000_000, 500_000]
    path, told = fetch(tmp_path)
    assert path.read_bytes() == CONTENT
    ranges = [asked for method, asked in server.requests if method == "GET" and asked]
    assert "bytes=1000000-" in ranges and "bytes=1500000-" in ranges
    assert max(present for present, _ in told) == len(CONTENT)


def test_a_download_given_up_goes_on_the_next_time(server: Hub, tmp_path: Path) -> None:
    server.breaks_after = [400_000, 0, 0, 0]
    with pytest.raises(DataError, match=r"broke off at 400,000 of 3,000,000 bytes .*run again to go on from there"):
        fetch(tmp_path)
    assert not (tmp_path / NAME).exists()
    _, told = fetch(tmp_path)
    assert told[0][0] == 400_000 and (tmp_path / NAME).read_bytes() == CONTENT


def test_a_server_that_cannot_go_on_from_the_middle(server: Hub, tmp_path: Path) -> None:
    server.breaks_after, server.ranges = [400_000], False
    path, told = fetch(tmp_path)
    assert path.read_bytes() == CONTENT and [present for present, _ in told].count(0) == 2


@pytest.mark.parametrize("longer", [False, True])
def test_damaged_content_is_refused_and_removed(server: Hub, tmp_path: Path, longer: bool) -> None:
    damaged = bytearray(CONTENT)
    damaged[1234] ^= 1
    part = tmp_path / NAME
    part.parent.mkdir(parents=True)
    if longer:  # what an earlier download left is not what it was
        assert server.sha256 is not None
        part.with_name(f".{part.name}.{server.sha256[:16]}.part").write_bytes(CONTENT + b"x")
    else:
        server.content = bytes(damaged)
    with pytest.raises(DataError, match=r"arrived damaged \(SHA-256 .*removed; run again"):
        fetch(tmp_path)
    assert not leftovers(tmp_path)
    server.content = CONTENT
    assert fetch(tmp_path)[0].read_bytes() == CONTENT


def test_what_the_hub_does_not_have(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="answers 404"):
        hub.fetch("square", "ph", tmp_path, lambda present, total: None)
    assert not leftovers(tmp_path)


def test_without_a_checksum_nothing_is_trusted(server: Hub, tmp_path: Path) -> None:
    for wrong in (None, "abc"):
        server.sha256 = wrong
        with pytest.raises(DataError, match=r"answers 403|without a SHA-256"):
            fetch(tmp_path)
    assert not leftovers(tmp_path)


def test_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for nowhere in ("http://127.0.0.1:9", "http://no-such-host.invalid"):
        monkeypatch.setenv("HF_ENDPOINT", nowhere)
        with pytest.raises(DataError, match=r"cannot reach .* this needs internet access") as caught:
            fetch(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(DataError, match="cannot write to the cache folder"):
        fetch(tmp_path / "cache")
