"""Which quantised formats were run and compared on which engine and platform (patches/proven.yaml)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml

from .. import patches
from ..errors import FsePatchError
from ..settings import ENGINES
from .native import PLATFORMS
from .quant.resolve import FORMATS

PROVEN_FILE = Path(patches.__file__).with_name("proven.yaml")
_UNQUANTISED = "plain"
Proven = Mapping[str, Mapping[str, tuple[str, ...]]]


@cache
def read_proven(path: Path = PROVEN_FILE) -> Proven:
    """Format -> engine -> platforms.

    Raises:
        FsePatchError: the file names a format, an engine or a platform that is none.
    """
    table = yaml.safe_load(path.read_bytes())["proven"]
    proven = {f: {e: tuple(platforms) for e, platforms in engines.items()} for f, engines in table.items()}
    for form, engines in proven.items():
        for engine, platforms in engines.items():
            for name, known in ((form, FORMATS), (engine, ENGINES), *((p, PLATFORMS) for p in platforms)):
                if name not in known:
                    raise FsePatchError(f"{path}: {name!r} is none of {', '.join(known)}")
    return proven


def unproven(formats: tuple[str, ...], engine: str, platform: str, proven: Proven | None = None) -> str:
    """The first of ``formats`` that was not proven there, or ""; unquantised weights need no row."""
    proven = read_proven() if proven is None else proven
    quantised = (f for f in formats if f != _UNQUANTISED)
    return next((f for f in quantised if platform not in proven.get(f, {}).get(engine, ())), "")


def proven_places(formats: tuple[str, ...]) -> list[str]:
    """Where all quantised formats of ``formats`` were proven, as "engine/platform", for reports."""
    return [f"{e}/{p}" for e in ENGINES for p in PLATFORMS if not unproven(formats, e, p)]
