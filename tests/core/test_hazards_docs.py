"""docs/hazards.md links tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "hazards.md").read_text(encoding="utf-8")
LINK = re.compile(r'\[(\w+)\]\(\.\./([\w/.]+) "([\w/.:]+)"\)')


def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_linked_test_is_there() -> None:
    links = LINK.findall(TEXT)
    assert len(links) > 60
    for name, file, place in links:
        assert place == f"{file}::{name}"
        assert name.startswith("test_")
        assert name in functions_of(ROOT / file), place


def test_every_row_names_a_test_or_says_that_there_is_none() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| what")]
    rows = [row for row in rows if not row.startswith("| ---")]
    assert len(rows) > 40
    for row in rows:
        held = row.split(" | ")[-1]
        assert LINK.search(held) or held == "nothing yet |", row
