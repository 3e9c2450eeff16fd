"""Whatever becomes of a data set's files, reading it ends in episodes or in one line that says why not."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sacflow_robot.data.formats.agreement import AgreementOptions
from sacflow_robot.data.formats.demonstrations import DemoOptions
from sacflow_robot.data.formats.sources import demo_spec, read_demos
from sacflow_robot.errors import SacflowError
from sacflow_robot.spec import RobotSpec
from tests.data.formats.lerobot_data import Recorded
from tests.data.formats.test_diffusion_policy import real_arrays, store, umi_arrays

VALUES = (None, "x", -1, 0, 1e308, float("nan"), [], {}, [None], {"a": 1}, True, "v2.1", [1, 2], 10**20)


def mutated(value: Any, rng: random.Random) -> Any:
    """JSON with one thing in it changed or gone."""
    if isinstance(value, dict) and value:
        key, chance = rng.choice(list(value)), rng.random()
        if chance < 0.45:
            value.pop(key)
            return value if chance < 0.15 else {**value, key: rng.choice(VALUES)}
        return {**value, key: mutated(value[key], rng)}
    if isinstance(value, list) and value:
        i = rng.randrange(len(value))
        return [*value[:i], mutated(value[i], rng), *value[i + 1 :]]
    return rng.choice(VALUES)


def damage(file: Path, rng: random.Random) -> None:
    """Change a value of a JSON file, or some bytes; or cut the file."""
    whole = file.read_bytes()
    if file.suffix in (".json", ".jsonl") or file.name.startswith("."):
        lines = whole.decode().splitlines() if file.suffix == ".jsonl" else [whole.decode()]
        file.write_text("\n".join(json.dumps(mutated(json.loads(line), rng)) for line in lines))
    elif rng.random() < 0.5:
        changed = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        file.write_bytes(changed)
    else:
        file.write_bytes(whole[: rng.randrange(len(whole))])


@pytest.mark.parametrize("kind", ["v2.1", "v3.0", "store", "zip"])
def test_damaged_files(kind: str, tmp_path: Path) -> None:
    rng, outcomes = random.Random(kind), {"read": 0, "refused": 0}
    for number in range(40):
        path = tmp_path / (f"{number}.zarr.zip" if kind == "zip" else str(number))
        if kind.startswith("v"):
            Recorded(kind).write(path)
        else:
            store(path, umi_arrays() if kind == "zip" else real_arrays())
        damage(rng.choice(sorted(f for f in path.rglob("*") if f.is_file())) if path.is_dir() else path, rng)
        try:
            robot = demo_spec(path, 30)
            assert RobotSpec.from_dict(json.loads(robot.to_json())) == robot
            options = DemoOptions(robot, "", sparse_rewards=False, agreement=AgreementOptions(rate=30))
            demos = read_demos(path, options)
            assert all(np.isfinite(e.action).all() for e in demos.episodes)
            outcomes["read"] += 1
        except SacflowError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 5, outcomes
