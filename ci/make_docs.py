"""Builds the pages of docs/ and the README as a site, and fails where a link leads nowhere.

    python ci/make_docs.py [--out DIR]

The site is made of copies in .cache/site-source, in the places that they have here: links from one folder of
the repository to another hold there too. Needs mkdocs. Exit status 1 says what is wrong.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from environment import ROOT

SOURCE = ROOT / ".cache" / "site-source"
PAGES = [
    "README.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "docker/README.md",
    "examples/README.md",
    "patches/families/README.md",
    "tests/core/golden/README.md",
]
_LINK = re.compile(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)")
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def linked(page: Path) -> list[str]:
    """Return what a page links to in the repository, without anchors."""
    text = _CODE.sub("", page.read_text(encoding="utf-8"))
    targets = (target.partition("#")[0] for target in _LINK.findall(text))
    return [target for target in targets if target and "://" not in target]


def pages() -> list[Path]:
    """Return all pages."""
    return [ROOT / name for name in PAGES] + sorted((ROOT / "docs").glob("*.md"))


def broken() -> list[str]:
    """Return the links that lead nowhere, or out of the repository."""
    wrong = []
    for page in pages():
        for target in linked(page):
            path = (page.parent / target).resolve()
            if not path.exists() or not path.is_relative_to(ROOT):
                wrong.append(f"{page.relative_to(ROOT)}: {target}")
    return wrong


def stage() -> None:
    """Copy the pages, and the files that they link to."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    wanted = {page for page in pages()}
    for page in pages():
        wanted |= {(page.parent / target).resolve() for target in linked(page)}
    for path in sorted(wanted):
        place = SOURCE / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            shutil.copy2(path, place)
        elif path.is_dir():
            place.mkdir(exist_ok=True)
            # A folder is no page: the site shows its list of files.
            names = "\n".join(f"- {file.name}" for file in sorted(path.iterdir()) if file.name[0] != ".")
            if not (path / "README.md").exists():
                (place / "index.md").write_text(f"# {path.name}\n\n{names}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "site")
    args = parser.parse_args(argv)
    if wrong := broken():
        print("\n".join(f"no such file: {link}" for link in wrong), file=sys.stderr)
        return 1
    stage()
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(args.out.resolve()),
    ]
    return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
