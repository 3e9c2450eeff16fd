"""``sacflow-robot doctor``."""

import importlib.metadata
import platform
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from sacflow_robot.cli import common, missing
from sacflow_robot.errors import one_line

_PACKAGES = ("numpy", "onnxruntime", "pyzmq", "zarr", "mujoco", "robosuite", "gymnasium", "torch", "onnx")


@dataclass(frozen=True)
class Doctor(common.JsonOptions):
    """Check what works on this machine: versions, the accelerator, the simulator, off-screen rendering."""

    def run(self) -> int:
        from sacflow_robot import __version__

        rows = {"sacflow-robot": __version__, "python": platform.python_version(), "machine": platform.platform()}
        for name in _PACKAGES:
            try:
                rows[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                rows[name] = "not installed"
        rows["accelerator"] = _probe(_accelerator)
        rows["simulator"] = _probe(_simulator)
        rows["video"] = _probe(_video)
        self.say(common.facts(rows))
        return self.finish(rows)


def _probe(check: Callable[[], str]) -> str:
    try:
        return check()
    except ImportError as error:
        return missing(error).removeprefix("this command ")
    except Exception as error:  # a probe reports whatever is wrong
        return f"does not work: {one_line(error)}"


def _accelerator() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none, training runs on the CPU"


def _simulator() -> str:
    from sacflow_robot.envs.robosuite_env import RobosuiteEnv

    with closing(RobosuiteEnv("lift")) as env:
        env.begin(0)
    return "works"


def _video() -> str:
    from sacflow_robot.envs.robosuite_env import RobosuiteEnv

    with closing(RobosuiteEnv("lift")) as env:
        env.begin(0)
        env.render()
    return "off-screen rendering works"
