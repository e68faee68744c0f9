"""Draw the layers of the code in docs/development.md from the import contracts, or check the picture.

    python ci/layers.py [--write]

Without --write, exit status 1 says that the page is out of date. Needs Python 3.11 or tomli.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from generated import settle

try:
    import tomllib
except ImportError:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "development.md"
START, END = "<!-- layers: made by ci/layers.py -->", "<!-- end of layers -->"


def contracts(text: str) -> list[dict[str, Any]]:
    """Return the contracts on layers in the text of a pyproject.toml."""
    tools = tomllib.loads(text)["tool"]
    return [c for c in tools["importlinter"]["contracts"] if c["type"] == "layers"]


def picture(text: str) -> str:
    """Return the layers of every contract, top layer first, as a block of Markdown."""
    drawn = []
    for contract in contracts(text):
        (container,) = contract["containers"]
        width = max(len(layer) for layer in contract["layers"])
        rows = [f"    | {layer:{width}} |" for layer in contract["layers"]]
        drawn.append("\n".join([f"`{container}`: {contract['name'].partition(': ')[2]}", "", *rows]))
    return "\n\n".join(drawn)


def page(old: str, pyproject: str) -> str:
    """Return ``old``, the text of the page, with the picture that ``pyproject`` gives."""
    between = re.compile(f"{re.escape(START)}.*{re.escape(END)}", re.DOTALL)
    if not between.search(old):
        raise SystemExit(f"{PAGE}: has no line {START!r}")
    return between.sub(lambda _: f"{START}\n\n{picture(pyproject)}\n\n{END}", old)


if __name__ == "__main__":
    text = page(PAGE.read_text(encoding="utf-8"), (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    raise SystemExit(settle(PAGE, text, "--write" in sys.argv[1:]))
