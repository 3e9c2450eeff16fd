"""robomimic's public data sets by name, downloaded from the model hub that they live on.

Standard library only: huggingface_hub resumes but does not hold what arrived against the checksum, pooch checks but does
not resume. The hub names a file's SHA-256 in the header X-Linked-Etag, on the answer that redirects to the content.
"""

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

from filelock import FileLock

from sacflow_robot.errors import DataError, UnknownNameError, one_line

PREFIX = "robomimic:"
DATASETS = {"lift": ("ph", "mh"), "can": ("ph", "mh"), "square": ("ph", "mh")}
"""Tasks of robomimic's data sets that exist here, and the quality of their demonstrations: proficient, mixed human."""

_HUB = "https://huggingface.co"
# A fixed revision, so that a name means the same episodes next year.
_REPOSITORY = "datasets/robomimic/robomimic_datasets/resolve/74fa018461f479cd9fd15b924a16103012096203"
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "sacflow-robot"}
_TIMEOUT_S = 30.0
_ATTEMPTS = 4
_BLOCK = 1 << 18
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What a connection that fails or breaks raises; HTTPError is an OSError too and is told apart first.
_BROKEN = (OSError, http.client.HTTPException)

Progress = Callable[[int, int], None]
"""Called with the bytes present and the bytes in all."""


class Remote(NamedTuple):
    """A file on the hub: where its content is, its size in bytes and its SHA-256 (hexadecimal)."""

    url: str
    size: int
    sha256: str


def parse_name(text: str) -> tuple[str, str] | None:
    """Task and kind that ``robomimic:task/kind`` names; None for any other text.

    Raises:
        UnknownNameError: There is no such data set.
    """
    if not text.startswith(PREFIX):
        return None
    task, _, kind = text.removeprefix(PREFIX).partition("/")
    if kind not in DATASETS.get(task, ()):
        valid = [f"{PREFIX}{name}/{each}" for name, kinds in DATASETS.items() for each in kinds]
        raise UnknownNameError("data set", text, valid)
    return task, kind


def fetch(task: str, kind: str, cache: Path, progress: Progress) -> Path:
    """The data set's file in the cache, downloaded if it is not there yet.

    A download that broke off goes on where it stopped. The file gets its name once its SHA-256 is right.

    Raises:
        DataError: No connection, no such file, a broken download or a wrong checksum.
    """
    relative = f"v1.5/{task}/{kind}/low_dim_v15.hdf5"
    path = cache / relative
    if path.exists():
        return path
    endpoint = os.environ.get("HF_ENDPOINT", _HUB).rstrip("/")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.exists():  # else another process fetched it meanwhile
                remote = _look_up(f"{endpoint}/{_REPOSITORY}/{relative}")
                _download(remote, path, progress)
    except OSError as error:
        raise DataError(f"cannot write to the cache folder {path.parent}: {one_line(error)}") from None
    return path


class _UpToLink(urllib.request.HTTPRedirectHandler):
    """Follows redirects up to the one to the content, which may be signed for GET alone, and whose headers tell all."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if "X-Linked-Etag" in headers:
            return None
        followed = super().redirect_request(req, fp, code, msg, headers, newurl)
        if followed is not None:
            followed.method = req.get_method()  # a HEAD stays one
        return followed


def _look_up(url: str) -> Remote:
    request = urllib.request.Request(url, method="HEAD", headers=_HEADERS)
    try:
        with urllib.request.build_opener(_UpToLink).open(request, timeout=_TIMEOUT_S) as response:
            headers = response.headers
    except urllib.error.HTTPError as error:
        if "X-Linked-Etag" not in error.headers or error.code >= 400:
            raise DataError(f"{url} answers {error.code} {error.reason}; was the data set moved?") from None
        headers = error.headers
    except _BROKEN as error:
        raise DataError(
            f"cannot reach {url} ({one_line(_reason(error))}); this needs internet access, or give a file with --demos"
        ) from None
    sha256 = (headers.get("X-Linked-Etag") or "").strip('"')
    size = headers.get("X-Linked-Size") or headers.get("Content-Length") or ""
    if not _SHA256.fullmatch(sha256) or not size.isdigit():
        raise DataError(f"{url} came without a SHA-256 and a size (X-Linked-Etag, X-Linked-Size); it is not trusted")
    return Remote(url, int(size), sha256)


def _download(remote: Remote, path: Path, progress: Progress) -> None:
    """Fetch the content beside its final name and move it there; what a broken download left is taken up again."""
    part = path.with_name(f".{path.name}.{remote.sha256[:16]}.part")
    for attempt in range(_ATTEMPTS):
        present = part.stat().st_size if part.exists() else 0
        try:
            if present < remote.size:
                _transfer(remote, part, present, progress)
        except urllib.error.HTTPError as error:
            raise DataError(f"{remote.url} answers {error.code} {error.reason}; run again to go on") from None
        except _BROKEN as error:
            failure = one_line(_reason(error))
        else:
            failure = "the connection closed early"
        present = part.stat().st_size if part.exists() else 0
        if present >= remote.size:
            break
        if attempt < _ATTEMPTS - 1:
            time.sleep(0.5 * 2**attempt)
    else:
        raise DataError(
            f"download broke off at {present:,} of {remote.size:,} bytes ({failure}); run again to go on from there"
        )
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != remote.sha256 or part.stat().st_size != remote.size:
        part.unlink()
        raise DataError(
            f"{remote.url} arrived damaged (SHA-256 {found[:12]}..., expected {remote.sha256[:12]}...) and was removed; "
            f"run again"
        )
    part.replace(path)


def _transfer(remote: Remote, part: Path, present: int, progress: Progress) -> None:
    """Append what is missing; a server that does not go on from the middle starts the file anew."""
    headers = _HEADERS | ({"Range": f"bytes={present}-"} if present else {})
    request = urllib.request.Request(remote.url, headers=headers)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response, part.open("ab") as file:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        if not resumed:
            file.truncate(0)
        present = present if resumed else 0
        progress(present, remote.size)
        while block := response.read(_BLOCK):
            file.write(block)
            present += len(block)
            progress(present, remote.size)


def _reason(error: BaseException) -> BaseException:
    """The cause that urllib wraps."""
    inner = getattr(error, "reason", None)
    return inner if isinstance(inner, BaseException) else error
