"""OpenGL is loaded when something is rendered, and never before triton."""

import ast
import ctypes.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import sacflow_robot
from sacflow_robot.data.log.episode_writer import write_log
from sacflow_robot.envs.demonstrations import demonstrate
from sacflow_robot.envs.tasks import get_task

PACKAGE = Path(sacflow_robot.__file__).parent
TINY = ("--offline-steps", "50", "--online-steps", "0", "--eval-episodes", "1", "--final-eval-episodes", "1")

MAKE = """
import os, sys
from sacflow_robot.envs.robosuite_env import RobosuiteEnv
from sacflow_robot.errors import InvalidValueError
env = RobosuiteEnv("lift")
env.begin(0)
env.command(env.action_space.sample())
print("OpenGL" in sys.modules, os.environ.get("MUJOCO_GL"))
"""

RENDER = """
from contextlib import closing, suppress
with closing(env), suppress(InvalidValueError):
    env.render()
print("OpenGL" in sys.modules, os.environ.get("TRITON_SAW"))
"""

TRITON = 'import os, sys; os.environ["TRITON_SAW"] = "OpenGL" if "OpenGL" in sys.modules else "no OpenGL"'


def run(script: str, **environment: str | None) -> list[str]:
    values = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={name: value for name, value in values.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_an_environment_loads_no_opengl_until_it_renders_and_then_after_triton(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text(TRITON)
    said = run(MAKE + RENDER, MUJOCO_GL="osmesa", PYTHONPATH=str(tmp_path), TRITON_SAW=None)
    assert said == ["False osmesa", "True no OpenGL"]


def test_processes_started_later_choose_for_themselves() -> None:
    """robosuite sets MUJOCO_GL to EGL when it is imported, whether or not the machine has that."""
    assert run(MAKE, MUJOCO_GL=None, DISPLAY=":0") == ["False None"]


def test_rendering_that_does_not_work_says_why() -> None:
    script = "from contextlib import closing\n" + MAKE + "\nwith closing(env): env.render()"
    for chosen in ("disabled", "no such"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "MUJOCO_GL": chosen},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert f"InvalidValueError: off-screen rendering with MUJOCO_GL={chosen} does not work" in done.stderr


def test_whatever_imports_mujoco_outside_the_environments_imports_them_first() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.is_relative_to(PACKAGE / "envs"):
            continue
        names = []
        for node in ast.parse(path.read_text()).body:
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        loading = [i for i, name in enumerate(names) if name.partition(".")[0] in ("mujoco", "robosuite")]
        ours = [i for i, name in enumerate(names) if name.startswith("sacflow_robot.envs")]
        if loading:
            found.append(path.name)
            assert ours and ours[0] < loading[0], f"{path} loads OpenGL"
    assert found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_train_with_the_index_s_own_build_of_torch(tmp_path: Path) -> None:
    """PyPI's torch for Linux is built for CUDA and brings triton, some 6 GB; all else is this environment's."""
    if sys.platform != "linux" or not ctypes.util.find_library("OSMesa"):
        pytest.skip("needs OSMesa (Debian: libosmesa6)")
    if shutil.disk_usage(tmp_path).free < 12e9:
        pytest.skip("needs 12 GB of disk")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "torch"]
    done = subprocess.run(
        pip, env={**os.environ, "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}, capture_output=True, text=True
    )
    try:
        if done.returncode:
            pytest.skip(f"torch cannot be installed from the index: {done.stderr.strip()[-300:]}")
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        paths = [sysconfig.get_paths()["purelib"], PACKAGE.parent]
        (tmp_path / f"env/lib/{version}/site-packages/rest.pth").write_text("\n".join(map(str, paths)))
        kind = subprocess.run([python, "-c", "import torch, triton; print(torch.version.cuda)"], capture_output=True)
        if kind.returncode or kind.stdout.strip() == b"None":
            pytest.skip("the index serves no torch with triton here")
        log = tmp_path / "demos.zarr"
        episodes = [demonstrate("lift", "proficient", seed) for seed in range(3)]
        write_log(str(log), get_task("lift").robot, episodes)
        environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL")}
        for number, compiling in enumerate(("off", "on")):
            out = tmp_path / f"run{number}"
            call = ["train", "--env", "lift", "--demos", log, "--out", out, "--compile", compiling, *TINY]
            trained = subprocess.run(
                [python, "-m", "sacflow_robot", *call], env=environment, capture_output=True, text=True
            )
            assert trained.returncode == 0, (trained.returncode, trained.stderr[-2000:])
            assert (out / "lift.onnx").exists()
    finally:
        shutil.rmtree(tmp_path / "env", ignore_errors=True)
