"""Finds the parser of a checkpoint's quantisation method; a method that has none is a doubt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..checkpoint.config import UNQUANTISED, QuantConfig
from . import auto_round, awq, compressed_tensors, excluded, fp8, gptq, modelopt
from .claims import Claim, Doubt, Resolver, Section, all_plain
from .layouts import LAYOUTS

# Method, as `QuantConfig.method` has it -> parser of its section; raises Doubt at what it does not know.
PARSERS: Mapping[str, Callable[[Section], Resolver]] = {
    "fp8": fp8.fp8,
    "fbgemm-fp8": fp8.fbgemm,
    "compressed-tensors": compressed_tensors.compressed_tensors,
    "awq": awq.awq,
    "gptq": gptq.gptq,
    "gptqmodel": gptq.gptq,
    "auto-round": auto_round.auto_round,
    "autoround": auto_round.auto_round,
    "intel/auto-round": auto_round.auto_round,
    "inc": auto_round.auto_round,
    "modelopt": modelopt.modelopt,
    "modelopt-fp4": modelopt.modelopt,
    "quark": excluded.quark,
    "mxfp4": excluded.mxfp4,
    "bitsandbytes": excluded.bitsandbytes,
}
# Named by parsers, and stored in ways that no layout describes.
_NO_LAYOUT = ("mxfp4", "nvfp4", "mxfp8", "bitsandbytes-4bit", "bitsandbytes-8bit")
FORMATS = (*LAYOUTS, *_NO_LAYOUT)


def resolver_for(quants: Sequence[QuantConfig]) -> Resolver:
    """What all configs of a checkpoint say of a module. The resolver raises Doubt where they disagree.

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
    if quant.method == UNQUANTISED:
        return all_plain
    parser = PARSERS.get(quant.method)
    if parser is None:
        raise Doubt(f"nothing is known of quant_method {quant.method!r}")
    try:
        return parser(quant.section)
    except Doubt as doubt:
        raise Doubt(f"{quant.source}: {doubt}") from None
