"""What is not installed is named, with the extra of this package that installs it."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

import sacflow_robot
from sacflow_robot.cli import EXTRAS, main
from sacflow_robot.data.log.episode_writer import write_log
from sacflow_robot.envs.demonstrations import demonstrate
from sacflow_robot.envs.tasks import get_task

PACKAGE = Path(sacflow_robot.__file__).parent
ROOT = PACKAGE.parent


def distribution(requirement: str) -> str:
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def third_party_imports() -> set[str]:
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").partition(".")[0])
    return found - sys.stdlib_module_names - {PACKAGE.name}


def with_what_they_need(names: Iterable[str]) -> set[str]:
    names = set(names)
    return names | {
        distribution(r) for name in names if name != "sacflow-robot" for r in requires(name) or () if "extra" not in r
    }


def test_every_import_is_of_the_base_package_or_in_the_table_of_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {distribution(r) for r in project["dependencies"]}
    by_module = {module: {distribution(d) for d in found} for module, found in packages_distributions().items()}
    by_module["rerun"] = {"rerun-sdk"}  # in a folder of its own
    listed = {module: extra for extra, modules in EXTRAS.items() for module in modules}
    imported = third_party_imports()
    assert {"cv2", "numba", "scipy", "matplotlib", "gymnasium"} <= imported
    unknown = [m for m in sorted(imported) if m not in listed and not by_module[m] & base]
    assert not unknown, f"neither in the dependencies nor in cli.EXTRAS: {unknown}"
    for module, extra in listed.items():
        assert not by_module[module] & base, f"{module} is installed with the base package"
        held = with_what_they_need(distribution(r) for r in project["optional-dependencies"][extra])
        assert by_module[module] & held, f"[{extra}] does not install {module}"


BASE_ONLY = """
import contextlib, importlib.util, io, json, sys
from sacflow_robot.cli import EXTRAS, main

absent = {module for modules in EXTRAS.values() for module in modules}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in absent else find_spec(name, *rest)
results = []
for command in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(command)
        except SystemExit as stopped:
            status = stopped.code
    results.append([status, out.getvalue(), err.getvalue()])
json.dump(results, sys.stdout)
"""

WORKS = ["doctor", "log info LOG", "log verify LOG", "log copy LOG OUT.zarr", "demos info LOG", "demos convert LOG NEW.zarr",
         "serve --help", "run --help", "train --help", "keys new a --out NEW"]  # fmt: skip
NEEDS = {
    "train --env lift": "train",
    "export run": "train",
    "follow run --log LOG": "train",
    "eval --policy policies/lift.onnx": "sim",
    "run --robot sim:lift": "sim",
    "run --robot rtsim:lift": "sim",
    "replay LOG": "sim",
    "replay LOG --rerun OUT.rrd": "viz",
    "replay LOG --video OUT.mp4": "sim",
    "demos collect --env lift --out OUT": "sim",
    "demos convert LOG OUT.hdf5": "sim",
    "demos convert LOG OUT.lerobot": "lerobot",
    "demos info LOG --plots PLOT.png": "viz",
    "log info LOG --plot PLOT.png": "viz",
    "log info s3://bucket/log.zarr": "s3",
    "calibrate latency --profile calibration/sim_panda.yaml": "viz",
    "calibrate dynamics --recording none.npz": "sim",
    "calibrate handeye --images none": "sim",
    "gap --log LOG": "viz",
    "bench sim": "sim",
    "bench export": "train",
    "study gradients": "train",
    "twin franka": "sim",
}


def test_a_base_only_environment_does_what_it_can_and_names_the_extra_for_the_rest(tmp_path: Path) -> None:
    log = tmp_path / "log.zarr"
    write_log(log, get_task("lift").robot, [demonstrate("lift", "proficient", 0)])
    names = {"LOG": str(log), "OUT": str(tmp_path / "out"), "NEW": str(tmp_path / "new"), "PLOT": str(tmp_path / "p")}

    def words(command: str) -> list[str]:
        return re.sub("LOG|OUT|NEW|PLOT", lambda found: names[found[0]], command).split()

    commands = [*WORKS, *NEEDS]
    done = subprocess.run(
        [sys.executable, "-c", BASE_ONLY],
        input=json.dumps([words(command) for command in commands]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for command, (status, out, err) in zip(commands, json.loads(done.stdout), strict=True):
        if command in WORKS:
            assert not status and out, (command, err)
        else:
            last = err.splitlines()[-1]
            assert status == 2 and last.startswith("sacflow-robot: error: "), (command, status, err)
            assert f"pip install 'sacflow-robot[{NEEDS[command]}]'" in last, (command, last)


def test_a_package_that_is_there_and_cannot_be_imported_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """OpenCV on a machine without libGL."""

    def fail(*_: object) -> None:
        raise ImportError("libGL.so.1: cannot open shared object file: No such file or directory", name="cv2")

    monkeypatch.setattr("sacflow_robot.cli.doctor.Doctor.run", fail)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == (
        "sacflow-robot: error: cv2 is installed but cannot be imported: "
        "libGL.so.1: cannot open shared object file: No such file or directory\n"
    )


def test_a_mistake_of_our_own_is_no_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        from sacflow_robot import nothing_of_that_name  # noqa: F401

    monkeypatch.setattr("sacflow_robot.cli.doctor.Doctor.run", fail)
    with pytest.raises(ImportError, match="nothing_of_that_name"):
        main(["doctor"])
