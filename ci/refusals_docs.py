"""Write docs/refusals.md from the table of reasons, or check that it is up to date.

    python ci/refusals_docs.py [--write]

Without --write, exit status 1 says that the file is out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path

from generated import settle

from fse_patch.fusion_core.reasons import FUSES, REASONS

FILE = Path(__file__).resolve().parent.parent / "docs" / "refusals.md"
HEAD = """# Refusal codes

A refusal leaves the engine exactly as it was and prints one line. `fse-patch plan` and `verify` then end with
status 3. Codes marked * follow from the user's own arguments: with `FSE_PATCH_STRICT=1` they end the process.
This page is generated: `python ci/refusals_docs.py --write` makes it from `fusion_core/reasons.py`.

| code | means | what to do |
| --- | --- | --- |
"""


def page() -> str:
    """Return the text of docs/refusals.md."""
    rows = [
        f"| `{code}`{'*' if meaning.asked_for else ''} | {meaning.text} | {meaning.advice or '-'} |\n"
        for code, meaning in REASONS.items()
        if code != FUSES
    ]
    return HEAD + "".join(rows)


if __name__ == "__main__":
    raise SystemExit(settle(FILE, page(), "--write" in sys.argv[1:]))
