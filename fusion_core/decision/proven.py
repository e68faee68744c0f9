"""Quantised formats that were run and compared, by engine and platform (patches/proven.yaml)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from ...errors import FsePatchError
from ...patches import ENGINES, FOLDER, PLATFORMS
from ..checkpoint.config import UNQUANTISED
from ..data_file import parse
from ..engines import facts_of
from ..quant.methods import FORMATS
from .outcome import Decision

PROVEN_FILE = FOLDER / "proven.yaml"
Proven = Mapping[str, Mapping[str, tuple[str, ...]]]


@cache
def read_proven(path: Path = PROVEN_FILE) -> Proven:
    """Read the table: format -> engine -> platforms.

    Raises:
        FsePatchError: the file names a format, an engine or a platform that is none.
    """
    table = parse(path)["proven"]
    proven = {f: {e: tuple(platforms) for e, platforms in engines.items()} for f, engines in table.items()}
    for form, engines in proven.items():
        for engine, platforms in engines.items():
            for name, known in ((form, FORMATS), (engine, ENGINES), *((p, PLATFORMS) for p in platforms)):
                if name not in known:
                    raise FsePatchError(f"{path}: {name!r} is none of {', '.join(known)}")
    return proven


def unproven(decision: Decision, platform: str, proven: Proven | None = None) -> str:
    """Return the first format of ``decision`` that was not proven on its engine there, or "".

    A checkpoint that declares no quantisation needs no row. Plain experts of one that does need one: the
    engine's quantisation code builds them.
    """
    if decision.quant_method == UNQUANTISED:
        return ""
    proven = read_proven() if proven is None else proven
    places = ((f, proven.get(f, {}).get(decision.engine, ())) for f in decision.formats)
    return next((f for f, platforms in places if platform not in platforms), "")


def proven_platforms(decision: Decision) -> list[str]:
    """List the platforms on which all formats of ``decision`` were run on its engine, for reports.

    A checkpoint without quantisation was run where its engine was, in any release.
    """
    if decision.quant_method == UNQUANTISED:
        rows = facts_of(decision.engine).releases
        ran = {"cpu": any(row.cpu for row in rows), "cuda": any(row.cuda for row in rows)}
        return [platform for platform in PLATFORMS if ran.get(platform)]
    return [platform for platform in PLATFORMS if not unproven(decision, platform)]
