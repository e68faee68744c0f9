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
from .claims import Claim, Doubt, Resolver, Section, all_plain
from .layouts import Layout
from .records import Format, Method

if TYPE_CHECKING:
    from .records import Dequantise, Unpack

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
# The same for those whose weight lies in several tensors.
UNPACKED: Mapping[str, Unpack] = {
    name: form.unpack for name, form in FORMATS.items() if form.unpack is not None
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
    if len(resolvers) == 1 or all(resolver is all_plain for resolver in resolvers):
        return resolvers[0]

    def resolve(name: str) -> Claim:
        first, *others = (r(name) for r in resolvers)
        for quant, other in zip(quants[1:], others, strict=True):
            if other != first:
                raise Doubt(f"{quants[0].source} says {first} of {name}, {quant.source} {other}")
        return first

    return resolve


# Words of configs for formats that store one number for each weight.
_WHOLE_NUMBERS = {
    "block", "dense", "float-quantized", "int-quantized", "naive-quantized", "fp8", "fp8_e4m3",
    "fp8_per_channel_per_token", "mxfp8",
}  # fmt: skip


def quantises(quants: Sequence[QuantConfig]) -> bool:
    """Tell if the configs of a checkpoint quantise any weight, or may; one of the KV cache alone does not."""
    try:
        return resolver_for(quants) is not all_plain
    except Doubt:
        return True


def reader_of(quant: QuantConfig) -> str:
    """Return the name under which `READERS` has those that read such a config as it is."""
    # Under the same method, engines have code of its own for FP4.
    if quant.method in modelopt.METHOD.names and "fp4" in quant.scheme:
        return modelopt_fp4.METHOD.names[0]
    return quant.method


def packs(quant: QuantConfig) -> bool:
    """Tell if the config speaks, or may speak, of integers that hold several weights; headers not seen."""
    formats = [form for method in METHODS if quant.method in method.names for form in method.formats]
    if quant.scheme in _WHOLE_NUMBERS:
        return False
    return not formats or any(form.layout is None or _is_packed(form.layout) for form in formats)


def _is_packed(layout: Layout) -> bool:
    return any("pack" in shape for tensor in layout.values() for shape in tensor.shapes)


def _resolver(quant: QuantConfig) -> Resolver:
    parser = PARSERS.get(quant.method)
    if parser is None:
        raise Doubt(f"nothing is known of quant_method {quant.method!r}")
    try:
        return parser(quant.section)
    except Doubt as doubt:
        raise Doubt(f"{quant.source}: {doubt}") from None
