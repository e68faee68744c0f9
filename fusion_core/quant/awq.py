"""`quant_method` awq: packed integers, along the output."""

from __future__ import annotations

from collections.abc import Mapping

from . import gptq, match, packed
from .claims import PLAIN, Claim, Doubt, Resolver, Section, flag, names, refuse_unknown_keys, word
from .history import AUTO_ROUND, GPTQ
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
        # The order of 8-bit numbers is not known.
        unpack=packed.awq if bits == 4 else None,
        table_dtype=TABLE_DTYPES[bits],
    )
    for bits in BITS
}
_KEYS = GPTQ | AUTO_ROUND | {
    "bits", "w_bit", "group_size", "q_group_size", "zero_point", "sym", "version", "format",
    "checkpoint_format", "pack_dtype", "dynamic", "modules_to_not_convert", "to_quant_block_names",
    "do_fuse", "modules_to_fuse", "fuse_max_seq_len",
}  # fmt: skip
# Other layouts pack in another order under the same names. transformers and GPTQModel write several of these.
_LAYOUT_KEYS = ("version", "format", "checkpoint_format")


def parse(section: Section) -> Resolver:
    """Read `modules_to_not_convert` on dotted boundaries; engines match it as a substring. And `dynamic`."""
    refuse_unknown_keys(section, _KEYS)
    for key in _LAYOUT_KEYS:
        word(section, key, "gemm", {"gemm"})
    if flag(section, "desc_act", False) or word(section, "backend", "") == "llm-awq":
        raise Doubt("activation order and the layout of llm-awq are not known")
    gptq.check_packing(section)
    ignored = match.dotted(names(section, "modules_to_not_convert"))
    claim_of = gptq.overridden(section, {"bits", "group_size"}, _claim)
    return lambda name: PLAIN if ignored(name) else claim_of(name)


def _claim(section: Section) -> Claim:
    bits = "bits" if section.get("bits") is not None else "w_bit"
    group = "group_size" if section.get("group_size") is not None else "q_group_size"
    # Engines read `zero_point`; `sym` stands beside it in files of transformers, always true.
    zero = "zero points" if flag(section, "zero_point", True) else "no zero points"
    return integer_claim(BY_BITS, section, (bits, group), [zero])


METHOD = Method(
    names=("awq",),
    parse=parse,
    formats=tuple(BY_BITS.values()),
    engine_names=frozenset({"awq", "awq-marlin", "auto-awq"}),
)
