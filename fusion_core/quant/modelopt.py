"""`quant_method` modelopt, and its own file hf_quant_config.json: FP8 and NVFP4 with globs to exclude."""

from __future__ import annotations

from collections.abc import Mapping

from . import match
from .claims import (
    PLAIN,
    Claim,
    Doubt,
    Resolver,
    Section,
    all_plain,
    mapping,
    names,
    refuse_unknown_keys,
    word,
)
from .fbgemm_fp8 import CHANNEL
from .fp8 import TENSOR
from .records import Format, Method

NVFP4, MXFP8 = (
    Format(name, layout=None, dequantise=None, unpack=None, table_dtype=None) for name in ("nvfp4", "mxfp8")
)
_LISTS = ("exclude_modules", "ignore")
_KEYS = {
    "quant_method", "quant_algo", "kv_cache_quant_algo", "kv_cache_scheme", "group_size", "has_zero_point",
    "pre_quant_scale", "producer", "config_groups", "quantized_layers", *_LISTS,
}  # fmt: skip
_STATIC = frozenset({"input_scale"})
_ALGORITHMS: Mapping[str, Claim] = {
    "fp8": Claim(TENSOR.name, needs=_STATIC, inputs=(0, 0), details=("static activations",)),
    "fp8_per_channel_per_token": Claim(
        CHANNEL.name, group=(1, 0), lacks=_STATIC, inputs=(1, 0), details=("dynamic activations",)
    ),
    "nvfp4": Claim(NVFP4.name),
    "nvfp4_awq": Claim(NVFP4.name),
    "w4a16_nvfp4": Claim(NVFP4.name),
    "mxfp8": Claim(MXFP8.name),
}


def parse(section: Section) -> Resolver:
    """Read globs of `exclude_modules`, on a module and what it holds, and names of `quantized_layers`."""
    refuse_unknown_keys(section, _KEYS)
    excluded = match.globs(names(section, *_LISTS))
    algorithm = word(section, "quant_algo", "")
    if not algorithm:
        # Of the KV cache alone: the tool leaves the key out, or writes null.
        if mapping(section, "quantized_layers") or mapping(section, "config_groups"):
            raise Doubt("layers are quantised without a 'quant_algo'")
        return all_plain
    if algorithm == "mixed_precision":
        layers = mapping(section, "quantized_layers")
        single = {name: _algorithm(mapping(layers, name)) for name in layers}
        if not single:
            raise Doubt("MIXED_PRECISION without 'quantized_layers'")
        # One entry stands for the fused experts of a layer, or for one projection.
        return lambda name: PLAIN if excluded(name) else _longest(name, single)
    claim = _algorithm(section)
    return lambda name: PLAIN if excluded(name) else claim


def _algorithm(section: Section) -> Claim:
    algorithm = word(section, "quant_algo", "", {*_ALGORITHMS})
    if section.get("pre_quant_scale") or section.get("has_zero_point"):
        raise Doubt("scales before quantisation and zero points are not known")
    return _ALGORITHMS[algorithm]


def _longest(name: str, single: Mapping[str, Claim]) -> Claim:
    while name:
        if name in single:
            return single[name]
        name = name.rpartition(".")[0]
    return PLAIN


METHOD = Method(
    names=("modelopt",),
    parse=parse,
    formats=(TENSOR, CHANNEL, NVFP4, MXFP8),
    # Not modelopt-fp4: SGLang makes FP4 of FP8 under that name.
    engine_names=frozenset({"modelopt", "modelopt-fp8", "modelopt-mixed"}),
)
