"""`quant_method` gptq: packed integers, and GPTQModel's `dynamic` overrides."""

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
    word,
)
from .integers import BITS, GROUP_SCALES, GROUP_ZEROS, TABLE_DTYPES, integer_claim
from .layouts import INT32, Stored
from .records import Format, Method

# Bits -> format.
BY_BITS: Mapping[int, Format] = {
    bits: Format(
        f"int{bits}-gptq",
        layout={
            "qweight": Stored(INT32, ("in/pack out",)),
            "qzeros": GROUP_ZEROS,
            "scales": GROUP_SCALES,
            "g_idx": Stored(INT32, ("in",), optional=True),
        },
        dequantise=None,
        table_dtype=TABLE_DTYPES[bits],
    )
    for bits in BITS
}
_SPEC = {"bits", "group_size", "sym", "desc_act"}
# What tells how the weights came about, and what serves other modules.
_HOW = {
    "quant_method", "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "mse",
    "lm_head", "meta", "model_name_or_path", "model_file_base_name", "model_seqlen", "pad_token_id",
    "tokenizer", "dataset", "exllama_config", "max_input_length", "use_cuda_fp16", "use_exllama", "backend",
    "batch_size", "cache_block_outputs", "block_name_to_quantize", "module_name_preceding_first_block",
    "offload_to_disk", "failsafe", "act_group_aware", "disable_exllama", "version",
}  # fmt: skip
_KEYS = _SPEC | _HOW | {
    "dynamic", "checkpoint_format", "format", "pack_dtype", "is_marlin_format",
    "modules_in_block_to_quantize",
}  # fmt: skip


def parse(section: Section) -> Resolver:
    """Read `dynamic`: the first regex that matches from the start decides; "-:" leaves a module plain."""
    refuse_unknown_keys(section, _KEYS)
    layout = section.get("checkpoint_format") or section.get("format")
    if layout not in (None, "gptq", "gptq_v2") or flag(section, "is_marlin_format", False):
        raise Doubt(f"'checkpoint_format' {layout!r} is not known")
    word(section, "pack_dtype", "int32", {"int32"})
    default = _claim(section, layout or "gptq")
    overrides = [_override(pattern, section, layout or "gptq") for pattern in mapping(section, "dynamic")]
    # What the whole list may cost.
    match.regexes(_regex(pattern) for pattern in mapping(section, "dynamic"))
    listed = names(section, "modules_in_block_to_quantize")
    inside = match.ending(listed)

    def resolve(name: str) -> Claim:
        if listed and not inside(name):
            return PLAIN
        return next((claim for matches, claim in overrides if matches(name)), default)

    return resolve


def _claim(section: Section, layout: str) -> Claim:
    order = "activation order" if flag(section, "desc_act", False) else ""
    symmetric = "symmetric" if flag(section, "sym", True) else "zero points"
    details = [symmetric, *([order] if order else []), *([layout] if layout != "gptq" else [])]
    return integer_claim(BY_BITS, section, ("bits", "group_size"), details)


def _override(pattern: str, section: Section, layout: str) -> tuple[match.Matcher, Claim]:
    matches = match.regexes([_regex(pattern)])
    if pattern.startswith("-:"):
        return matches, PLAIN
    change = mapping(mapping(section, "dynamic"), pattern)
    refuse_unknown_keys(change, _SPEC | {"mse", "damp_percent"}, f"dynamic.{pattern}.")
    return matches, _claim({**section, **change}, layout)


def _regex(pattern: str) -> str:
    return pattern[2:] if pattern.startswith(("-:", "+:")) else pattern


METHOD = Method(
    names=("gptq", "gptqmodel"),
    parse=parse,
    formats=tuple(BY_BITS.values()),
    engine_names=frozenset({"gptq", "gptq-marlin", "auto-gptq", "gptqmodel"}),
)
