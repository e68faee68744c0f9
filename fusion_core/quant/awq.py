"""`quant_method` awq: 4-bit integers, packed along the output."""

from __future__ import annotations

from . import match
from .claims import PLAIN, Resolver, Section, flag, integer_format, names, refuse_unknown_keys, word

_KEYS = {
    "quant_method", "bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "backend",
    "modules_to_not_convert", "do_fuse", "modules_to_fuse", "fuse_max_seq_len", "exllama_config",
}  # fmt: skip


def awq(section: Section) -> Resolver:
    """`modules_to_not_convert` on dotted boundaries; engines match it as a substring."""
    refuse_unknown_keys(section, _KEYS)
    # Other versions pack in another order under the same names.
    word(section, "version", "gemm", {"gemm"})
    bits = "bits" if section.get("bits") is not None else "w_bit"
    group = "group_size" if section.get("group_size") is not None else "q_group_size"
    zero = "zero points" if flag(section, "zero_point", True) else "no zero points"
    claim = integer_format("awq", section, (bits, group), [zero])
    ignored = match.dotted(names(section, "modules_to_not_convert"))
    return lambda name: PLAIN if ignored(name) else claim
