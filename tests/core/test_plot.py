"""Pictures of measurements show what was measured."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from fse_patch.errors import FsePatchError
from fse_patch.lab.plots import draw, plot

CSV = Path(__file__).parents[2] / "benchmarks" / "block_h200_vllm_0.26.0.csv"


def measured() -> dict[str, list[dict[str, str]]]:
    shapes: dict[str, list[dict[str, str]]] = {}
    with CSV.open(newline="") as file:
        for row in csv.DictReader(file):
            shapes.setdefault(row["shape"], []).append(row)
    return shapes


def lines(panel: Any) -> dict[str, list[tuple[float, float]]]:
    return {
        line.get_label(): [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]
        for line in panel.get_lines()
    }


def test_every_mode_of_every_shape_is_drawn() -> None:
    shapes = measured()
    panels = draw(shapes, Figure).axes
    assert [panel.get_title() for panel in panels] == list(shapes)
    for panel, rows in zip(panels, shapes.values(), strict=True):
        drawn = lines(panel)
        for mode in ("small", "fused", "split"):
            wanted = [(float(r["tokens"]), float(r[f"{mode}_ratio"])) for r in rows if r[f"{mode}_ratio"]]
            assert drawn.get(mode, []) == wanted
        first = float(rows[0]["stock_us"]) / float(rows[0]["floor_us"])
        assert drawn["memory floor"][0] == (1.0, first)


def test_a_mode_that_was_not_measured_is_left_out() -> None:
    rows = [{"tokens": 1, "stock_us": 2.0, "floor_us": 1.0, "fused_ratio": 1.5}]
    (panel,) = draw({"one": rows}, Figure).axes
    assert {"small", "split"}.isdisjoint(lines(panel))
    assert lines(panel)["fused"] == [(1.0, 1.5)]


def test_the_file_is_a_picture(tmp_path: Path) -> None:
    plot(measured(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_written_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FsePatchError, match=r"none/a\.png"):
        plot(measured(), tmp_path / "none" / "a.png")
    with pytest.raises(FsePatchError, match="nothing"):
        plot(measured(), tmp_path / "a.nothing")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FsePatchError, match=r"pip install 'fse-patch\[plot\]'"):
        plot(measured(), tmp_path / "a.png")
