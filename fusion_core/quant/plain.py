"""No quantisation: weights as the model computes with them."""

from __future__ import annotations

from ..checkpoint.config import UNQUANTISED
from .claims import PLAIN, Resolver, Section, all_plain
from .layouts import PLAIN_DTYPES, Stored
from .records import Format, Method
from .scales import multiply

FORMAT = Format(
    PLAIN.format,
    layout={"weight": Stored(PLAIN_DTYPES, ("out in",))},
    dequantise=multiply,
    unpack=None,
    table_dtype="",
)


def parse(_: Section) -> Resolver:
    """Claim that every module is plain; the headers tell whether it is so."""
    return all_plain


METHOD = Method(
    names=(UNQUANTISED,), parse=parse, formats=(FORMAT,), engine_names=frozenset({"none", "unquant"})
)
