"""The registry of quantisation methods, and what is looked up in their records by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..checkpoint.config import QuantConfig
from . import (
    auto_round,
    awq,
    bitsandbytes,
    compressed_tensors,
    fbgemm_fp8,
    fp8,
    gptq,
    modelopt,
    modelopt_fp4,
    mxfp4,
    plain,
    quark,
)
from .claims import Claim, Doubt, Resolver, Section
from .layouts import Layout
from .records import Format, Method

if TYPE_CHECKING:
    from .records import Dequantise

METHODS: tuple[Method, ...] = (
    plain.METHOD,
    fp8.METHOD,
    fbgemm_fp8.METHOD,
    compressed_tensors.METHOD,
    awq.METHOD,
    gptq.METHOD,
    auto_round.METHOD,
    modelopt.METHOD,
    modelopt_fp4.METHOD,
    mxfp4.METHOD,
    quark.METHOD,
    bitsandbytes.METHOD,
)

# Method, as `QuantConfig.method` has it -> parser of its section; raises Doubt at what it does not know.
PARSERS: Mapping[str, Callable[[Section], Resolver]] = {
    name: method.parse for method in METHODS for name in method.names
}
# The same -> engines' names of the code that reads it.
READERS: Mapping[str, frozenset[str]] = {
    name: method.engine_names for method in METHODS for name in method.names
}
# Format by its name.
FORMATS: Mapping[str, Format] = {form.name: form for method in METHODS for form in method.formats}
# Name of a format -> the tensors that it stores; one that is not here is never fused.
LAYOUTS: Mapping[str, Layout] = {
    name: form.layout for name, form in FORMATS.items() if form.layout is not None
}
# Name of a format -> how the canary reads it; it reads no others.
READABLE: Mapping[str, Dequantise] = {
    name: form.dequantise for name, form in FORMATS.items() if form.dequantise is not None
}
# Name of a format -> dtype in the file names of tuned tables; no table is looked up for others.
TABLE_DTYPES: Mapping[str, str] = {
    name: form.table_dtype for name, form in FORMATS.items() if form.table_dtype is not None
}


def resolver_for(quants: Sequence[QuantConfig]) -> Resolver:
    """Read what all configs of a checkpoint say of a module. The resolver raises Doubt where they disagree.

    Raises:
        Doubt: a method has no parser, or its config something that is not known.
    """
    resolvers = [_resolver(quant) for quant in quants]
    if len(resolvers) == 1:
        return resolvers[0]

    def resolve(name: str) -> Claim:
        first, *others = (r(name) for r in resolvers)
        for quant, other in zip(quants[1:], others, strict=True):
            if other != first:
                raise Doubt(f"{quants[0].source} says {first} of {name}, {quant.source} {other}")
        return first

    return resolve


def _resolver(quant: QuantConfig) -> Resolver:
    parser = PARSERS.get(quant.method)
    if parser is None:
        raise Doubt(f"nothing is known of quant_method {quant.method!r}")
    try:
        return parser(quant.section)
    except Doubt as doubt:
        raise Doubt(f"{quant.source}: {doubt}") from None
