"""Plot a CSV of `fse-patch bench` or `fse-patch tune`, a panel for each shape.

python benchmarks/plot.py block_h200_vllm_0.26.0.csv
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from fse_patch.plot import plot


def main(source: Path) -> None:
    """Write the picture beside the CSV."""
    shapes: dict[str, list[dict[str, str]]] = {}
    with source.open(newline="") as file:
        for row in csv.DictReader(file):
            shapes.setdefault(row["shape"], []).append(row)
    plot(shapes, source.with_suffix(".png"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
