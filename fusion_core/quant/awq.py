"""`quant_method` awq: packed integers, along the output."""

from __future__ import annotations

from collections.abc import Mapping

from . import match
from .claims import PLAIN, Resolver, Section, flag, names, refuse_unknown_keys, word
from .integers import BITS, GROUP_SCALES, GROUP_ZEROS, TABLE_DTYPES, integer_claim
from .layouts import INT32, Stored
from .records import Format, Method

# Bits -> format.
BY_BITS: Mapping[int, Format] = {
    bits: Format(
        f"int{bits}-awq",
        layout={
            "qweight": Stored(INT32, ("in out/pack",)),
            "qzeros": GROUP_ZEROS,
            "scales": GROUP_SCALES,
        },
        dequantise=None,
        table_dtype=TABLE_DTYPES[bits],
    )
    for bits in BITS
}
_KEYS = {
    "quant_method", "bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "backend",
    "modules_to_not_convert", "do_fuse", "modules_to_fuse", "fuse_max_seq_len", "exllama_config",
}  # fmt: skip


def parse(section: Section) -> Resolver:
    """Read `modules_to_not_convert` on dotted boundaries; engines match it as a substring."""
    refuse_unknown_keys(section, _KEYS)
    # Other versions pack in another order under the same names.
    word(section, "version", "gemm", {"gemm"})
    bits = "bits" if section.get("bits") is not None else "w_bit"
    group = "group_size" if section.get("group_size") is not None else "q_group_size"
    zero = "zero points" if flag(section, "zero_point", True) else "no zero points"
    claim = integer_claim(BY_BITS, section, (bits, group), [zero])
    ignored = match.dotted(names(section, "modules_to_not_convert"))
    return lambda name: PLAIN if ignored(name) else claim


METHOD = Method(
    names=("awq",),
    parse=parse,
    formats=tuple(BY_BITS.values()),
    engine_names=frozenset({"awq", "awq-marlin", "auto-awq"}),
)
