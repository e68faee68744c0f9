"""Pictures of measurements show what was measured."""

from __future__ import annotations

import csv
import importlib.util
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


def looks(panel: Any) -> dict[str, tuple[str, str]]:
    return {line.get_label(): (line.get_linestyle(), line.get_color()) for line in panel.get_lines()}


def test_a_routing_has_a_line_of_its_own_in_the_colour_of_the_mode() -> None:
    one = {"tokens": 2, "stock_us": 2.0, "floor_us": 1.0, "fused_ratio": 1.5, "split_ratio": 1.1}
    rows = [
        {**one, "tokens": 1, "routing": "even"},
        {**one, "routing": "even"},
        {**one, "routing": "alike", "fused_ratio": 0.7, "floor_us": 0.1},
    ]
    (panel,) = draw({"one": rows}, Figure).axes
    drawn, seen = lines(panel), looks(panel)
    assert drawn["fused"] == [(1.0, 1.5), (2.0, 1.5)]
    assert drawn["fused, alike"] == [(2.0, 0.7)]
    # The floor is that of even routing.
    assert drawn["memory floor"] == [(1.0, 2.0), (2.0, 2.0)]
    for mode in ("fused", "split"):
        assert (seen[mode][0], seen[f"{mode}, alike"][0]) == ("-", "--")
        assert seen[mode][1] == seen[f"{mode}, alike"][1]
    assert seen["fused"][1] != seen["split"][1]
    # A file from before has no such column: all its lines are solid.
    (panel,) = draw({"one": measured()["qwen3_next_80b"]}, Figure).axes
    assert {looks(panel)[mode][0] for mode in ("small", "fused", "split")} == {"-"}


def test_committed_files_are_drawn_by_the_command(tmp_path: Path) -> None:
    # The command has no package.
    where = importlib.util.spec_from_file_location("plot_command", CSV.with_name("plot.py"))
    assert where is not None
    assert where.loader is not None
    command = importlib.util.module_from_spec(where)
    where.loader.exec_module(command)
    for source in sorted(CSV.parent.glob("block_*.csv")):
        copy = tmp_path / source.name
        copy.write_bytes(source.read_bytes())
        command.main(copy)
        assert copy.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


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
