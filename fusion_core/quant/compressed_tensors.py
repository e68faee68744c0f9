"""`quant_method` compressed-tensors: schemes in `config_groups`, by `targets`, less `ignore`."""

from __future__ import annotations

from collections.abc import Mapping

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
from .fbgemm_fp8 import CHANNEL
from .fp8 import BLOCK, TENSOR
from .integers import BITS, TABLE_DTYPES
from .layouts import CHANNEL_SCALES, INPUT_SCALE, INT32, PLAIN_DTYPES, Stored
from .modelopt import NVFP4
from .mxfp4 import MXFP4
from .records import Format, Method

INT8_CHANNEL = Format(
    "int8-channel",
    layout={
        "weight": Stored(frozenset({"I8"}), ("out in",)),
        "weight_scale": CHANNEL_SCALES,
        "input_scale": INPUT_SCALE,
    },
    dequantise=None,
    table_dtype=None,
)
# Bits -> format.
PACKED: Mapping[int, Format] = {
    bits: Format(
        f"int{bits}-packed",
        layout={
            "weight_packed": Stored(INT32, ("out in/pack",)),
            "weight_scale": Stored(PLAIN_DTYPES, ("out in/cols",)),
            "weight_shape": Stored(frozenset({"I64", "I32"}), ("2",)),
            "weight_zero_point": Stored(INT32, ("out/pack in/cols",), optional=True),
            "weight_g_idx": Stored(INT32, ("in",), optional=True),
        },
        dequantise=None,
        table_dtype=TABLE_DTYPES[bits],
    )
    for bits in BITS
}
# The config's word for a format that packs FP4 -> format.
_FP4: Mapping[str, Format] = {"nvfp4-pack-quantized": NVFP4, "mxfp4-pack-quantized": MXFP4}
# Strategy of FP8 weights -> format.
_FP8: Mapping[str, Format] = {"tensor": TENSOR, "channel": CHANNEL, "block": BLOCK}
_KEYS = {
    "quant_method", "config_groups", "format", "ignore", "quantization_status", "kv_cache_scheme",
    "sparsity_config", "transform_config", "global_compression_ratio", "version",
}  # fmt: skip
_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_SCHEME_KEYS = {
    "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder",
    "observer", "observer_kwargs", "scale_dtype", "zp_dtype",
}  # fmt: skip
# Every projection of an expert is one of these to the tools that write such files.
_CLASS = "Linear"
_INPUT_SCALE, _ZERO, _ORDER = (frozenset({s}) for s in ("input_scale", "weight_zero_point", "weight_g_idx"))


def parse(section: Section) -> Resolver:
    """Read names that match whole, or by a "re:" regex from their start; "Linear" is every projection."""
    refuse_unknown_keys(section, _KEYS)
    word(section, "quantization_status", "compressed", {"compressed", "frozen"})
    if mapping(section, "transform_config") or word(_sparsity(section), "format", "dense") != "dense":
        raise Doubt("transforms and sparsity are not known")
    groups = []
    default = word(section, "format", "")
    for label in mapping(section, "config_groups"):
        group = mapping(mapping(section, "config_groups"), label)
        refuse_unknown_keys(group, _GROUP_KEYS, f"config_groups.{label}.")
        targets = names(group, "targets")
        matches = match.mixed(targets, match.exact)
        groups.append((_CLASS in targets, matches, _claim(group, word(group, "format", default))))
    if not groups:
        raise Doubt("it has no 'config_groups'")
    ignored = match.mixed(names(section, "ignore"), match.exact)

    def resolve(name: str) -> Claim:
        if ignored(name):
            return PLAIN
        claims = {claim for all_linear, matches, claim in groups if all_linear or matches(name)}
        if len(claims) > 1:
            raise Doubt(f"two config groups claim {name}")
        return claims.pop() if claims else PLAIN

    return resolve


def _sparsity(section: Section) -> Section:
    sparsity = mapping(section, "sparsity_config")
    if sparsity and names(sparsity, "targets"):
        raise Doubt("sparsity is not known")
    return sparsity


def _claim(group: Section, form: str) -> Claim:
    weights, inputs = mapping(group, "weights"), mapping(group, "input_activations")
    for label, scheme in (("weights", weights), ("input_activations", inputs)):
        refuse_unknown_keys(scheme, _SCHEME_KEYS, f"{label}.")
    if mapping(group, "output_activations"):
        raise Doubt("quantised output activations are not known")
    if form in _FP4:
        return Claim(_FP4[form].name)
    kind, bits = word(weights, "type", "int"), whole(weights, "num_bits")
    strategy = word(weights, "strategy", "")
    static = bool(inputs) and not _dynamic(inputs)
    symmetric = flag(weights, "symmetric", True)
    order = word(weights, "actorder", "", {"", "group", "weight", "dynamic", "static"})
    by_index = order in ("group", "dynamic")
    details = [_activations(inputs), "" if symmetric else "zero points", f"order {order}" if order else ""]
    if (kind, bits, form) == ("float", 8, "float-quantized") and symmetric and not order:
        rows, columns = _group(weights, strategy)
        stored = _FP8.get(strategy)
    elif (kind, bits, form, strategy) == ("int", 8, "int-quantized", "channel") and symmetric and not order:
        rows, columns = 1, 0
        stored = INT8_CHANNEL
    elif kind == "int" and bits in PACKED and form == "pack-quantized" and strategy in ("group", "channel"):
        rows, columns = _group(weights, strategy)
        stored = PACKED[bits]
    else:
        stored = None
    if stored is None:
        raise Doubt(f"{kind} weights of {bits} bits by {strategy or 'no strategy'} in {form!r} are not known")
    return Claim(
        stored.name,
        bits if stored in PACKED.values() else 0,
        (rows, columns),
        needs=(_INPUT_SCALE if static else frozenset())
        | (frozenset() if symmetric else _ZERO)
        | (_ORDER if by_index else frozenset()),
        lacks=(frozenset() if static else _INPUT_SCALE)
        | (_ZERO if symmetric else frozenset())
        | (frozenset() if by_index else _ORDER),
        inputs=_shared_scales(inputs),
        details=tuple(d for d in details if d),
    )


def _group(weights: Section, strategy: str) -> tuple[int, int]:
    if strategy == "block":
        block = weights.get("block_structure")
        if not isinstance(block, list) or len(block) != 2:
            raise Doubt(f"'block_structure' is {block!r}, no two sizes")
        sizes = {"rows": block[0], "columns": block[1]}
        return whole(sizes, "rows", low=1), whole(sizes, "columns", low=1)
    if strategy == "group":
        return 1, whole(weights, "group_size", low=1)
    return (1, 0) if strategy == "channel" else (0, 0)


def _dynamic(scheme: Section) -> bool:
    return False if scheme.get("dynamic") == "local" else flag(scheme, "dynamic", False)


def _shared_scales(inputs: Section) -> tuple[int, int] | None:
    """Read how many tokens and columns of FP8 activations share a scale; 0 for all."""
    if not inputs or word(inputs, "type", "int") != "float":
        return None
    tokens = 0 if word(inputs, "strategy", "") == "tensor" else 1
    return tokens, max(whole(inputs, "group_size", 0, low=-1), 0)


def _activations(inputs: Section) -> str:
    if not inputs:
        return ""
    how = "dynamic" if _dynamic(inputs) else "static"
    size = f" {inputs.get('group_size')}" if inputs.get("group_size") else ""
    kind, strategy = word(inputs, "type", "int"), word(inputs, "strategy", "")
    return f"{how} {kind}{whole(inputs, 'num_bits')} activations by {strategy}{size}"


METHOD = Method(
    names=("compressed-tensors",),
    parse=parse,
    formats=(TENSOR, CHANNEL, BLOCK, INT8_CHANNEL, *PACKED.values(), NVFP4, MXFP4),
    engine_names=frozenset({"compressed-tensors"}),
)
