"""Report of a study: a picture, a table, and a paragraph made from the numbers."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from sacflow_robot.errors import UsageError
from sacflow_robot.utils.atomic_files import check_output, write_text
from sacflow_robot.utils.plot_style import save

Row = Mapping[str, str | int | float]


class Report(NamedTuple):
    """The outcome of a study: its name, which its files get; a table with the same columns in every row; a picture; and what
    the numbers say, one paragraph."""

    name: str
    rows: Sequence[Row]
    figure: Figure
    reading: str

    def write(self, folder: Path, made_by: str) -> dict[str, Path]:
        """Write ``NAME.png``, ``NAME.csv`` and ``NAME.md`` to a folder that exists, replacing those of an earlier study.

        ``made_by`` is the line below the paragraph: command, version, date.
        """
        paths = {kind: folder / f"{self.name}.{kind}" for kind in ("png", "csv", "md")}
        save(self.figure, paths["png"])
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in self.rows)
        write_text(paths["csv"], text.getvalue())
        write_text(paths["md"], f"{self.reading}\n\n{made_by}\n")
        return paths


def make_folder(path: Path) -> Path:
    """Make the folder that a study writes to, before it computes anything."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {path}: {error.strerror}; give another --out") from None
    check_output(path, folder=True)  # one that is there may take no file
    return path


def geometric_mean(values: Sequence[float]) -> float:
    """Mean of what is compared as ratios; the values are positive."""
    return float(np.exp(np.mean(np.log(np.maximum(values, 1e-30)))))


def listed(parts: Sequence[str]) -> str:
    """``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
