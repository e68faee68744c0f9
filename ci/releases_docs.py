"""Write docs/releases.md from patches/ and from what ci/releases.py has found, or check it.

    python ci/releases_docs.py [--write]

Needs no package index. Without --write, exit status 1 says that the file is out of date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from generated import settle
from packaging.version import Version

from fse_patch.adapters.patching import ledger
from fse_patch.adapters.patching.spec import PatchSpec
from fse_patch.fusion_core.decision.native import fusing
from fse_patch.patches import ENGINES

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "releases.md"
FOUND = ROOT / "ci" / "releases.json"
PLATFORMS = ("cpu", "cuda", "rocm")
NAMES = {"vllm": "vLLM", "sglang": "SGLang"}
HEAD = """# Releases

What was proved of each release of the engines. A *seam* is a definition of the engine that a patch
replaces or relies on. Each has a fingerprint of its text, and a release is listed where all of them were
read. One that is not listed is served fused where every seam that a model needs reads as in a listed
one, and the log says so. Where one differs, the server runs unfused, with a warning that names it: see
[how a patch is put in](how-it-works.md#how-a-patch-is-put-in).

This page is generated. `make releases` reads the wheels of the package index and checks it; `make
releases WRITE=1` writes it. `python ci/releases_docs.py --write` writes it from what is committed.
"""
# Of one engine: "newest" on the index; "tables": release -> for how many shapes it has a table for E+S,
# and for how many one for E or E+S.
Found = dict[str, Any]


def found() -> dict[str, Found]:
    """Return what ci/releases.py has found, by engine."""
    return dict(json.loads(FOUND.read_text(encoding="utf-8"))) if FOUND.is_file() else {}


def seams(book: ledger.Ledger, release: str) -> dict[str, str]:
    """Return the fingerprint of every seam of a release, by its reference."""
    patches = book.patches_for(Version(release))
    return {s.reference: s.fingerprints[release] for p in patches for s in (p.source, *p.relies_on)}


def rows(book: ledger.Ledger) -> Iterator[str]:
    """Yield a row of the table for each listed release."""
    before: dict[str, set[str]] = {}
    for row in book.facts.releases:
        texts = seams(book, row.release)
        new = sum(text not in before.get(name, set()) for name, text in texts.items())
        for name, text in texts.items():
            before.setdefault(name, set()).add(text)
        proved = "yes" if row.cpu else "-", ", ".join(row.cuda) or "-"
        yield f"| {row.release} | {' | '.join(proved)} | {len(texts)} | {new} |"


def needed(book: ledger.Ledger, patch: PatchSpec, release: str, shipped: dict[str, list[int]]) -> bool | None:
    """Return whether a release still needs a patch; None where that is not to be seen."""
    if patch.unneeded == "tables":
        own, either = shipped.get(release, [0, 0])
        return not either or own < either
    if patch.unneeded == "native":
        families = patch.families or frozenset(book.families.values())
        return not all(
            any(
                row["by_default"] and "wrong" not in row
                for row in fusing(book.engine, family, platform, release)
            )
            for family in families
            for platform in PLATFORMS
        )
    return None


def patch_rows(book: ledger.Ledger, shipped: dict[str, list[int]]) -> Iterator[str]:
    """Yield a row for each patch as it is written: the releases that it is for, and that do not need it."""
    seen: dict[str, list[PatchSpec]] = {}
    for patch in book.patches:
        key = patch.id.partition(".")[0] if patch.id.startswith("entry-") else patch.id
        seen.setdefault(key, []).append(patch)
    for name, patches in seen.items():
        releases = [r for r in book.listed if any(p.is_for(Version(r)) for p in patches)]
        states = {r: [needed(book, p, r, shipped) for p in patches if p.is_for(Version(r))] for r in releases}
        free = [r for r, state in states.items() if not any(s is None or s for s in state)]
        checked = patches[0].unneeded is not None
        seen_by = ", ".join(free) or "no release" if checked else "not checked"
        span = f"{releases[0]} to {releases[-1]}" if len(releases) > 1 else "".join(releases)
        yield f"| `{name}` | {span} | {patches[0].remove_when} | {seen_by} |"


def page(known: dict[str, Found]) -> str:
    """Return the text of docs/releases.md."""
    parts = [HEAD]
    for engine in ENGINES:
        book, here = ledger.load(engine), known.get(engine, {})
        latest = here.get("newest", "not looked up")
        state = "listed" if latest in book.listed else "not listed"
        parts.append(
            f"\n## {NAMES[engine]}\n\nNewest on the index when this was written: {latest}, {state}.\n"
        )
        parts.append("\n| release | run on a CPU | run on a GPU | seams read | of them new texts |\n")
        parts.append("| --- | --- | --- | --- | --- |\n")
        parts += [f"{row}\n" for row in rows(book)]
        parts.append("\n| patch | releases | unnecessary when | so in |\n| --- | --- | --- | --- |\n")
        parts += [f"{row}\n" for row in patch_rows(book, here.get("tables", {}))]
    return "".join(parts)


if __name__ == "__main__":
    raise SystemExit(settle(FILE, page(found()), "--write" in sys.argv[1:]))
