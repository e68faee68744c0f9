"""`quant_method` compressed-tensors: schemes in `config_groups`, by `targets`, less `ignore`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from . import match, packed
from .claims import (
    PLAIN,
    Claim,
    Doubt,
    Resolver,
    Section,
    all_plain,
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
    unpack=None,
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
        unpack=packed.compressed,
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
# Classes among `targets`. Every projection of an expert is the first to the tools that write such files; the
# others are engines' layers of routed experts.
_CLASS, _ROUTED_CLASSES = "Linear", {"RoutedExperts", "FusedMoE"}
_INPUT_SCALE, _ZERO, _ORDER = (frozenset({s}) for s in ("input_scale", "weight_zero_point", "weight_g_idx"))


@dataclass(frozen=True)
class _Group:
    """One group: the modules that it names, the classes among them, and how it has their weights."""

    named: match.Matcher
    targets: tuple[str, ...]
    section: Section
    format: str

    @property
    def quantises(self) -> bool:
        activations = [mapping(self.section, f"{side}_activations") for side in ("input", "output")]
        return self.section.get("weights") is not None or any(activations)

    @cached_property
    def claim(self) -> Claim:
        # Read when a module asks: a group of attention or embeddings says nothing of experts.
        return _claim(self.section, self.format)

    def has_class_of(self, name: str) -> bool:
        return _CLASS in self.targets or (
            ".experts." in name and not _ROUTED_CLASSES.isdisjoint(self.targets)
        )


def parse(section: Section) -> Resolver:
    """Read names that match whole, or by a "re:" regex from their start; these come before "Linear"."""
    refuse_unknown_keys(section, _KEYS)
    if mapping(section, "transform_config") or word(_sparsity(section), "format", "dense") != "dense":
        raise Doubt("transforms and sparsity are not known")
    groups = list(_groups(section))
    if not any(group.quantises for group in groups):
        if word(section, "format", "") in _FP4:
            raise Doubt("it packs FP4, and no group says of what")
        return all_plain  # of the KV cache alone
    word(section, "quantization_status", "compressed", {"compressed", "frozen"})
    ignored = match.mixed(names(section, "ignore"), match.exact)

    def resolve(name: str) -> Claim:
        if ignored(name):
            return PLAIN
        chosen = [group for group in groups if group.named(name)]
        chosen = chosen or [group for group in groups if group.has_class_of(name)]
        claims = {group.claim for group in chosen}
        if len(claims) > 1:
            # By name, tools and engines take the first in orders of their own.
            raise Doubt(f"two config groups claim {name}")
        return claims.pop() if claims else PLAIN

    return resolve


def _groups(section: Section) -> Iterator[_Group]:
    """Yield the groups that have targets other than attention, whose groups are of the KV cache."""
    sections = mapping(section, "config_groups")
    for label in sections:
        group = mapping(sections, label)
        refuse_unknown_keys(group, _GROUP_KEYS, f"config_groups.{label}.")
        if group.get("targets") is None:
            raise Doubt(f"'config_groups.{label}' has no 'targets'")
        targets = names(group, "targets")
        if not all(target.isidentifier() and target.endswith("Attention") for target in targets):
            form = word(group, "format", word(section, "format", ""))
            yield _Group(match.mixed(targets, match.exact), targets, group, form)


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
    if group.get("weights") is None:
        if inputs:
            raise Doubt("quantised activations beside plain weights are not known")
        return PLAIN
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
