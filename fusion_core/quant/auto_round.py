"""`quant_method` auto-round and inc: packed integers with `extra_config` for single modules."""

from __future__ import annotations

from collections.abc import Mapping

from . import awq, gptq, match
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
from .integers import integer_claim
from .records import Format, Method

_SPEC = {"bits", "group_size", "sym", "data_type"}
# Floating activations, and what tells how the weights came about.
_HOW = {
    "quant_method", "amp", "asym", "autoround_version", "batch_size", "dataset", "enable_minmax_tuning",
    "enable_norm_bias_tuning", "enable_quanted_input", "gradient_accumulate_steps", "iters", "lr",
    "low_gpu_mem_usage", "minmax_lr", "model_name_or_path", "nsamples", "n_samples", "not_use_best_mse",
    "sampler", "scale_dtype", "seqlen", "seed", "train_bs", "backend", "static_kv_dtype", "super_bits",
    "super_group_size", "enable_alg_ext", "damp_percent", "desc_act", "true_sequential", "lm_head",
    "low_cpu_mem_usage", "dynamic_max_gap", "use_quant_input", "provider",
}  # fmt: skip
_ACTIVATIONS = {"act_bits", "act_group_size", "act_sym", "act_dynamic", "act_data_type"}
_BLOCKS = ("block_name_to_quantize", "to_quant_block_names")
_KEYS = _SPEC | _HOW | _ACTIVATIONS | {"packing_format", "extra_config", *_BLOCKS}
_REGEX_SIGNS = set("*+?^$()[]{}|\\")


def parse(section: Section) -> Resolver:
    """Read `extra_config`, full names, then regexes anywhere in a name; `block_name_to_quantize` dotted."""
    refuse_unknown_keys(section, _KEYS)
    packing = word(section, "packing_format", "auto_round:auto_gptq")
    if whole(section, "act_bits", 16) < 16:
        raise Doubt("quantised activations are not known")
    if packing.endswith("gptq"):
        formats = gptq.BY_BITS
    elif packing.endswith("awq"):
        formats = awq.BY_BITS
    else:
        raise Doubt(f"'packing_format' {packing!r} is not known")
    default = _claim(formats, section)
    blocks = tuple(part.strip() for entry in names(section, *_BLOCKS) for part in entry.split(","))
    inside = match.dotted(blocks)
    single: dict[str, Claim] = {}
    patterns: list[tuple[match.Matcher, Claim]] = []
    extra = mapping(section, "extra_config")
    regexes = [name for name in extra if _REGEX_SIGNS & set(name)]
    match.regexes(regexes)  # What the whole list may cost.
    for name in extra:
        change = mapping(extra, name)
        refuse_unknown_keys(change, _SPEC | _ACTIVATIONS | {"scale_dtype"}, f"extra_config.{name}.")
        claim = _claim(formats, {**section, **change})
        if name in regexes:
            patterns.append((match.regexes([name], search=True), claim))
        else:
            single[name] = claim

    def resolve(name: str) -> Claim:
        if name in single:
            return single[name]
        pattern = next((claim for matches, claim in patterns if matches(name)), None)
        if pattern is not None:
            return pattern
        return default if not blocks or inside(name) else PLAIN

    return resolve


def _claim(formats: Mapping[int, Format], section: Section) -> Claim:
    if whole(section, "bits") >= 16:
        return PLAIN
    word(section, "data_type", "int", {"int"})
    symmetric = "symmetric" if flag(section, "sym", True) else "zero points"
    return integer_claim(formats, section, ("bits", "group_size"), [symmetric])


METHOD = Method(
    names=("auto-round", "autoround", "intel/auto-round", "inc"),
    parse=parse,
    formats=(*gptq.METHOD.formats, *awq.METHOD.formats),
    engine_names=frozenset({"auto-round", "inc"}),
)
