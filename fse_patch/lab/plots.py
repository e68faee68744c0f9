"""Plots of what `fse-patch bench` measured: speed-up over the number of tokens, or of streams end to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import FsePatchError
from ..fusion_core.forward.mode_registry import MODES

COLUMNS = 2
WIDTH, HEIGHT, DPI = 6.0, 4.0, 110
Rows = Sequence[Mapping[str, Any]]
# How the lines of a routing are drawn, in their mode's colour. Older files are of "even" and do not say so.
EVEN = "even"
LINES = {EVEN: "solid", "alike": "dashed", "groups": "dashdot", "zipf": "dotted"}


def figure_class() -> Callable[..., Any]:
    """Return matplotlib's figure; asked for before anything is measured.

    Raises:
        FsePatchError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FsePatchError("a plot needs matplotlib: pip install 'fse-patch[plot]'") from None
    return Figure


def plot(shapes: Mapping[str, Rows], path: Path) -> None:
    """Plot a panel for each shape; rows as of `bench.measure`, or as its CSV has them.

    Raises:
        FsePatchError: matplotlib is not installed, or the file cannot be written.
    """
    _save(draw(shapes, figure_class()), path)


def plot_streams(models: Mapping[str, Rows], path: Path) -> None:
    """Plot a panel for each model; rows as of `end_to_end.rows`, or as its CSV has them."""
    _save(draw(models, figure_class(), _streams_panel), path)


def plot_servers(models: Mapping[str, Rows], path: Path) -> None:
    """Plot a panel for each model; rows as of `compare.table.rows`."""
    _save(draw(models, figure_class(), _servers_panel), path)


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=DPI)
    except (OSError, ValueError) as error:
        raise FsePatchError(f"{path}: {error}") from error


def draw(
    shapes: Mapping[str, Rows],
    new: Callable[..., Any],
    panel_of: Callable[[Any, str, Rows], None] | None = None,
) -> Any:
    """Draw the figure; ``new`` makes an empty one, ``panel_of`` draws a panel (default: of blocks)."""
    drawn = panel_of or _panel
    lines = -(-len(shapes) // COLUMNS)
    columns = min(len(shapes), COLUMNS)
    figure = new(figsize=(WIDTH * columns, HEIGHT * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for panel, (name, rows) in zip(panels, shapes.items(), strict=False):
        drawn(panel, name, rows)
    for panel in list(figure.axes)[len(shapes) :]:
        panel.remove()
    return figure


def _panel(panel: Any, name: str, rows: Rows) -> None:
    best = 1.0
    by_routing: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_routing.setdefault(row.get("routing", EVEN), []).append(row)
    for routing, own in by_routing.items():
        for number, mode in enumerate(MODES):
            points = [(int(row["tokens"]), float(row[f"{mode}_ratio"])) for row in own if _has(row, mode)]
            if not points:
                continue
            label = mode if routing == EVEN else f"{mode}, {routing}"
            look = {"linestyle": LINES[routing], "color": f"C{number}", "label": label}
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, **look)
            best = max(best, *(ratio for _, ratio in points))
    # That of even routing, if it was measured: others read fewer experts in less time.
    first = by_routing.get(EVEN) or rows
    floor = [float(row["stock_us"]) / float(row["floor_us"]) for row in first]
    tokens = [int(row["tokens"]) for row in first]
    panel.plot(tokens, floor, linestyle=":", color="grey", label="memory floor")
    # The floor leaves the panel where compute decides.
    panel.set_ylim(0.5, 1.15 * max(best, floor[0]))
    _label(panel, name, "tokens", "times as fast as stock")


def _streams_panel(panel: Any, name: str, rows: Rows) -> None:
    held = [row for row in rows if row["ratio"] not in (None, "")]
    streams = [int(row["streams"]) for row in held]
    ratios, lower, again = ([float(row[key]) for row in held] for key in ("ratio", "lower", "again"))
    panel.plot(streams, ratios, marker="o", markersize=3, label="fused")
    panel.plot(streams, lower, linestyle="--", linewidth=0.8, label="lower end of 95 %")
    panel.plot(streams, again, linestyle=":", color="grey", marker="o", markersize=2, label="stock again")
    _label(panel, name, "streams", "times as fast as stock, end to end")


def _servers_panel(panel: Any, name: str, rows: Rows) -> None:
    streams = [int(row["streams"]) for row in rows]
    ratios, lower, upper, again = ([row[key] for row in rows] for key in ("ratio", "lower", "upper", "again"))
    panel.plot(streams, ratios, marker="o", markersize=3, label="fused")
    panel.fill_between(streams, lower, upper, alpha=0.25, label="over either stock")
    panel.plot(streams, again, linestyle=":", color="grey", marker="o", markersize=2, label="stock again")
    _label(panel, name, "streams", "tokens a second, times stock")


def _label(panel: Any, name: str, across: str, up: str) -> None:
    """Draw the line of stock, and name axes and curves; sizes double from tick to tick."""
    panel.axhline(1.0, color="black", linewidth=0.8)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.set(title=name, xlabel=across, ylabel=up)
    panel.legend()


def _has(row: Mapping[str, Any], mode: str) -> bool:
    return row.get(f"{mode}_ratio") not in (None, "")
