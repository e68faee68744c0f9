"""`quant_method` fp8: FP8 weights with one scale a block or a tensor."""

from __future__ import annotations

from . import match
from .claims import (
    PLAIN,
    Claim,
    Doubt,
    Resolver,
    Section,
    flag,
    mapping,
    names,
    refuse_unknown_keys,
    whole,
    word,
)
from .history import AUTO_ROUND, check_other_modules
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
    unpack=None,
    table_dtype=TABLE_DTYPE,
)
TENSOR = Format(
    "fp8-tensor",
    layout={"weight": FP8_WEIGHT, "weight_scale": ONE_SCALE, "input_scale": INPUT_SCALE},
    dequantise=multiply,
    unpack=None,
    table_dtype=TABLE_DTYPE,
)
_LISTS = ("ignored_layers", "modules_to_not_convert")
_STATIC = frozenset({"input_scale"})
_KEYS = AUTO_ROUND | {
    "quant_method", "activation_scheme", "weight_block_size", "fmt", "scale_fmt", "weight_per_tensor",
    "act_per_tensor", "kv_cache_scheme", "dequantize", "expert_dtype", "modules_to_convert", *_LISTS,
    "bits", "group_size", "sym", "extra_config", "block_name_to_quantize",
}  # fmt: skip


def parse(section: Section) -> Resolver:
    """Read blocks of `weight_block_size`, or one scale a tensor; `ignored_layers` on dotted boundaries."""
    refuse_unknown_keys(section, _KEYS)
    word(section, "fmt", "e4m3", {"e4m3", "float8_e4m3fn"})
    scale_format = word(section, "scale_fmt", "float", {"float", "ue8m0"})
    scheme = word(section, "activation_scheme", "dynamic", {"dynamic", "static"})
    block = section.get("weight_block_size")
    _check_auto_round(section, block)
    # DeepSeek's experts may be FP4 in a file of FP8; transformers writes the word for every model.
    word(section, "expert_dtype", "fp8", {"fp8"})
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
    # More than projections, such as embeddings. What is on both lists, nobody can say.
    converted = match.dotted(names(section, "modules_to_convert"))

    def resolve(name: str) -> Claim:
        if ignored(name) and converted(name):
            raise Doubt(f"{name} is to be converted, and is not")
        return PLAIN if ignored(name) else claim

    return resolve


def _check_auto_round(section: Section, block: object) -> None:
    """Raise Doubt where auto-round's own words say anything but FP8 in the blocks that engines read."""
    word(section, "data_type", "fp", {"fp", "fp8"})
    if whole(section, "bits", 8) != 8 or not flag(section, "sym", True):
        raise Doubt("FP8 of other than 8 bits, or with zero points, is not known")
    if whole(section, "act_bits", 8) != 8 or section.get("group_size") not in (None, block, -1):
        raise Doubt("'act_bits' and 'group_size' say something else than FP8 in blocks")
    check_other_modules(section)
    extra = mapping(section, "extra_config")
    for name in extra:
        # Those that stay plain are in `ignored_layers` too, which is what engines read.
        if whole(mapping(extra, name), "bits", 8) < 16:
            raise Doubt(f"'extra_config' changes {name}")


METHOD = Method(names=("fp8",), parse=parse, formats=(BLOCK, TENSOR), engine_names=frozenset({"fp8"}))
