"""Write docs/versions.md from the facts of the engines, or check that it is up to date.

    python ci/versions_docs.py [--write]

Without --write, exit status 1 says that the file is out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from generated import settle

from fse_patch.fusion_core.checkpoint.families import family_files
from fse_patch.fusion_core.decision.paired_places import unrun
from fse_patch.fusion_core.decision.proven import read_proven
from fse_patch.fusion_core.engines import EngineFacts, facts_of
from fse_patch.fusion_core.forward import tuned
from fse_patch.patches import ENGINES

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "versions.md"
DEPLOYMENTS = ROOT / "tests" / "core" / "deployments.yaml"
HEAD = """# Releases, devices, and what they do

This page is generated: `python ci/versions_docs.py --write` makes it from `patches/` and from the deployments
that the tests hold `fse-patch plan` to. *Stock* is the engine without this package.

"""
RELEASES = """## Releases

Of each of these, the code that patches replace or rely on was read. Where a device stands, a model of each
family was run there, fused, and compared: on a CPU by the test-suite, on a GPU by hand. On an NVIDIA GPU
every start of the paired layout proves and measures its layers there. Where they are off, or not faster,
stock serves.

A newer release is treated as one of these where its code is the same. Where it differs, the server starts as
stock and says so: `release.seam`. An older release is refused: `version.untested`.

| engine | release | run on | on a GPU |
| --- | --- | --- | --- |
"""
NATIVE = """
## What the engines fuse by themselves

Where that is on and right, it is left alone: `upstream.already`.

| engine | releases | family | platforms | on by default | needs |
| --- | --- | --- | --- | --- | --- |
"""
DEPLOYED = """
## Deployments that people published

What `fse-patch plan -- COMMAND` says of them: on the release that they run, and with the same flags on vLLM
0.26.0 or SGLang 0.5.17.

| deployment | release | as run | there |
| --- | --- | --- | --- |
"""
PROVEN = """
## Quantised formats that were run and compared

"""
PROVEN_TABLE = "| format | engine | platforms |\n| --- | --- | --- |\n"
NOTHING_PROVEN = "None yet. A quantised checkpoint that could fuse is refused: `quant.unproven`.\n"
NAMES = {"vllm": "vLLM", "sglang": "SGLang"}


def releases(facts: EngineFacts) -> list[str]:
    """Return a row for each listed release."""
    rows = []
    for row in facts.releases:
        where = ["CPU"] if row.cpu else []
        where += row.cuda
        tables = sum(
            len(table.rows)
            for _, table in tuned.shipped()
            if (table.engine, table.release) == (facts.engine, row.release) and table.device in row.cuda
        )
        paired = unrun(facts.engine, "cuda", "") is None
        said = "fused paired" if paired else "stock `device.unrun`"
        said += f", or merged by tables of {tables} shapes" if tables else ""
        rows.append(f"| {NAMES[facts.engine]} | {row.release} | {', '.join(where) or '-'} | {said} |")
    return rows


def native() -> list[str]:
    """Return a row for each way in which an engine fuses a family by itself."""
    rows = []
    for file in family_files():
        for engine, entries in file.native.items():
            for entry in entries:
                on = "yes" if entry.by_default else "no"
                wrong = f"wrong: {entry.wrong}" if entry.wrong else ""
                what = "; ".join(filter(None, [entry.condition, wrong]))
                where = ", ".join(entry.platforms)
                rows.append(
                    f"| {NAMES[engine]} | {entry.versions} | {file.spec.name} | {where} | {on} | {what} |"
                )
    return sorted(rows)


def deployments() -> list[str]:
    """Return a row for each deployment."""
    rows: list[dict[str, Any]] = yaml.safe_load(DEPLOYMENTS.read_text(encoding="utf-8"))
    return [f"| {r['of']} | {r['release']} | {_said(r['as_run'])} | {_said(r['best'])} |" for r in rows]


def _said(text: str) -> str:
    served, _, why = text.partition(" ")
    return f"**{served}, {why}**" if served == "fused" else f"{served}: `{why}`"


def page() -> str:
    """Return the text of the page."""
    proven = [
        f"| {form} | {NAMES[engine]} | {', '.join(platforms)} |"
        for form, engines in read_proven().items()
        for engine, platforms in engines.items()
    ]
    tested = [row for engine in ENGINES for row in releases(facts_of(engine))]
    formats = PROVEN_TABLE + _lines(proven) if proven else NOTHING_PROVEN
    return "".join(
        [
            HEAD,
            RELEASES,
            _lines(tested),
            PROVEN,
            formats,
            NATIVE,
            _lines(native()),
            DEPLOYED,
            _lines(deployments()),
        ]
    )


def _lines(rows: list[str]) -> str:
    return "".join(f"{row}\n" for row in rows)


if __name__ == "__main__":
    raise SystemExit(settle(FILE, page(), "--write" in sys.argv[1:]))
