"""`quant_method` gptq: packed integers, and GPTQModel's `dynamic` overrides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from . import match, packed
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
from .history import AUTO_ROUND, GPTQ, check_auto_round, check_copy
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
        unpack=packed.gptq,
        table_dtype=TABLE_DTYPES[bits],
    )
    for bits in BITS
}
_SPEC = {"bits", "group_size", "sym", "desc_act"}
_KEYS = _SPEC | GPTQ | AUTO_ROUND | {
    "dynamic", "checkpoint_format", "format", "pack_dtype", "is_marlin_format",
    "modules_in_block_to_quantize",
}  # fmt: skip
# The first is what engines take where nothing is said.
_LAYOUTS = ("gptq", "gptq_v2")


def parse(section: Section) -> Resolver:
    """Read `dynamic`: the first regex that matches from the start decides; "-:" leaves a module plain."""
    refuse_unknown_keys(section, _KEYS)
    layout = _layout(section)
    check_packing(section)
    listed = names(section, "modules_in_block_to_quantize")
    inside = match.ending(listed)
    claim_of = overridden(section, _SPEC, lambda changed: _claim(changed, layout))
    return lambda name: PLAIN if listed and not inside(name) else claim_of(name)


def check_packing(section: Section) -> None:
    """Raise Doubt where GPTQModel or auto-round packed weights otherwise than the method's layout has it."""
    check_copy(section)
    check_auto_round(section)
    word(section, "data_type", "int", {"int"})
    word(section, "pack_dtype", "int32", {"int32"})


def overridden(section: Section, may_change: Iterable[str], claim: Callable[[Section], Claim]) -> Resolver:
    """Read GPTQModel's `dynamic`; ``claim`` reads the section as an override of it leaves that.

    Args:
        may_change: keys that an override may have, beside those that tell how weights came about.
    """
    dynamic, known = mapping(section, "dynamic"), {*may_change, "mse", "damp_percent"}
    # What the whole list may cost.
    match.regexes(_regex(pattern) for pattern in dynamic)
    default = claim(section)
    overrides: list[tuple[match.Matcher, Claim]] = []
    for pattern in dynamic:
        change = {} if pattern.startswith("-:") else mapping(dynamic, pattern)
        refuse_unknown_keys(change, known, f"dynamic.{pattern}.")
        made = PLAIN if pattern.startswith("-:") else claim({**section, **change})
        overrides.append((match.regexes([_regex(pattern)]), made))
    return lambda name: next((made for matches, made in overrides if matches(name)), default)


def _layout(section: Section) -> str:
    """Read which of GPTQ's two layouts it is; two keys name it, and today's writers write both."""
    if flag(section, "is_marlin_format", False):
        raise Doubt("'is_marlin_format' is true, which is not known")
    keys = [key for key in ("checkpoint_format", "format") if section.get(key) not in (None, "")]
    layouts = {word(section, key, "", _LAYOUTS) for key in keys}
    if len(layouts) > 1:
        raise Doubt(
            f"'checkpoint_format' is {section['checkpoint_format']!r}, 'format' {section['format']!r}"
        )
    return layouts.pop() if layouts else _LAYOUTS[0]


def _claim(section: Section, layout: str) -> Claim:
    order = "activation order" if flag(section, "desc_act", False) else ""
    symmetric = "symmetric" if flag(section, "sym", True) else "zero points"
    details = [symmetric, *([order] if order else []), *([layout] if layout != _LAYOUTS[0] else [])]
    return integer_claim(BY_BITS, section, ("bits", "group_size"), details)


def _regex(pattern: str) -> str:
    return pattern[2:] if pattern.startswith(("-:", "+:")) else pattern


METHOD = Method(
    names=("gptq", "gptqmodel"),
    parse=parse,
    formats=tuple(BY_BITS.values()),
    engine_names=frozenset({"gptq", "gptq-marlin", "auto-gptq", "gptqmodel"}),
)
