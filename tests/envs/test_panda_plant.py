"""The plant of the twin; what it does as a robot is tested through the twin."""

import subprocess
import sys

FIRST_STEP = """
import sys
from numba.core.dispatcher import Dispatcher
from sacflow_robot.envs.panda_plant import PandaPlant

def compiled():
    found = [value for module in list(sys.modules.values()) for value in list(vars(module).values())]
    return {f"{f.__name__}{f.signatures}" for f in found if isinstance(f, Dispatcher) and f.signatures}

plant = PandaPlant("lift")
before = compiled()
plant.step()
print("ready:", *before)
print("late:", *(compiled() - before))
"""


def test_its_first_step_compiles_nothing() -> None:
    """On a machine without numba's cache that takes six seconds, in which a twin would be silent on an open socket."""
    command = [sys.executable, "-c", FIRST_STEP]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    ready, late = done.stdout.splitlines()[-2:]
    assert "opspace_matrices" in ready
    assert late == "late:"
