"""`quant_method` bitsandbytes: never fused, and read only so far as to say which modules it quantises."""

from __future__ import annotations

from . import match
from .claims import PLAIN, Claim, Resolver, Section, flag, names
from .records import Format, Method

FOUR_BIT, EIGHT_BIT = (
    Format(f"bitsandbytes-{bits}bit", layout=None, dequantise=None, unpack=None, table_dtype=None)
    for bits in (4, 8)
)


def parse(section: Section) -> Resolver:
    """Read `llm_int8_skip_modules` on dotted boundaries."""
    skipped = match.dotted(names(section, "llm_int8_skip_modules"))
    four = flag(section, "load_in_4bit", False) or flag(section, "_load_in_4bit", False)
    claim = Claim((FOUR_BIT if four else EIGHT_BIT).name)
    return lambda name: PLAIN if skipped(name) else claim


METHOD = Method(
    names=("bitsandbytes",),
    parse=parse,
    formats=(FOUR_BIT, EIGHT_BIT),
    engine_names=frozenset({"bitsandbytes"}),
)
