"""`quant_method` fp8: FP8 weights with one scale a block or a tensor."""

from __future__ import annotations

from . import match
from .claims import PLAIN, Claim, Doubt, Resolver, Section, flag, names, refuse_unknown_keys, word
from .layouts import FP8_WEIGHT, INPUT_SCALE, ONE_SCALE, PLAIN_DTYPES, Stored
from .records import Format, Method
from .scales import multiply

TABLE_DTYPE = "fp8_w8a8"
BLOCK = Format(
    "fp8-block",
    layout={
        "weight": FP8_WEIGHT,
        "weight_scale_inv|weight_scale": Stored(PLAIN_DTYPES, ("out/rows in/cols",)),
    },
    dequantise=multiply,
    table_dtype=TABLE_DTYPE,
)
TENSOR = Format(
    "fp8-tensor",
    layout={"weight": FP8_WEIGHT, "weight_scale": ONE_SCALE, "input_scale": INPUT_SCALE},
    dequantise=multiply,
    table_dtype=TABLE_DTYPE,
)
_LISTS = ("ignored_layers", "modules_to_not_convert")
_STATIC = frozenset({"input_scale"})
_KEYS = {
    "quant_method", "activation_scheme", "weight_block_size", "fmt", "scale_fmt", "weight_per_tensor",
    "act_per_tensor", "kv_cache_scheme", "dequantize", *_LISTS,
}  # fmt: skip


def parse(section: Section) -> Resolver:
    """Read blocks of `weight_block_size`, or one scale a tensor; `ignored_layers` on dotted boundaries."""
    refuse_unknown_keys(section, _KEYS)
    word(section, "fmt", "e4m3", {"e4m3", "float8_e4m3fn"})
    scale_format = word(section, "scale_fmt", "float", {"float", "ue8m0"})
    scheme = word(section, "activation_scheme", "dynamic", {"dynamic", "static"})
    block = section.get("weight_block_size")
    if block and (flag(section, "weight_per_tensor", False) or flag(section, "act_per_tensor", False)):
        raise Doubt("it names a block size and one scale a tensor")
    details = (f"{scheme} activations", *([scale_format] if scale_format != "float" else []))
    claim = Claim(
        (BLOCK if block else TENSOR).name,
        group=(block[0], block[1]) if block else (0, 0),
        needs=_STATIC if scheme == "static" and not block else frozenset(),
        lacks=frozenset() if scheme == "static" else _STATIC,
        inputs=(1, block[1]) if block else (0, 0),
        details=details,
    )
    ignored = match.dotted(names(section, *_LISTS))
    return lambda name: PLAIN if ignored(name) else claim


METHOD = Method(names=("fp8",), parse=parse, formats=(BLOCK, TENSOR), engine_names=frozenset({"fp8"}))
