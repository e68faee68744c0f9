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
from .history import AUTO_ROUND, AUTO_ROUND_SINGLE, check_auto_round
from .integers import integer_claim
from .records import Format, Method

_SPEC = {"bits", "group_size", "sym"}
_BLOCKS = ("block_name_to_quantize", "to_quant_block_names")
_KEYS = _SPEC | AUTO_ROUND | {"asym", "packing_format", "extra_config", *_BLOCKS}
_REGEX_SIGNS = set("*+?^$()[]{}|\\")


def parse(section: Section) -> Resolver:
    """Read `extra_config`, full names, then regexes anywhere in a name; `block_name_to_quantize` dotted."""
    refuse_unknown_keys(section, _KEYS)
    packing = word(section, "packing_format", "auto_round:auto_gptq")
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
        refuse_unknown_keys(change, _SPEC | AUTO_ROUND_SINGLE, f"extra_config.{name}.")
        claim = _claim(formats, {**section, **{k: v for k, v in change.items() if v is not None}})
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
    check_auto_round(section)
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
