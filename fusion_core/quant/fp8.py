"""`quant_method` fp8 and fbgemm-fp8: FP8 weights with one scale a block, a channel or a tensor."""

from __future__ import annotations

from . import match
from .claims import PLAIN, Claim, Doubt, Resolver, Section, flag, names, refuse_unknown_keys, word

_LISTS = ("ignored_layers", "modules_to_not_convert")
_STATIC = frozenset({"input_scale"})
_KEYS = {
    "quant_method", "activation_scheme", "weight_block_size", "fmt", "scale_fmt", "weight_per_tensor",
    "act_per_tensor", "kv_cache_scheme", "dequantize", *_LISTS,
}  # fmt: skip


def fp8(section: Section) -> Resolver:
    """Blocks of `weight_block_size`, or one scale a tensor; `ignored_layers` on dotted boundaries."""
    refuse_unknown_keys(section, _KEYS)
    word(section, "fmt", "e4m3", {"e4m3", "float8_e4m3fn"})
    scale_format = word(section, "scale_fmt", "float", {"float", "ue8m0"})
    scheme = word(section, "activation_scheme", "dynamic", {"dynamic", "static"})
    block = section.get("weight_block_size")
    if block and (flag(section, "weight_per_tensor", False) or flag(section, "act_per_tensor", False)):
        raise Doubt("it names a block size and one scale a tensor")
    details = (f"{scheme} activations", *([scale_format] if scale_format != "float" else []))
    claim = Claim(
        "fp8-block" if block else "fp8-tensor",
        group=(block[0], block[1]) if block else (0, 0),
        needs=_STATIC if scheme == "static" and not block else frozenset(),
        lacks=frozenset() if scheme == "static" else _STATIC,
        inputs=(1, block[1]) if block else (0, 0),
        details=details,
    )
    ignored = match.dotted(names(section, *_LISTS))
    return lambda name: PLAIN if ignored(name) else claim


def fbgemm(section: Section) -> Resolver:
    """One scale a channel; `modules_to_not_convert` on dotted boundaries."""
    refuse_unknown_keys(section, {"quant_method", "activation_scale_ub", *_LISTS})
    ignored = match.dotted(names(section, *_LISTS))
    bound = f"activations up to {section.get('activation_scale_ub')}"
    claim = Claim("fp8-channel", group=(1, 0), lacks=_STATIC, inputs=(1, 0), details=(bound,))
    return lambda name: PLAIN if ignored(name) else claim
