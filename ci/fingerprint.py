"""Regenerate patches/<engine>.fingerprints.json from installed releases, or check that it is up to date.

    python ci/fingerprint.py --engine vllm --site-packages DIR [--site-packages DIR ...] [--write]

The engines are read, not imported: each DIR is the site-packages folder of an environment with one release.
Fingerprints of releases that are not given stay. Without --write, exit status 1 says that the file is stale.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from generated import settle
from packaging.version import Version

from fse_patch.adapters.patching import guards, ledger
from fse_patch.adapters.patching.source import fingerprint
from fse_patch.errors import FsePatchError

Fingerprints = dict[str, dict[str, str]]


def references(book: ledger.Ledger, version: str | None = None) -> set[str]:
    """Return the sources that the ledger names, for one release or for all."""
    patches = book.patches if version is None else book.patches_for(Version(version))
    return {s.reference for p in patches for s in (p.source, *p.relies_on)}


def collect(book: ledger.Ledger, site_packages: str) -> tuple[str, dict[str, str]]:
    """Return the version installed in a folder, and the hash of every source its patches name.

    Raises:
        FsePatchError: the engine or a source is not there.
    """
    version = Version(guards.engine_version(book, [site_packages])).public
    hashes: dict[str, str] = {}
    for reference in sorted(references(book, version)):
        value = fingerprint(reference, [site_packages])
        if value is None:
            raise FsePatchError(f"{reference}: not defined in {book.engine} {version} ({site_packages})")
        hashes[reference] = value
    return version, hashes


def merge(book: ledger.Ledger, old: Fingerprints, new: dict[str, dict[str, str]]) -> Fingerprints:
    """Return old fingerprints of sources that the ledger still names, with the new releases' over them."""
    merged: Fingerprints = {}
    for reference in sorted(references(book)):
        values = {v: h for v, h in old.get(reference, {}).items() if v not in new}
        values.update({v: hashes[reference] for v, hashes in new.items() if reference in hashes})
        merged[reference] = dict(sorted(values.items(), key=lambda item: Version(item[0])))
    return merged


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", required=True)
    parser.add_argument("--site-packages", required=True, action="append", metavar="DIR")
    parser.add_argument("--patches", type=Path, default=ledger.FOLDER, help="folder of the ledger")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    path = args.patches / f"{args.engine}.fingerprints.json"
    try:
        book = ledger.load(args.engine, args.patches)
        old = ledger.read_fingerprints(path)
        new: dict[str, dict[str, str]] = {}
        for folder in args.site_packages:
            version, hashes = collect(book, folder)
            if new.setdefault(version, hashes) != hashes:
                raise FsePatchError(f"{folder}: another source of {book.engine} {version} than before")
            print(f"{book.engine} {version}: {len(hashes)} sources read")
    except FsePatchError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    text = json.dumps(merge(book, old, new), indent=2) + "\n"
    return settle(path, text, args.write)


if __name__ == "__main__":
    raise SystemExit(main())
