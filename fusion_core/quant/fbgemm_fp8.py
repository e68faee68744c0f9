"""`quant_method` fbgemm_fp8: FP8 weights with one scale a channel."""

from __future__ import annotations

from . import match
from .claims import PLAIN, Claim, Resolver, Section, names, refuse_unknown_keys
from .fp8 import TABLE_DTYPE
from .layouts import CHANNEL_SCALES, FP8_WEIGHT, INPUT_SCALE
from .records import Format, Method
from .scales import multiply

CHANNEL = Format(
    "fp8-channel",
    layout={"weight": FP8_WEIGHT, "weight_scale": CHANNEL_SCALES, "input_scale": INPUT_SCALE},
    dequantise=multiply,
    unpack=None,
    table_dtype=TABLE_DTYPE,
)
_LISTS = ("ignored_layers", "modules_to_not_convert")


def parse(section: Section) -> Resolver:
    """Read one scale a channel; `modules_to_not_convert` on dotted boundaries."""
    refuse_unknown_keys(section, {"quant_method", "activation_scale_ub", *_LISTS})
    ignored = match.dotted(names(section, *_LISTS))
    bound = f"activations up to {section.get('activation_scale_ub')}"
    claim = Claim(
        CHANNEL.name, group=(1, 0), lacks=frozenset({"input_scale"}), inputs=(1, 0), details=(bound,)
    )
    return lambda name: PLAIN if ignored(name) else claim


METHOD = Method(
    names=("fbgemm-fp8",), parse=parse, formats=(CHANNEL,), engine_names=frozenset({"fbgemm-fp8"})
)
