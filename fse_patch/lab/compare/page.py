"""One HTML page of a comparison, with all that it needs in it: light and dark, for a phone and for a wall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from . import table
from .steps import phase_of
from .style import STYLE
from .table import Row

CLASSES = {table.FASTER: "faster", table.SLOWER: "slower", table.SAME: "same", table.BRIEF: "same"}
READING = (
    "Stock means the engine without fse_patch. Three servers were measured, one at a time: stock, fused, and "
    "stock again. The second stock shows how much a figure moves by itself.",
    "Times as fast means the fused server's tokens a second over the mean of both stock servers. The range "
    "is over the faster and over the slower of them. Faster is said only where fused beats both, and by more "
    "than they differ from each other. Where a figure took less than a second to measure, nothing is said: "
    "give more --rounds.",
    "Answers are a small check, on a few fixed prompts. fse-patch verify is the proof: it has a control.",
)


def page(report: Mapping[str, Any]) -> str:
    """Return the page of a report: model, command, facts, servers, rows, speed, answers, ok."""
    rows: Sequence[Row] = report["rows"]
    kinds = {row["verdict"] for row in rows}
    kind = CLASSES[kinds.pop()] if len(kinds) == 1 else "same"
    agree = "faster" if report["answers"]["holds"] else "slower"
    title = f"{report['model']}: stock against fused"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict {kind}">{escape(_upper(report["speed"]))}.</p>',
        f'<p class="verdict {agree}">{escape(_upper(report["answers_words"]))}.</p>',
        "<h2>Times as fast as stock</h2>",
        _chart(rows),
        "<h2>Tokens a second</h2>",
        _table("Output tokens a second, all streams together.", table.HEADS, [_cells(row) for row in rows]),
        "<h2>How long one waits</h2>",
        _waiting(rows),
        "<h2>What each server said of itself</h2>",
        _list([f"{server['name']}: {line}" for server in report["servers"] for line in server["said"]]),
        "<h2>What was run</h2>",
        _facts(report["facts"]),
        "<h2>How to read this</h2>",
        *(f"<p>{escape(text)}</p>" for text in READING),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    top = f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>'
    return "\n".join([top, *body, "</body>", "</html>", ""])


def _chart(rows: Sequence[Row]) -> str:
    most = 1.1 * max([1.0, *(row["upper"] for row in rows)])

    def at(value: float) -> str:
        return f"{100 * value / most:.2f}%"

    lines = []
    for row in rows:
        width = 100 * (row["upper"] - row["lower"]) / most
        lines.append(
            f'<span class="label">{phase_of(row["streams"])}</span>'
            f'<span class="track {CLASSES[row["verdict"]]}">'
            f'<span class="bar" style="width:{at(row["ratio"])}"></span>'
            f'<span class="span" style="left:{at(row["lower"])};width:{width:.2f}%"></span>'
            f'<span class="one" style="left:{at(1.0)}"></span></span>'
            f"<span>{row['ratio']:.2f}</span>"
        )
    told = "; ".join(f"{phase_of(row['streams'])} {row['ratio']:.2f}" for row in rows)
    label = escape(f"times as fast as stock: {told}", quote=True)
    legend = "<p>The dashed line is stock. The range with two ends shows how much stock moved by itself.</p>"
    return f'<div class="chart" role="img" aria-label="{label}">{"".join(lines)}</div>{legend}'


def _cells(row: Row) -> list[tuple[str, str]]:
    words = table.cells(row)
    *speeds, times, verdict = words
    kind = f"words {CLASSES[row['verdict']]}"
    # On a narrow screen the range stays in one line.
    whole = times.replace("-", "\N{NON-BREAKING HYPHEN}")
    return [*((word, "") for word in (*speeds, whole)), (verdict, kind)]


def _waiting(rows: Sequence[Row]) -> str:
    columns = {
        f"{words}, {name}": f"{arm}_{what}"
        for what, words in {"first_token_ms": "first token", "token_ms": "each next"}.items()
        for arm, name in table.SHORT.items()
    }
    lines = [
        [(str(row["streams"]), ""), *((f"{row[key]:.3g}", "") for key in columns.values())] for row in rows
    ]
    return _table("Milliseconds, medians over all requests.", ("streams", *columns), lines)


def _table(caption: str, heads: Sequence[str], lines: Sequence[Sequence[tuple[str, str]]]) -> str:
    """Return a table; a cell is its text and its class."""
    kinds = [kind.partition(" ")[0] for _, kind in lines[0]] if lines else [""] * len(heads)
    top = "".join(
        f'<th scope="col" class="{kind}">{escape(head)}</th>' for head, kind in zip(heads, kinds, strict=True)
    )
    cells = ("".join(f'<td class="{kind}">{escape(text)}</td>' for text, kind in line) for line in lines)
    rows = "".join(f"<tr>{line}</tr>" for line in cells)
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _facts(facts: Mapping[str, Any]) -> str:
    held = "".join(
        f"<dt>{escape(name)}</dt><dd><code>{escape(str(value))}</code></dd>" for name, value in facts.items()
    )
    return f"<dl>{held}</dl>"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
