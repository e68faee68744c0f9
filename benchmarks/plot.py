"""Plot a CSV of `fse-patch bench` (with `--end-to-end` too) or `fse-patch tune`, a panel for each model.

python benchmarks/plot.py block_h200_vllm_0.26.0.csv
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from fse_patch.lab.plots import plot, plot_streams


def main(source: Path) -> None:
    """Write the picture beside the CSV."""
    shapes: dict[str, list[dict[str, str]]] = {}
    with source.open(newline="") as file:
        for row in csv.DictReader(file):
            shapes.setdefault(row.get("shape") or row["model"], []).append(row)
    steps = "streams" in next(iter(shapes.values()))[0]
    (plot_streams if steps else plot)(shapes, source.with_suffix(".png"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
