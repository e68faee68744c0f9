"""`quant_method` mxfp4: never fused, and read only so far as to say which modules it quantises."""

from __future__ import annotations

from . import match
from .claims import PLAIN, Claim, Resolver, Section, names
from .records import Format, Method

MXFP4 = Format("mxfp4", layout=None, dequantise=None, unpack=None, table_dtype=None)


def parse(section: Section) -> Resolver:
    """Read `modules_to_not_convert` as globs."""
    ignored = match.globs(names(section, "modules_to_not_convert", "ignored_layers"))
    return lambda name: PLAIN if ignored(name) else Claim(MXFP4.name)


METHOD = Method(names=("mxfp4",), parse=parse, formats=(MXFP4,), engine_names=frozenset({"mxfp4"}))
