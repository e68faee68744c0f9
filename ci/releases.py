"""Read every listed release of the engines, and the newest, from the package index; write docs/releases.md.

    python ci/releases.py [--engine vllm] [--write]

No engine is installed for that: of each wheel the Python files are kept, in .cache/releases. Every
target of a patch is looked up in them, and what it relies on is compared with the fingerprints. Exit
status 1: a listed release does not resolve, or a file is out of date; --write writes them. Where the
newest release is not listed, its seams are shown against those of the listed one that it is most like.
What needs no wheel is in `make test`.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import releases_docs
from generated import settle
from wheels import FetchError, fetch, newest

from fse_patch import table_coverage
from fse_patch.adapters.patching import ledger, standing
from fse_patch.adapters.patching.source import SCOPES, fingerprint, nodes
from fse_patch.errors import RefusedError
from fse_patch.patches import ENGINES


def text_of(reference: str, site: Path) -> list[str]:
    """Return the lines of a definition as its fingerprint sees it: without comments and docstrings."""
    lines: list[str] = []
    for node in nodes(reference, [str(site)]):
        for inner in ast.walk(node):
            if isinstance(inner, SCOPES) and ast.get_docstring(inner, clean=False) is not None:
                inner.body = inner.body[1:] or [ast.Pass()]
        lines += ast.unparse(node).splitlines()
    return lines


def differences(here: standing.Standing, site: Path, other: Path) -> Iterator[str]:
    """Yield the lines of a diff for every seam whose text nobody has read.

    Args:
        site, other: folders of the release, and of the one that it is compared with.
    """
    seams = {s.reference: s for p in here.patches for s in (p.source, *p.relies_on)}
    for reference, seam in sorted(seams.items()):
        if fingerprint(reference, [str(site)]) in seam.fingerprints.values():
            continue
        yield f"\n{reference}"
        was, now = text_of(reference, other), text_of(reference, site)
        yield from list(difflib.unified_diff(was, now, here.seams_of, here.version, lineterm="", n=2))


def tables(engine: str, site: Path) -> list[int]:
    """Return for how many shapes a release has a tuned table for E+S, and for how many one for E or E+S."""
    rows = table_coverage.coverage(
        engine, table_coverage.shipped(engine, [str(site)]), table_coverage.KNOWN, ()
    )
    return [sum(bool(row["devices"]) for row in rows), sum(row["table"] != "none" for row in rows)]


def examine(engine: str) -> tuple[releases_docs.Found, int]:
    """Read the releases of an engine, and say what is wrong with them; returns an exit status too."""
    book = ledger.load(engine)
    # Where it is published for GPUs.
    distribution = book.facts.import_name
    latest, status = newest(distribution), 0
    shipped: dict[str, list[int]] = {}
    for release in (*book.listed, *({latest} - {*book.listed})):
        site = fetch(distribution, release)
        here = standing.standing_of(book, release, site_packages=[str(site)])
        for problem in here.problems.values():
            print(problem)
        seams = {s.reference for p in here.patches for s in (p.source, *p.relies_on)}
        said = f"{engine} {release}: {len(seams)} seams, {len(here.problems)} patches do not apply"
        print("; ".join(filter(None, (said, here.remark))))
        if release in book.listed:
            shipped[release] = tables(engine, site)
            status |= bool(here.problems)
        elif here.problems:
            print("\n".join(differences(here, site, fetch(distribution, here.seams_of))))
    return {"newest": latest, "tables": shipped}, status


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", choices=ENGINES)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    found, status = releases_docs.found(), 0
    try:
        for engine in ENGINES if args.engine is None else [args.engine]:
            found[engine], failed = examine(engine)
            status |= failed
    except (FetchError, RefusedError) as error:
        print(error, file=sys.stderr)
        return 2
    text = json.dumps(found, indent=1) + "\n"
    status |= settle(releases_docs.FOUND, text, args.write)
    return status | settle(releases_docs.FILE, releases_docs.page(found), args.write)


if __name__ == "__main__":
    raise SystemExit(main())
