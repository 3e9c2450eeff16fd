"""Caches on machines without a home, or with one that can't be written."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

import sacflow_robot
from sacflow_robot.errors import UsageError
from sacflow_robot.utils import caches

SOURCE = Path(sacflow_robot.__file__).parent
HOMELESS = {"HOME": "/dev/null", "XDG_CACHE_HOME": None, "XDG_CONFIG_HOME": None, "SACFLOW_ROBOT_CACHE": None,
            "NUMBA_CACHE_DIR": None, "MPLCONFIGDIR": None, "MESA_SHADER_CACHE_DIR": None}  # fmt: skip


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A user without a home that can be written, not even by root; returns the folder for temporary files."""
    for name, value in HOMELESS.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SACFLOW_ROBOT_CACHE", str(tmp_path / "own"))
    assert caches.cache_root() == tmp_path / "own"
    assert caches.compiler_cache("numba") == tmp_path / "own" / "numba"
    monkeypatch.setenv("SACFLOW_ROBOT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert caches.cache_root() == tmp_path / "sacflow-robot"
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # as good as not set
    monkeypatch.setenv("HOME", str(tmp_path))
    assert caches.cache_root() == tmp_path / ".cache" / "sacflow-robot"


def test_compiled_code_goes_to_a_private_temporary_folder_where_home_cannot_be_written(homeless: Path) -> None:
    folder = caches.compiler_cache("numba")
    assert folder == homeless / f"sacflow-robot-{os.getuid()}" / "numba"
    assert folder.is_dir() and folder.parent.stat().st_mode & 0o777 == 0o700


def test_a_user_without_a_home_is_told_what_to_set(homeless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UsageError, match="SACFLOW_ROBOT_CACHE"):
        caches.cache_root()
    assert caches.compiler_cache("numba") is not None
    caches.lend_folders()
    assert Path(os.environ["MPLCONFIGDIR"]).is_dir()


def test_a_folder_that_others_may_write_is_not_trusted(homeless: Path) -> None:
    private = homeless / f"sacflow-robot-{os.getuid()}"
    private.mkdir()
    private.chmod(0o777)
    assert caches.compiler_cache("numba") is None
    private.rmdir()
    (homeless / "elsewhere").mkdir()
    private.symlink_to(homeless / "elsewhere")
    assert caches.compiler_cache("numba") is None


def test_a_full_disk_is_no_place_for_a_cache(homeless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 1 << 40, 0))
    assert caches.compiler_cache("numba") is None


def test_other_libraries_keep_their_folders_where_those_work(homeless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = homeless / "home"
    monkeypatch.setenv("HOME", str(home))
    caches.lend_folders()
    assert "MPLCONFIGDIR" not in os.environ and "MESA_SHADER_CACHE_DIR" not in os.environ
    assert not home.exists()
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setenv("MPLCONFIGDIR", "chosen")
    caches.lend_folders()
    assert os.environ["MPLCONFIGDIR"] == "chosen"
    assert Path(os.environ["MESA_SHADER_CACHE_DIR"]).parent == homeless / f"sacflow-robot-{os.getuid()}"


LOOK = """

from sacflow_robot.envs.fast import kernels
from sacflow_robot.envs.robosuite_import import robosuite
print(kernels.execute.stats.cache_path, robosuite.utils.transform_utils.mat2quat.stats.cache_path, sep="\\n")
"""


@pytest.mark.parametrize("somewhere", [True, False])
def test_the_simulator_starts_where_the_package_and_home_cannot_be_written(tmp_path: Path, somewhere: bool) -> None:
    """Numba has no folder of its own then, and importing robosuite failed."""
    package = tmp_path / "package" / "sacflow_robot"
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (package / "envs", package / "envs" / "fast"):
        (folder / "__pycache__").touch()  # a file, where root would be let through by a folder's mode
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    private = temporary / f"sacflow-robot-{os.getuid()}"
    if not somewhere:
        private.touch()
    values = {**os.environ, **HOMELESS, "PYTHONPATH": str(package.parent), "TMPDIR": str(temporary)}
    done = subprocess.run(
        [sys.executable, "-c", LOOK],
        cwd=tmp_path,
        env={name: value for name, value in values.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    if somewhere:
        assert all(line.startswith(str(private / "numba")) for line in done.stdout.splitlines())
    else:
        assert done.stdout.splitlines() == ["None", "None"]


AS_NOBODY = """
set -e
mount --make-rprivate /
mkdir -p {work}/python && mount --bind {python} {work}/python
mount -t tmpfs -o mode=755 tmpfs /root
if [ ! -d {python} ]; then mkdir -p {python} && mount --bind {work}/python {python}; fi
cd /
exec setpriv --reuid 54321 --regid 54321 --clear-groups env -i PATH=/usr/bin:/bin HOME=/nonexistent TMPDIR={work}/tmp \\
    PYTHONPATH={work}/package "$@"
"""


@pytest.mark.slow
def test_a_user_without_name_or_home_works_with_an_environment_of_root_s(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if os.getuid() or subprocess.run(["unshare", "-m", "setpriv", "--version"], capture_output=True).returncode:
        pytest.skip("needs root, unshare and setpriv")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        work = Path(name)
        work.chmod(0o755)
        shutil.copytree(SOURCE, work / "package" / "sacflow_robot", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(SOURCE.parent / "policies" / "lift.onnx", work)
        for folder in ("tmp", "out"):
            (work / folder).mkdir()
            (work / folder).chmod(0o777)
        script = AS_NOBODY.format(work=work, python=sysconfig.get_config_var("prefix"))

        def call(*words: object) -> subprocess.CompletedProcess[str]:
            program = [sys.executable, "-m", "sacflow_robot", *map(str, words)]
            return subprocess.run(
                ["unshare", "-m", "bash", "-c", script, "-", *program], capture_output=True, text=True, timeout=600
            )

        out = work / "out"
        tiny = ("--offline-steps", 50, "--online-steps", 0, "--eval-episodes", 1, "--final-eval-episodes", 1)
        for words in (
            ("eval", "--policy", work / "lift.onnx", "--episodes", 2),
            ("demos", "collect", "--env", "lift", "--episodes", 4, "--out", out / "demos.zarr"),
            ("demos", "info", out / "demos.zarr", "--plots", out / "demos.png"),
            ("train", "--env", "lift", "--demos", out / "demos.zarr", "--out", out / "run", "--compile", "on", *tiny),
            ("doctor",),
        ):
            done = call(*words)
            assert done.returncode == 0 and "Traceback" not in done.stderr, (words, done.stderr[-2000:])
            assert "not compiled" not in done.stderr
        refused = call("train", "--env", "lift", "--out", out / "auto", *tiny)
        assert refused.returncode in (1, 2) and "SACFLOW_ROBOT_CACHE" in refused.stderr.splitlines()[-1]
